from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from ghostify.deployment.output_check import OutputCheck, check_outputs, check_tensors, output_leaves


@dataclass
class Found:
    boxes: torch.Tensor
    extra: Any = None


class Both(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Instances:
    def __init__(self, **fields):
        self.fields = fields
        self.owner = self


def check(actual, expected):
    return check_outputs(output_leaves(actual), output_leaves(expected), lambda _: 1e-3)


X = torch.tensor([1.0, 2.0, float("nan"), float("inf")])
ODD = X.clone()
ODD[0] = 1.5


def test_leaves_have_names_and_are_found_in_any_object():
    nested = {"found": [Found(X, 3), Instances(scores=X)], "both": Both(X, None)}
    assert list(output_leaves(nested)) == [
        "output['found'][0].boxes",
        "output['found'][0].extra",
        "output['found'][1].fields['scores']",
        "output['both'].a",
        "output['both'].b",
    ]


@pytest.mark.parametrize(
    "wrap",
    [lambda x: x, lambda x: (x, 1), lambda x: {"a": [x, None]}, lambda x: Found(x, "text"), lambda x: Instances(x=x)],
    ids=["tensor", "tuple", "dict", "dataclass", "object"],
)
def test_a_different_value_is_found_in_any_structure(wrap):
    assert check(wrap(X + 1e-4), wrap(X)) == OutputCheck(None)
    assert check(wrap(ODD), wrap(X)).difference.endswith("differs by 0.5 from values with maximum 2")


@pytest.mark.parametrize(
    ("actual", "expected", "difference"),
    [
        (X.nan_to_num(0), X, "differs by inf"),
        (X.double(), X, "is of float64 in shape (4,), not of float32 in shape (4,)"),
        (X[None], X, "is of float32 in shape (1, 4), not of float32 in shape (4,)"),
        (X.to(torch.complex64) * 1j, X.to(torch.complex64), "differs by"),
        (torch.arange(100) % 49, torch.arange(100) % 50, "differs in 51 of 100 values"),
        (X > 1, X > 5, "differs in 1 of 4 values"),
        (1, 2, "is 1, not 2"),
        (True, 1, "is True, not 1"),
        (0.5, 0.6, "differs by 0.1"),
        (None, X, "is of class NoneType, not of float32"),
        ((X, X), X, "it has the outputs output[0], output[1] in place of output"),
        ({"a": X}, {"b": X}, "it has the outputs output['a'] in place of output['b']"),
    ],
)
def test_what_differs_is_said(actual, expected, difference):
    assert difference in check(actual, expected).difference
    assert check(expected, expected) == OutputCheck(None)


def test_of_many_integers_a_few_may_be_flipped_by_rounding():
    mask = torch.zeros(1000, dtype=torch.bool)
    flipped = mask.clone()
    flipped[:10] = True
    assert check(flipped, mask).difference is None
    flipped[10] = True
    assert check(flipped, mask).difference == "output differs in 11 of 1000 values"


def test_what_cannot_be_compared_is_listed():
    checked = check((torch.ones(3, 4), {1}), (torch.ones(2, 4), {1}))
    assert checked == OutputCheck(
        None, ("output[0] has 3 rows in place of 2", "output[1] is of class set, which cannot be compared")
    )


def test_tensors_of_a_file_are_compared_in_order():
    expected = output_leaves({"a": X, "n": 3, "b": X > 1})
    assert check_tensors([X, X > 1], expected, lambda _: 0) == OutputCheck(None)
    assert check_tensors([X], expected, lambda _: 0).difference == "it has 1 outputs in place of 2"
    assert check_tensors([ODD, X > 1], expected, lambda _: 0).difference.startswith("output['a'] differs")
