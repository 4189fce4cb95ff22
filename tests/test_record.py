import torch

from ghostify import trace
from ghostify.tracing.record import looking, record
from tests import nets


def test_all_runs_of_a_node_are_counted():
    program = trace(nets.settle(nets.Wild()))
    made = record(program.module, program.parts, [(nets.images(2),), {}])
    head = made.calls["head", "conv2d"]
    assert head.places == 2 * (144 + 36)
    assert head.output_shape == (2, 6, 12, 12)
    assert made.macs == 2 * (144 * (27 * 8 + 72 * 8 + 27 * 3) + (144 + 36) * 72 * 6)


def test_what_looking_returns_goes_on_and_nothing_is_left_behind():
    program, x = trace(nets.settle(nets.Wild())), nets.images(2)
    before = program.module(x)
    seen = []

    def look(path, node, _, made):
        seen.append((path, node.name))
        return made * 2

    with looking(program.module, program.parts, look):
        changed = program.module(x)
    assert {path for path, _ in seen} == {"backbone", "head", "gate.conv"}
    assert not torch.equal(changed, before)
    assert torch.equal(program.module(x), before)
