import torch
from torch import nn

from ghostify.graph.call_hooks import on_calls


class Scaled(nn.Module):
    def forward(self, x, *, scale):
        return x * scale


def test_callbacks_run_until_the_context_exits():
    module, calls, outputs = Scaled(), [], []
    before = lambda inner, args, kwargs: calls.append((inner, args, kwargs)) or "ignored"  # noqa: E731
    with on_calls([module], before=before, after=lambda _, result: outputs.append(result) or "ignored"):
        output = module(torch.ones(2), scale=3)
    module(torch.ones(2), scale=4)
    assert [(inner is module, kwargs) for inner, _, kwargs in calls] == [(True, {"scale": 3})]
    assert outputs[0] is output
    assert not module._forward_hooks
    assert not module._forward_pre_hooks


def test_hooks_of_several_modules_stay_without_a_context():
    modules, called = [nn.Identity(), nn.Identity()], []
    on_calls(modules, after=lambda inner, _: called.append(inner))
    nn.Sequential(*modules)(torch.ones(1))
    assert called == modules
