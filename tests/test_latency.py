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
def measured_counts(monkeypatch, tmp_path):
    """A clock that counts multiply-accumulates; the list of what was measured."""
    measured = []

    def count_as_latency(_, models, examples, _rounds=0):
        measured.append(len(models))
        return [float(count_macs(m, x)) for m, x in zip(models, examples, strict=True)]

    monkeypatch.setattr(LatencyTimer, "latencies_ms", count_as_latency)
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "cache"))
    return measured


def layer_latency(conv, conv_info, layouts, timer=None):
    return latency.layer_latency(conv, conv_info, layouts, timer or LatencyTimer())


def layer(size=12, name="a.0"):
    program = trace(nets.settle(nets.Straight()), nets.images(2, size))
    return program.conv(name), next(c for c in program.convolutions if c.name == name)


def test_each_form_is_measured_as_it_is_deployed(measured_counts):
    conv, conv_info = layer()
    positions = 2 * 12 * 12
    assert layer_latency(conv, conv_info, FORMS) == [
        positions * 16 * 8 * 9,
        positions * (8 * 8 * 9 + 8 * 9),
        positions * (4 * 8 * 9 + 4 * 16),  # few intrinsic maps: one more dense convolution
    ]
    assert measured_counts == [3]


def test_what_was_measured_is_kept_by_shape_and_layout(measured_counts, tmp_path):
    conv, conv_info = layer()
    first = layer_latency(conv, conv_info, FORMS[:2])
    assert layer_latency(conv, conv_info, FORMS[:2]) == first
    assert measured_counts == [2]
    layer_latency(conv, conv_info, FORMS)
    assert measured_counts == [2, 2]  # the new form, next to the original
    layer_latency(*layer(size=16), FORMS[:2])
    assert measured_counts == [2, 2, 2]
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
    timer = LatencyTimer()
    conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    facts = (
        "('Conv2d', 8, 16, (3, 3), (1, 1), (1, 1), 'zeros', (1, 1), 1, 2, 12, 11, "
        f"{text}, {torch.get_num_threads()}, {timer.version!r}, 'Some CPU')"
    )
    assert latency._key((conv, layout), (2, 8, 12, 11), timer) == hashlib.sha256(facts.encode()).hexdigest()[:24]


@pytest.mark.usefixtures("measured_counts")
def test_each_runtime_is_measured_for_itself():
    measured = []

    class Other(LatencyTimer):
        def latencies_ms(self, models, _examples, _rounds=0):
            measured.append(len(models))
            return [1.0] * len(models)

    pytest.importorskip("onnxruntime")
    conv, conv_info = layer()
    eager = layer_latency(conv, conv_info, FORMS)
    assert layer_latency(conv, conv_info, FORMS, Other("onnx")) == [1.0] * 3 != eager
    assert layer_latency(conv, conv_info, FORMS, Other("eager")) == eager
    assert measured == [3]


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"a": [1]}', '{"a": null}', "[" * 100_000])
def test_a_damaged_cache_is_replaced(measured_counts, content):
    latency.cache_file().parent.mkdir()
    latency.cache_file().write_text(content)
    assert layer_latency(*layer(), [None])[0] > 0
    assert measured_counts == [1]


@pytest.mark.usefixtures("measured_counts")
def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "file"))
    assert layer_latency(*layer(), [None])[0] > 0


def test_fewer_maps_are_measured_at_the_layers_own_size(measured_counts):
    """After a pooling, a convolution has fewer positions than before."""
    program = trace(nets.settle(nets.Inverted(16)), nets.images(2))
    conv_info = {conv.name: conv for conv in program.convolutions}
    for name, kept_counts in (
        ("expand.0", [(5, None), (None, 8)]),
        ("depthwise.0", [(5, 5)]),
        ("project.0", [(None, 5)]),
    ):
        conv, (call,) = program.conv(name), conv_info[name].calls
        per_map = cost.conv_macs(conv_info[name]) / conv.out_channels / (1 if conv.groups > 1 else conv.in_channels)
        positions = cost.total_positions(conv_info[name].calls)
        counts = [(m or conv.out_channels) * (1 if conv.groups > 1 else r or conv.in_channels) for m, r in kept_counts]
        whole = count_macs(conv, torch.zeros(call.input_shape))
        latencies_ms = latency.pruned_latency(conv, conv_info[name], kept_counts, LatencyTimer())
        assert latencies_ms == [whole, *(per_map * count * positions for count in counts)]
    assert measured_counts == [3, 2, 2]


def test_how_a_layer_pads_is_part_of_its_time(measured_counts):
    conv, conv_info = layer()
    for mode in ("zeros", "reflect"):
        conv.padding_mode = mode
        layer_latency(conv, conv_info, [None])
    assert measured_counts == [1, 1]


@pytest.mark.usefixtures("measured_counts")
def test_all_calls_count():
    program = trace(nets.settle(nets.Shared()), nets.images(1))
    conv_info = next(c for c in program.convolutions if len(c.calls) > 1)
    conv = program.conv(conv_info.name)
    of_one_call = count_macs(conv, nets.images(1).new_zeros(conv_info.calls[0].input_shape))
    assert layer_latency(conv, conv_info, [None])[0] >= len(conv_info.calls) * of_one_call > 0


@pytest.mark.usefixtures("measured_counts")
def test_models_are_measured_in_their_inference_form():
    model, x = nets.settle(nets.Residual()), nets.images(2)
    assert model_latency(trace(model, x), LatencyTimer()) == count_macs(model, x)
    assert interleaved_latency([model, model], x) == [count_macs(model, x)] * 2
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
