import hashlib
import json

import pytest
import torch
from torch import nn

from ghostify import trace
from ghostify.modules.layout import Depthwise, GhostLayout, Grouped, Pointwise
from ghostify.planning import cost
from ghostify.planning.cost import count_macs
from ghostify.timing import latency
from ghostify.timing.latency import interleaved_latency, model_latency
from ghostify.timing.timer import LatencyTimer
from tests import nets

FORMS = [None, GhostLayout(16, 8, Depthwise(3)), GhostLayout(16, 4, Pointwise())]


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """A clock that counts multiply-accumulates; the list of what was measured."""
    measured = []

    def milliseconds(_, models, examples, _rounds=0):
        measured.append(len(models))
        return [float(count_macs(m, x)) for m, x in zip(models, examples, strict=True)]

    monkeypatch.setattr(LatencyTimer, "latencies_ms", milliseconds)
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "cache"))
    return measured


def layer_milliseconds(conv, seen, layouts, clock=None):
    return latency.layer_latency(conv, seen, layouts, clock or LatencyTimer())


def layer(size=12, name="a.0"):
    program = trace(nets.settle(nets.Straight()), nets.images(2, size))
    return program.conv(name), next(c for c in program.convolutions if c.name == name)


def test_each_form_is_measured_as_it_is_deployed(clock):
    conv, seen = layer()
    positions = 2 * 12 * 12
    assert layer_milliseconds(conv, seen, FORMS) == [
        positions * 16 * 8 * 9,
        positions * (8 * 8 * 9 + 8 * 9),
        positions * (4 * 8 * 9 + 4 * 16),  # few intrinsic maps: one more dense convolution
    ]
    assert clock == [3]


def test_what_was_measured_is_kept_by_shape_and_layout(clock, tmp_path):
    conv, seen = layer()
    first = layer_milliseconds(conv, seen, FORMS[:2])
    assert layer_milliseconds(conv, seen, FORMS[:2]) == first
    assert clock == [2]
    layer_milliseconds(conv, seen, FORMS)
    assert clock == [2, 2]  # the new one, beside the original
    layer_milliseconds(*layer(size=16), FORMS[:2])
    assert clock == [2, 2, 2]
    (file,) = (tmp_path / "cache").iterdir()
    assert len(json.loads(file.read_text())) == 5


@pytest.mark.parametrize(
    ("layout", "text"),
    [
        (None, "None"),
        (GhostLayout(16, 8, Depthwise(3)), "Layout(outputs=16, intrinsic=8, width=1, dw_size=3)"),
        (GhostLayout(16, 8, Grouped(4, 3)), "Layout(outputs=16, intrinsic=8, width=4, dw_size=3)"),
        (GhostLayout(16, 8, Pointwise()), "Layout(outputs=16, intrinsic=8, width=8, dw_size=1)"),
    ],
)
def test_the_keys_on_disk_stay_what_they_were(layout, text, monkeypatch):
    """Whatever the classes are called, so that what was measured once is found again."""
    monkeypatch.setattr(latency, "processor", lambda: "Some CPU")
    clock = LatencyTimer()
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    facts = (
        "('Conv2d', 8, 16, (3, 3), (1, 1), (1, 1), 'zeros', (1, 1), 1, 2, 12, 11, "
        f"{text}, {torch.get_num_threads()}, {clock.version!r}, 'Some CPU')"
    )
    assert latency._key((conv, layout), (2, 8, 12, 11), clock) == hashlib.sha256(facts.encode()).hexdigest()[:24]


@pytest.mark.usefixtures("clock")
def test_each_runtime_is_measured_for_itself():
    measured = []

    class Other(LatencyTimer):
        def latencies_ms(self, models, _examples, _rounds=0):
            measured.append(len(models))
            return [1.0] * len(models)

    pytest.importorskip("onnxruntime")
    conv, seen = layer()
    eager = layer_milliseconds(conv, seen, FORMS)
    assert layer_milliseconds(conv, seen, FORMS, Other("onnx")) == [1.0] * 3 != eager
    assert layer_milliseconds(conv, seen, FORMS, Other("eager")) == eager
    assert measured == [3]


@pytest.mark.parametrize("content", ["", "[1]", "{"])
def test_a_damaged_cache_is_begun_anew(clock, content):
    latency.cache_file().parent.mkdir()
    latency.cache_file().write_text(content)
    assert layer_milliseconds(*layer(), [None])[0] > 0
    assert clock == [1]


@pytest.mark.usefixtures("clock")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "file"))
    assert layer_milliseconds(*layer(), [None])[0] > 0


def test_fewer_maps_are_measured_at_the_layers_own_size(clock):
    """Behind a pooling, a convolution has fewer positions than the one before it."""
    program = trace(nets.settle(nets.Inverted(16)), nets.images(2))
    seen = {conv.name: conv for conv in program.convolutions}
    for name, ways in (("expand.0", [(5, None), (None, 8)]), ("depthwise.0", [(5, 5)]), ("project.0", [(None, 5)])):
        conv, (call,) = program.conv(name), seen[name].calls
        per_map = cost.conv_macs(seen[name]) / conv.out_channels / (1 if conv.groups > 1 else conv.in_channels)
        positions = cost.total_positions(seen[name].calls)
        counts = [(m or conv.out_channels) * (1 if conv.groups > 1 else r or conv.in_channels) for m, r in ways]
        whole = count_macs(conv, torch.zeros(call.input_shape))
        taken = latency.pruned_latency(conv, seen[name], ways, LatencyTimer())
        assert taken == [whole, *(per_map * count * positions for count in counts)]
    assert clock == [3, 2, 2]


def test_how_a_layer_pads_is_part_of_its_time(clock):
    conv, seen = layer()
    for mode in ("zeros", "reflect"):
        conv.padding_mode = mode
        layer_milliseconds(conv, seen, [None])
    assert clock == [1, 1]


@pytest.mark.usefixtures("clock")
def test_all_calls_count():
    program = trace(nets.settle(nets.Shared()), nets.images(1))
    seen = next(c for c in program.convolutions if len(c.calls) > 1)
    conv = program.conv(seen.name)
    one = count_macs(conv, nets.images(1).new_zeros(seen.calls[0].input_shape))
    assert layer_milliseconds(conv, seen, [None])[0] >= len(seen.calls) * one > 0


@pytest.mark.usefixtures("clock")
def test_models_are_measured_in_their_inference_form():
    model, x = nets.settle(nets.Residual()), nets.images(2)
    assert model_latency(trace(model, x), LatencyTimer()) == count_macs(model, x)
    assert interleaved_latency([model, model], x) == [count_macs(model, x)] * 2
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
