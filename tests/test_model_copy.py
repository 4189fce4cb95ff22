import functools
import types

import pytest
import torch
from torch import nn

from ghostify import GhostifyError
from ghostify.graph.model_copy import copy_model
from tests import nets

model_of_this_module = nets.settle(nets.Straight())


def forwards(model):
    """Ways to set a forward on an instance that doubles its input."""
    original = model.forward
    yield types.MethodType(lambda self, x: type(self).forward(self, 2 * x), model)
    yield lambda x: original(2 * x)
    yield lambda x, inner=model: type(inner).forward(inner, 2 * x)
    yield functools.partial(lambda inner, x: type(inner).forward(inner, 2 * x), model)


@pytest.mark.parametrize("k", range(4), ids=["method", "closure", "default", "partial"])
def test_a_forward_set_on_the_instance_runs_the_copy(k):
    model, x = nets.settle(nets.Straight()), nets.images(1)
    expected = model(2 * x)
    model.forward = list(forwards(model))[k]
    copied = copy_model(model)
    assert torch.equal(copied(x), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), expected)


def test_a_forward_that_reads_a_global_runs_the_copy():
    model, x = model_of_this_module, nets.images(1)
    model.forward = lambda x: nets.Straight.forward(model_of_this_module, 2 * x)
    copied = copy_model(model)
    with torch.no_grad():
        copied.a[0].weight.zero_()
    assert not torch.equal(copied(x), model(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_compiled_model_is_refused():
    with pytest.raises(GhostifyError, match=r"is compiled by torch.jit, .* Convert the model before"):
        copy_model(torch.jit.script(nn.Conv2d(3, 3, 1)))


def test_a_hook_that_refers_to_the_model_changes_the_copy():
    model = nn.Sequential(nn.BatchNorm2d(3))
    model.register_forward_hook(lambda *_: model[0].running_mean.add_(1))
    copied = copy_model(model.eval())
    copied(nets.images(1))
    assert (model[0].running_mean[0], copied[0].running_mean[0]) == (0, 1)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_parameters_of_a_compiled_part_can_be_trained():
    copied = copy_model(nn.Sequential(torch.jit.script(nn.Conv2d(3, 3, 1))))
    assert all(p.is_leaf and p.requires_grad for p in copied.parameters())
