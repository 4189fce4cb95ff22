import math

import pytest
import torch

from ghostify import deploy, ghostify, report
from ghostify.deployment.dense_ghosts import DenseCandidate, dense_candidates, mac_allowance, within_allowance
from ghostify.graph.inputs import bind_example
from ghostify.planning.cost import count_macs
from tests import nets


def converted(**options):
    torch.manual_seed(0)
    return ghostify(nets.settle(nets.Residual()), cheap="pointwise", example_inputs=nets.images(2), **options)


@pytest.mark.parametrize("count", [1, 3])
def test_the_added_macs_are_those_of_the_inference_form(count):
    model, x = converted(), nets.images(count)
    candidates = dense_candidates(model, bind_example(model, x))
    assert {c.path for c in candidates} == {line.name for line in report(model).layers if line.form is not None}
    added = sum(c.added_macs for c in candidates)
    assert count_macs(deploy(model, x), x) == count_macs(model, x) + added > count_macs(model, x)


def test_the_inference_form_keeps_the_limit_of_a_budget_at_any_size():
    for share in (0.75, 0.9):
        x = nets.images(2)
        model = converted(budget={"macs": share})
        limit = report(model).macs_limit
        assert limit == int(share * report(model).macs_before)
        assert count_macs(deploy(model, x), x) <= limit
        other = nets.images(1, 24)
        assert count_macs(deploy(model, other), other) <= limit * 2 + 1


def test_without_a_budget_of_macs_there_is_no_limit():
    model, x = converted(), nets.images(1)
    assert report(model).macs_limit is None
    assert mac_allowance(model, x) == math.inf
    assert mac_allowance(nets.Residual(), x) == math.inf
    assert report(converted(budget={"params": 0.8})).macs_limit is None


def test_those_that_add_least_become_dense_first():
    candidates = [DenseCandidate("a", 4, 50), DenseCandidate("b", 4, 10), DenseCandidate("c", 4, 30)]
    assert within_allowance(candidates, 45) == {"b": 10, "c": 30}
    assert within_allowance(candidates, 9) == {}
    assert within_allowance(candidates, math.inf) == {"a": 50, "b": 10, "c": 30}
