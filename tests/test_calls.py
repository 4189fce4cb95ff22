import pytest
import torch

from ghostify import GhostifyError, trace
from ghostify.calls import as_arguments, bind_inputs, example_of, inputs_of, run
from tests import nets


def test_a_batch_is_a_tensor_a_tuple_or_keywords():
    x = torch.ones(1)
    assert as_arguments(x) == ((x,), {})
    assert as_arguments([x, 2]) == ((x, 2), {})
    assert as_arguments({"x": x}) == ((), {"x": x})
    assert as_arguments(None) == ((), {})


def test_placeholders_take_keywords_then_positions_then_defaults():
    module = trace(nets.settle(nets.Optional())).module
    x = nets.images(1)
    assert bind_inputs(module, (), {"x": x}) == [x, None, 1.0]
    assert bind_inputs(module, (x, None), {"scale": 2.0}) == [x, None, 2.0]
    with pytest.raises(GhostifyError, match="input 'x' is missing"):
        bind_inputs(module, (), {})


def test_labels_are_left_out_of_batches_but_not_of_examples():
    module, x = trace(nets.settle(nets.Straight())).module, nets.images(2)
    assert inputs_of(module, (x, torch.ones(2))) == [x]
    wild = nets.settle(nets.Wild())
    assert inputs_of(wild, (x, torch.ones(2))) == [(x,), {}]
    assert len(example_of(wild, (x, torch.ones(2)))[0]) == 2
    assert torch.equal(run(wild, inputs_of(wild, x)), wild(x))
