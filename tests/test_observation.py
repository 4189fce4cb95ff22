import torch
from torch import nn

from ghostify import trace
from ghostify.graph.inputs import CallArguments
from ghostify.graph.observation import intercept_convs, record_forward
from tests import nets


def test_all_runs_of_a_node_are_counted():
    program = trace(nets.settle(nets.Wild()), nets.images(2))
    record = record_forward(program.module, program.subgraphs, CallArguments((nets.images(2),), {}))
    head = record.calls["head", "conv2d"]
    assert head.output_positions == 2 * (144 + 36)
    assert head.output_shape == (2, 6, 12, 12)
    assert record.macs == 2 * (144 * (27 * 8 + 72 * 8 + 27 * 3) + (144 + 36) * 72 * 6)


def test_the_callback_replaces_outputs_and_is_removed_afterwards():
    x = nets.images(2)
    program = trace(nets.settle(nets.Wild()), x)
    before = program.module(x)
    calls = []

    def double(path, node, _, output):
        calls.append((path, node.name))
        return output * 2

    with intercept_convs(program.module, program.subgraphs, double):
        changed = program.module(x)
    assert {path for path, _ in calls} == {"backbone", "head", "gate.conv"}
    assert not torch.equal(changed, before)
    assert torch.equal(program.module(x), before)


def test_convolutions_that_return_no_tensor_are_not_intercepted():
    class Pair(nn.Conv2d):
        def forward(self, x):
            return super().forward(x), x.shape

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.conv = Pair(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.conv(input=self.pair(x)[0])

    program, names = trace(Net().eval(), nets.images(1)), []
    with intercept_convs(program.module, program.subgraphs, lambda *call: names.append(call[1].name) or call[3]):
        program.module(nets.images(1))
    assert names == ["conv"]
