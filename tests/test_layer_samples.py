import pytest
import torch

from ghostify import GhostifyError, trace
from ghostify.fitting import patches
from ghostify.fitting.calibration import bind_calibration, holdout_mask
from ghostify.fitting.layer_samples import MAX_ROWS, LayerSamples, rows_for
from ghostify.fitting.lockstep import LockstepRun
from ghostify.planning.planner import plan
from ghostify.planning.policy import Policy, Rule
from tests import nets


def take_samples(x, overflow=False):
    """The `LayerSamples` of one convolution, and its samples batch by batch."""
    program = trace(nets.settle(nets.Straight()))
    (entry,) = plan(program, Policy((Rule(targets=("a.0",)),), keep_first=False)).rewrites
    batches = bind_calibration(program.module, x.split(8))
    lockstep = LockstepRun(program.module, batches.local_batches, {entry.conv.calls[0].node}, set())
    conv = lockstep.original.get_submodule("a.0")
    if overflow:
        lockstep.original.get_submodule("stem.0").weight.data.mul_(1e30)
    layer_samples, samples = LayerSamples(entry, lockstep, conv, torch.ones(entry.conv.outputs), len(x), seed=0), []
    with torch.no_grad():
        for node, states in lockstep.steps():
            samples += [layer_samples.take(node, state) for state in states]
    return layer_samples, samples


def test_targets_are_the_outputs_of_the_convolution_for_its_patches():
    layer_samples, samples = take_samples(nets.images(24))
    for sample in samples:
        outputs = sample.u @ patches.flatten_filters(layer_samples.conv).T.float()
        torch.testing.assert_close(outputs, sample.y, rtol=1e-3, atol=1e-4)


def test_moments_are_those_of_the_rows_and_an_eighth_of_the_images_is_in_the_holdout():
    layer_samples, samples = take_samples(nets.images(24))
    assert torch.equal(torch.cat([s.holdout for s in samples]), holdout_mask(torch.arange(24), 24))
    rows, holdout_rows = torch.cat([s.y for s in samples]).double(), torch.cat([s.holdout_rows for s in samples])
    assert layer_samples.moments.fitted.count + layer_samples.moments.holdout.count == len(rows)
    assert layer_samples.moments.holdout.count == holdout_rows.sum()
    torch.testing.assert_close(layer_samples.moments.fitted_rows.mean_y, rows[~holdout_rows].mean(0))


def test_values_that_are_not_finite_name_batch_and_layer():
    with pytest.raises(GhostifyError, match=r"calibration batch 0: a\.0 has values that are not finite"):
        take_samples(nets.images(8), overflow=True)


def test_more_features_take_fewer_rows_within_limits():
    assert rows_for(1, 10) == MAX_ROWS
    assert rows_for(10**6, 10) == 10
    assert 10 < rows_for(2000, 10, 0.5) < rows_for(2000, 10) < MAX_ROWS
