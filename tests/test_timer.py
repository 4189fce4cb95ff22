import subprocess

import pytest
import torch
from torch import nn

from ghostify import GhostifyError
from ghostify.deployment.inference_form import deploy
from ghostify.timing import timer
from ghostify.timing.timer import LatencyTimer, export_for_timing, request_timings, start_worker, stop_worker
from tests import nets

OTHERS = pytest.mark.parametrize(
    "runtime", ["compile", "onnx", "openvino", pytest.param("aotinductor", marks=pytest.mark.slow)]
)


@OTHERS
def test_other_runtimes_tick_in_one_process_of_their_own(runtime):
    """Layers are written for timing only, whole models exported; the big one takes longer."""
    small, big = (nn.Conv2d(8, width, 3) for width in (1, 512))
    x = torch.zeros(2, 8, 48, 48)
    with LatencyTimer(runtime) as context:
        short, long = context.latencies_ms([deploy(m.eval(), x) for m in (small, big)], [x, x], rounds=3)
        assert 0 < short < long
        process = context.process
        deployed = deploy(nets.settle(nets.Residual()), nets.images(2))
        assert context.latencies_ms([deployed], [nets.images(2)], rounds=3)[0] > 0
        assert context.process is process
    assert process.poll() is not None


def test_eager_needs_no_process():
    with LatencyTimer() as context:
        short, long = context.latencies_ms(
            [nn.Identity(), nn.Conv2d(8, 512, 3)], [torch.zeros(2, 8, 48, 48)] * 2, rounds=3
        )
        assert 0 < short < long
        assert context.process is None


def test_what_a_runtime_refuses_is_said_and_the_process_goes_on(tmp_path):
    x = torch.zeros(1, 3, 8, 8)
    file = export_for_timing(deploy(nn.Conv2d(3, 4, 3).eval(), x), "onnx", x, tmp_path / "good")
    bad = tmp_path / "bad" / "model.onnx"
    bad.parent.mkdir()
    bad.write_bytes(b"none")
    process = start_worker("onnx", 1)
    try:
        with pytest.raises(GhostifyError, match=r"model\.onnx: cannot be timed \(.*\)\. Use another runtime"):
            request_timings(process, [bad], 1)
        assert len(request_timings(process, [file, file], 4)[1]) == 4
        process.kill()
        with pytest.raises(GhostifyError, match=r"cannot be timed \(its process ended"):
            request_timings(process, [file], 1)
    finally:
        stop_worker(process)


def test_runtimes_and_inputs_that_are_refused():
    with pytest.raises(GhostifyError, match=r"runtime 'tflite': is unknown\. Use eager, compile, onnx, openvino"):
        LatencyTimer("tflite")
    pytest.importorskip("onnxruntime")
    with LatencyTimer("onnx") as context, pytest.raises(GhostifyError, match="takes no keyword inputs"):
        context.latencies_ms([nn.Identity()], [{"x": torch.zeros(1)}])
    with LatencyTimer("onnx") as context, pytest.raises(GhostifyError, match=r"'onnx': is timed in float32. Convert"):
        context.latencies_ms([nn.Identity()], [torch.zeros(1, dtype=torch.bfloat16)])


def test_a_process_ends_with_its_context(monkeypatch):
    started = []

    def start(*_):
        started.append(subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[0]

    monkeypatch.setattr(timer, "start_worker", start)
    x = torch.zeros(1, 3, 8, 8)
    with pytest.raises(KeyError), LatencyTimer("onnx") as context:
        context.latencies_ms([deploy(nn.Conv2d(3, 4, 3).eval(), x)], [x])
    assert started[0].poll() is not None
