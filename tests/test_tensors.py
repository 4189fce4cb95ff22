import pytest
import torch
from torch import nn

from ghostify.runtimes.tensors import ExportInputs, by_name

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


class Takes(nn.Module):
    def forward(self, x, given=None, *more, flag=True, **others):
        return x, given, more, flag, others


@pytest.mark.parametrize(
    ("args", "kwargs", "names"),
    [
        ((A,), {}, ["x"]),
        ((A, B, C, A), {"flag": B}, ["x", "given", "more_0", "more_1", "flag"]),
        ((A, {"image": B, "mask": C}), {}, ["x", "image", "mask"]),
        ((A, {"a": {"image": B}, "b": {"image": C}}), {}, ["x", "given_a_image", "given_b_image"]),
        ((A, [B, 3, C]), {"extra": A}, ["x", "given_0", "given_2", "extra"]),
    ],
)
def test_each_tensor_has_the_name_that_the_caller_knows(args, kwargs, names):
    assert ExportInputs(args, kwargs).names(Takes()) == names


def test_tensors_go_to_inputs_by_name_then_in_order():
    given = by_name(["x", "image", "mask"], (A, {"mask": B, "image": C}), {})
    assert given == {"x": A, "mask": B, "image": C}
    assert by_name(["p", "q"], (A, B), {}) == {"p": A, "q": B}
    assert by_name(["p", "q"], (B,), {"p": A}) == {"p": A, "q": B}


def test_the_batch_is_doubled_and_keywords_are_sorted():
    inputs = ExportInputs((B,), {"others": A, "flag": 3}).in_order_of(Takes())
    assert list(inputs.kwargs) == ["flag", "others"]
    assert inputs.doubled().args[0].tolist() == [1] * 4
    single = inputs.doubled(single_only=True)
    assert (len(single.args[0]), len(single.kwargs["others"])) == (2, 2)
