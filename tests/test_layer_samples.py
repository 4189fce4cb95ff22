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


def sampled(x, spoil=False):
    """The samples of one convolution, and those that it takes batch by batch."""
    program = trace(nets.settle(nets.Straight()))
    (entry,) = plan(program, Policy((Rule(targets=("a.0",)),), keep_first=False)).rewrites
    batches = bind_calibration(program.module, x.split(8))
    walk = LockstepRun(program.module, batches.local_batches, {entry.conv.calls[0].node}, set())
    conv = walk.original.get_submodule("a.0")
    if spoil:
        walk.original.get_submodule("stem.0").weight.data.mul_(1e30)
    samples, taken = LayerSamples(entry, walk, conv, torch.ones(entry.conv.outputs), len(x), seed=0), []
    with torch.no_grad():
        for node, arriving in walk.steps():
            taken += [samples.take(node, chunk) for chunk in arriving]
    return samples, taken


def test_rows_are_what_the_convolution_makes_of_its_patches():
    samples, taken = sampled(nets.images(24))
    for sample in taken:
        made = sample.u @ patches.flatten_filters(samples.conv).T.float()
        torch.testing.assert_close(made, sample.y, rtol=1e-3, atol=1e-4)


def test_moments_are_those_of_all_rows_and_every_eighth_image_is_held_out():
    samples, taken = sampled(nets.images(24))
    assert torch.equal(torch.cat([s.holdout for s in taken]), holdout_mask(torch.arange(24)))
    rows, held = torch.cat([s.y for s in taken]).double(), torch.cat([s.holdout_rows for s in taken])
    assert samples.moments.fitted.count + samples.moments.holdout.count == len(rows)
    assert samples.moments.holdout.count == held.sum()
    torch.testing.assert_close(samples.moments.all_rows.mean_y, rows.mean(0))


def test_values_that_are_not_finite_name_batch_and_layer():
    with pytest.raises(GhostifyError, match=r"calibration batch 0: a\.0 has values that are not finite"):
        sampled(nets.images(8), spoil=True)


def test_more_features_take_fewer_rows_within_limits():
    assert rows_for(1, 10) == MAX_ROWS
    assert rows_for(10**6, 10) == 10
    assert 10 < rows_for(2000, 10, 0.5) < rows_for(2000, 10) < MAX_ROWS
