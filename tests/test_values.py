import functools
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder
from torchvision.transforms import InterpolationMode

from ghostify import GhostifyError
from ghostify.graph.allowed_ops import AllowedNames
from ghostify.graph.values import ATTRIBUTE_KINDS, MAX_DEPTH, ValueReader, encode, is_identifier, names_in

scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text() | st.floats(allow_nan=False)
keys = st.text() | st.integers(-5, 5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
    | st.dictionaries(keys, inner, max_size=3) | st.dictionaries(keys, inner, max_size=3).map(OrderedDict),
    max_leaves=8,
)  # fmt: skip


def read(data, tensors=None, **options):
    options = {"accepts_class": True, **options}
    return ValueReader("here", AllowedNames(), ATTRIBUTE_KINDS, tensors or {}, **options).read(data)


@given(values)
def test_values_survive(value):
    restored = read(encode(value, ""))
    assert restored == value
    assert type(restored) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        torch.float16, torch.channels_last, torch.device("cpu"), torch.Size([1, 2]), slice(1, None, 2), ..., {1, 2},
        frozenset([1]), F.relu, torch.nn.ReLU, InterpolationMode.BILINEAR, float("inf"),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_values_of_pytorch_and_python_survive(value):
    assert read(encode(value, "")) == value


def test_objects_partials_and_tensors_survive():
    tensors = {}
    coder = BoxCoder((1.0, 2.0, 3.0, 4.0))
    restored = read(encode([coder, functools.partial(F.pad, value=2), torch.ones(2)], "x", tensors), tensors)
    assert vars(restored[0]) == vars(coder)
    assert restored[1].keywords == {"value": 2}
    assert torch.equal(restored[2], torch.ones(2))


@pytest.mark.parametrize(
    "data",
    [
        {}, {"tuple": [], "list": []}, {"node": "x"}, {"tensor": "x"}, {"float": "1"}, {"size": [-1]}, {"size": ["a"]},
        {"slice": [1]}, {"dict": [1]}, {"dict": [[[1], 2]]}, {"set": [[1]]}, {"dtype": "load"}, {"dtype": 3},
        {"memory_format": "float32"}, {"device": "x"}, {"device": 1}, {"class": "torch:Size"},
        {"function": "torch:load"}, {"function": 1}, {"partial": ["torch:relu"]},
        {"partial": ["os:system", [], {"dict": []}]}, {"partial": ["torch:relu", [], {"dict": [["a b", 1]]}]},
        {"enum": ["torch:relu", "X"]},
        {"enum": ["torchvision.transforms.functional:InterpolationMode", "X"]}, {"object": ["torch:relu", {}]},
        {"object": ["torch.nn.modules.conv:Conv2d", {}]}, {"pickle": "x"}, 10**30,
        {"object": ["torchvision.models.detection._utils:BoxCoder", {"decode": {"function": "torch:relu"}}]},
        {"object": ["torchvision.models.detection._utils:BoxCoder", {"__class__": 1}]},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_other_data_is_refused(data):
    with pytest.raises(GhostifyError):
        read(data)


def test_values_are_of_bounded_depth():
    value = 1
    for _ in range(MAX_DEPTH - 1):
        value = [value]
    assert read(value) == value
    with pytest.raises(GhostifyError, match="nested more than 32 deep"):
        read([[value]])


def test_texts_are_those_that_are_accepted():
    assert read(["a"], accepts_text=str.isalpha) == ["a"]
    with pytest.raises(GhostifyError, match="text '/x' is not allowed here"):
        read({"tuple": ["/x"]}, accepts_text=str.isalpha)


def test_all_names_in_a_value_are_listed():
    data = {
        "tuple": [
            {"partial": ["a:b", [{"class": "c:d"}], {"dict": []}]},
            {"object": ["e:f", {"x": {"function": "g:h"}}]},
        ]
    }
    assert list(names_in({"x": data})) == ["a:b", "c:d", "e:f", "g:h"]


def test_values_that_json_cannot_express_are_refused():
    with pytest.raises(GhostifyError, match="here: a value of class PosixPath cannot be saved"):
        encode(Path("x"), "here")


@pytest.mark.parametrize(
    ("name", "is_valid"),
    [("x", True), ("größe", True), ("ﬁ", False), ("class", False), ("a b", False), ("", False), (3, False)],
)
def test_identifiers(name, is_valid):
    assert is_identifier(name) is is_valid


def test_listed_classes_are_values_only_where_they_are_accepted():
    for data in ({"class": "torch.nn.modules.activation:ReLU"}, {"function": "builtins:getattr"}):
        with pytest.raises(GhostifyError, match="is not allowed here"):
            read(data, accepts_class=False)
