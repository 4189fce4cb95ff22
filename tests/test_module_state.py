import torch
from torch import nn

from ghostify.graph.module_state import ModuleState


class Stateful(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("minimum", torch.zeros(0))
        self.linear, self.count, self.cache, self.last = nn.Linear(2, 2), 0, {}, None

    def forward(self, x):
        self.seen.data.add_(1)
        self.minimum.resize_(2)
        self.count += 1
        self.cache[self.count] = self.last = x
        self.new = nn.Linear(2, 2)
        self.linear.register_forward_hook(lambda *_: None)
        return self.linear(x)


def test_everything_that_a_forward_changes_is_restored():
    model = Stateful()
    state = ModuleState(model)
    seen, hooks = model.seen, model.linear._forward_hooks
    model(torch.ones(2))
    assert [name for _, _, name, _ in state.changed_attributes()] == ["count", "last"]
    assert state.changed_buffer() == ("", "seen")
    state.restore()
    assert (model.count, model.cache, model.last, model.seen.item(), model.minimum.numel()) == (0, {}, None, 0, 0)
    assert model.seen is seen
    assert model.linear._forward_hooks is hooks
    assert not hooks
    assert not hasattr(model, "new")
    assert state.changed_buffer() is None


def test_a_replaced_buffer_is_a_changed_one():
    model = nn.Sequential(nn.BatchNorm2d(2))
    state = ModuleState(model)
    model[0].running_mean = torch.zeros(2)
    assert state.changed_buffer() == ("0", "running_mean")
