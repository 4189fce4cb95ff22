from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ghostify import GhostifyError
from ghostify.fitting import assignment, ghost_fit, lstsq
from ghostify.modules.ghost import build_ghost_module
from ghostify.modules.layout import (
    Depthwise,
    GhostLayout,
    Grouped,
    Pointwise,
    form_of,
    intrinsic_count,
    make_layout,
    may_read_activated,
    round_up_width,
)
from ghostify.planning import cost
from ghostify.reporting.outcome import outcome_of
from ghostify.search.loss_estimator import LossEstimator
from ghostify.summary import LayerReport


@st.composite
def layouts(draw):
    """Layouts of every form, the border cases between them included."""
    outputs = draw(st.integers(2, 24))
    intrinsic = draw(st.integers(1, outputs - 1))
    width = round_up_width(outputs, intrinsic, draw(st.sampled_from([1, 2, 3, 4, intrinsic])))
    return GhostLayout.of_width(outputs, intrinsic, width, draw(st.sampled_from([1, 3, 5])))


@pytest.mark.parametrize(
    ("outputs", "ratio", "maps"), [(64, 2, 32), (65, 2, 33), (64, 3, 22), (64, 1.5, 43), (30, 1.2, 25)]
)
def test_the_number_of_intrinsic_maps_is_rounded_up(outputs, ratio, maps):
    assert intrinsic_count(outputs, ratio) == maps


@given(st.integers(2, 40), st.data())
def test_a_rounded_width_is_the_smallest_that_divides_evenly(outputs, data):
    intrinsic = data.draw(st.integers(1, outputs - 1))
    width = data.draw(st.integers(1, intrinsic))

    def divides(w):
        return intrinsic % w == 0 and (outputs - intrinsic) % (intrinsic // w) == 0

    feasible = [w for w in range(width, intrinsic + 1) if w == 1 or divides(w)]
    assert round_up_width(outputs, intrinsic, width) == feasible[0]


@given(layouts())
def test_every_ghost_is_computed_once_and_groups_have_equal_shares(layout):
    specs = layout.conv_specs
    assert sum(spec.outputs for spec in specs) == layout.ghosts == sum(layout.capacities)
    assert all((spec.stop - spec.start) % spec.groups == spec.outputs % spec.groups == 0 for spec in specs)
    assert len(layout.capacities) * layout.kernel_shape[0] == layout.intrinsic
    assert max(layout.capacities) - min(layout.capacities) <= 1


@given(layouts(), st.booleans())
@settings(deadline=None)
def test_the_built_module_has_the_layouts_outputs_cost_and_parameters(layout, bias):
    conv, x = nn.Conv2d(3, layout.outputs, 3, bias=bias), torch.randn(2, 3, 7, 6)
    ghost = build_ghost_module(conv, layout)
    assert ghost(x).shape == conv(x).shape
    with FlopCounterMode(display=False) as counter:
        ghost(x)
    per_position = layout.intrinsic * 3 * 9 + layout.macs_per_position
    assert counter.get_total_flops() // 2 == 2 * 5 * 4 * per_position
    assert cost.count_parameters(ghost) == per_position + bias * layout.outputs
    kernels = [conv.weight.shape[1:] for conv in ghost.cheap_convs]
    assert set(kernels) == {layout.kernel_shape}


@given(layouts())
@settings(deadline=None)
def test_the_layout_follows_from_the_module_and_from_the_stored_numbers(layout):
    assert build_ghost_module(nn.Conv2d(3, layout.outputs, 3), layout).layout == layout
    outputs, intrinsic, width, kernel_size = layout.to_dict().values()
    assert GhostLayout.of_width(outputs, intrinsic, width, kernel_size) == layout


def test_the_stored_numbers_of_a_layout():
    stored = GhostLayout(16, 8, Grouped(4, 3)).to_dict()
    assert stored == {"outputs": 16, "intrinsic": 8, "width": 4, "dw_size": 3}


def test_the_forms_against_sums_by_hand():
    """Ghosts of maps 1, 2, 3, 4 (constant, inside the border) by kernels of ones."""
    for form, ghosts in (
        (Depthwise(3), [9, 18, 27, 36]),
        (Grouped(2, 3), [27, 27, 63, 63]),
        (Grouped(4, 3), [90, 90, 90, 90]),
        (Pointwise(), [10, 10, 10, 10]),
    ):
        ghost = build_ghost_module(nn.Conv2d(1, 8, 1, bias=False), GhostLayout(8, 4, form))
        ghost.primary_conv.weight.data = torch.arange(1.0, 5)[:, None, None, None]
        for conv in ghost.cheap_convs:
            nn.init.ones_(conv.weight)
        assert ghost(torch.ones(1, 1, 3, 3))[0, :, 1, 1].tolist() == [1, 2, 3, 4, *ghosts]


@pytest.mark.parametrize(
    ("cheap", "layout"),
    [
        (nn.Conv2d(4, 4, (1, 3), padding=(0, 1)), None),
        (nn.Conv2d(2, 4, 1), None),
        (nn.Identity(), None),
        (nn.Conv2d(4, 3, 1), GhostLayout(7, 4, Pointwise())),
    ],
    ids=["oblong kernels", "other maps", "no convolution", "another layout"],
)
def test_the_layout_of_a_module_is_that_of_its_present_convolutions(cheap, layout):
    ghost = build_ghost_module(nn.Conv2d(3, 8, 3), GhostLayout(8, 4, Grouped(2, 3)))
    ghost.cheap_operation = cheap
    assert ghost.layout == layout


@pytest.mark.parametrize(
    ("outputs", "intrinsic", "form", "message"),
    [
        (8, 8, Depthwise(3), "no ghosts"),
        (8, 0, Depthwise(3), "no intrinsic maps"),
        (8, 4, Depthwise(2), "odd kernel size"),
        (8, 4, Grouped(0, 3), "width of at least 1"),
        (8, 4, Grouped(3, 3), "do not divide the maps evenly"),
        (8, 4, Grouped(8, 3), "do not divide the maps evenly"),
        (9, 4, Grouped(2, 3), "do not divide the maps evenly"),
        (8, 4, Grouped(1, 3), r"Use Depthwise\(kernel_size=3\)"),
        (8, 4, Grouped(4, 1), r"Use Pointwise\(\)"),
        (8, 1, Pointwise(), r"Use Depthwise\(kernel_size=1\)"),
    ],
)
def test_layouts_that_build_no_module_or_have_a_simpler_form_are_errors(outputs, intrinsic, form, message):
    with pytest.raises(GhostifyError, match=message):
        GhostLayout(outputs, intrinsic, form)


@given(layouts())
def test_low_rank_is_one_pixel_of_all_intrinsic_maps(layout):
    assert layout.is_low_rank == (layout.kernel_shape == (layout.intrinsic, 1, 1))
    assert isinstance(layout.form, Pointwise) == (layout.is_low_rank and layout.intrinsic > 1)
    assert form_of(layout.intrinsic, *layout.kernel_shape[:2]) == layout.form


@dataclass(frozen=True)
class UnknownForm:
    """A form that no `match` handles."""


def layout_of_unknown_form():
    layout = GhostLayout(8, 4, Depthwise(3))
    object.__setattr__(layout, "form", UnknownForm())
    return layout


class LayerReportOfUnknownForm(LayerReport):
    form = UnknownForm()


LAYER_REPORT = LayerReport("a", "Conv2d", (8, 3, 3, 3), None, None, 4, 1, 3, False, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "decide",
    [
        lambda layout: layout.kernel_shape,
        lambda layout: layout.conv_specs,
        lambda layout: layout.is_low_rank,
        lambda layout: layout.to_dict(),
        lambda layout: replace(layout),
        lambda layout: may_read_activated(layout.form),
        lambda layout: assignment.assign_ghosts(torch.rand(8, 8), layout),
        lambda layout: ghost_fit.has_many_maps(layout),
        lambda layout: LossEstimator(None, 3).of(layout),
        lambda layout: LossEstimator(None, 3).lower_bound(layout),
        lambda _: outcome_of(LayerReportOfUnknownForm(**LAYER_REPORT.__dict__)),
    ],
)
def test_an_unknown_form_is_an_error(decide):
    with pytest.raises(AssertionError, match="UnknownForm"):
        decide(layout_of_unknown_form())


def test_an_unknown_form_is_an_error_in_the_solver(monkeypatch):
    """Even after its channels were grouped."""
    monkeypatch.setattr(lstsq, "pair_costs", lambda *_: None)
    monkeypatch.setattr(lstsq, "assign_ghosts", lambda *_: None)
    with pytest.raises(AssertionError, match="UnknownForm"):
        lstsq.solve_ghosts(None, layout_of_unknown_form(), torch.eye(8))


def test_pruned_and_skipped_layers_have_no_form():
    assert LAYER_REPORT.layout == GhostLayout(8, 4, Depthwise(3))
    assert not LAYER_REPORT.is_pruned
    pruned = replace(LAYER_REPORT, width=0, dw_size=0, intrinsic=5, kept_out_count=5, kept_in_count=3)
    assert (pruned.form, pruned.layout, pruned.is_pruned) == (None, None, True)
    skipped = replace(LAYER_REPORT, width=0, dw_size=0, intrinsic=8, skip_reason="not targeted by any rule")
    assert (skipped.form, skipped.is_pruned) == (None, False)
    assert [outcome_of(x) for x in (LAYER_REPORT, pruned, skipped)] == ["depthwise ghosts", "pruned", "skipped"]
    wider, pointwise = replace(LAYER_REPORT, width=2), replace(LAYER_REPORT, width=4, dw_size=1)
    assert outcome_of(wider) == outcome_of(pointwise) == "wider ghosts"


@pytest.mark.parametrize(
    ("intrinsic", "cheap", "form"),
    [
        (8, "depthwise", Depthwise(3)),
        (8, 1, Depthwise(3)),
        (8, "pointwise", Pointwise()),
        (1, "pointwise", Depthwise(1)),
        (8, 4, Grouped(4, 3)),
        (8, 3, Grouped(4, 3)),
        (8, 99, Grouped(8, 3)),
        (1, 99, Depthwise(3)),
    ],
)
def test_the_form_that_cheap_names(intrinsic, cheap, form):
    assert make_layout(16, intrinsic, cheap, 3) == GhostLayout(16, intrinsic, form)


def test_auto_is_not_one_form():
    with pytest.raises(GhostifyError, match="cheap 'auto': is not one form"):
        make_layout(16, 8, "auto", 3)
