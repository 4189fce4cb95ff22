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
    """The first input of each of the named nodes."""

    def __init__(self, module, names):
        super().__init__(module)
        self.names, self.inputs = names, {}

    def run_node(self, n):
        if n.name in self.names:
            self.inputs[n.name] = self.env[n.all_input_nodes[0]].clone()
        return super().run_node(n)


@pytest.mark.parametrize("limit", [0, 1 << 30], ids=["in files", "in memory"])
@pytest.mark.parametrize("make", nets.ALL, ids=lambda c: c.__name__)
def test_both_models_get_the_inputs_of_a_separate_run(make, limit):
    model, x = nets.settle(make()), nets.images(6)
    program = trace(model)
    stops = convolutions(program.module)
    lockstep = LockstepRun(
        program.module, bind_calibration(program.module, x.split(4)).local_batches, stops, set(), limit=limit
    )
    recorded, changed = {}, set()
    with torch.no_grad():
        for node, states in lockstep.steps():
            for state in states:
                source = node.all_input_nodes[0]
                recorded[node.name, state.batch.first] = state.original[source].clone(), state.value(source).clone()
            if node.target not in changed:
                lockstep.converted.get_submodule(node.target).weight.mul_(1.1)
                changed.add(node.target)
        for k, module in enumerate((lockstep.original, lockstep.converted)):
            for state in lockstep.states:
                interpreter = Inputs(module, stops)
                interpreter.run(*state.batch.inputs.values, enable_io_processing=False)
                assert set(interpreter.inputs) == stops
                for name, value in interpreter.inputs.items():
                    torch.testing.assert_close(recorded[name, state.batch.first][k], value)


def test_only_values_that_are_still_read_are_kept():
    model = nets.settle(nets.Straight())
    program = trace(model)
    lockstep = LockstepRun(
        program.module,
        bind_calibration(program.module, nets.images(4)).local_batches,
        convolutions(program.module),
        set(),
    )
    with torch.no_grad():
        for _, states in lockstep.steps():
            for state in states:
                assert len(state.original) <= 2
                assert len(state.converted) <= 2
