import pytest
import torch
from torch import fx, nn

from ghostify import trace
from ghostify.fitting.calibration import bind_calibration
from ghostify.fitting.lockstep import LockstepRun
from tests import nets


def convolutions(module):
    modules = dict(module.named_modules(remove_duplicate=False))
    return {
        n.name for n in module.graph.nodes if n.op == "call_module" and isinstance(modules.get(n.target), nn.Conv2d)
    }


class Inputs(fx.Interpreter):
    """What each of the named nodes reads first."""

    def __init__(self, module, names):
        super().__init__(module)
        self.names, self.found = names, {}

    def run_node(self, n):
        if n.name in self.names:
            self.found[n.name] = self.env[n.all_input_nodes[0]].clone()
        return super().run_node(n)


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["in files", "in memory"])
@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_both_sides_see_what_their_models_see(make, limit):
    model, x = nets.settle(make()), nets.images(6)
    program = trace(model)
    stops = convolutions(program.module)
    walk = LockstepRun(
        program.module, bind_calibration(program.module, x.split(4)).local_batches, stops, set(), limit=limit
    )
    seen, done = {}, set()
    with torch.no_grad():
        for node, arriving in walk.steps():
            for chunk in arriving:
                source = node.all_input_nodes[0]
                seen[node.name, chunk.batch.first] = chunk.original[source].clone(), chunk.value(source).clone()
            if node.target not in done:
                walk.converted.get_submodule(node.target).weight.mul_(1.1)
                done.add(node.target)
        for side, module in enumerate((walk.original, walk.converted)):
            for chunk in walk.states:
                running = Inputs(module, stops)
                running.run(*chunk.batch.inputs.values, enable_io_processing=False)
                assert set(running.found) == stops
                for name, value in running.found.items():
                    torch.testing.assert_close(seen[name, chunk.batch.first][side], value)


def test_only_what_is_still_read_is_kept():
    model = nets.settle(nets.Straight())
    program = trace(model)
    walk = LockstepRun(
        program.module,
        bind_calibration(program.module, nets.images(4)).local_batches,
        convolutions(program.module),
        set(),
    )
    with torch.no_grad():
        for _, arriving in walk.steps():
            for chunk in arriving:
                assert len(chunk.original) <= 2
                assert len(chunk.converted) <= 2
