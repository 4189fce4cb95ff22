"""The whole journey on a GPU, where there is one: it ends where the CPU's does."""

import pytest
import torch
from torch.utils.data import TensorDataset

from ghostify import GhostifyError, finetune, ghostify, load, save, trace, write_report
from ghostify.data.training_data import TrainingData
from ghostify.deployment.inference_form import deploy
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.reporting.redundancy import study_layer
from ghostify.timing.interleaved import interleaved_latency_ms
from ghostify.training.losses import distillation_loss
from ghostify.training.trainer import Recipe
from tests import nets

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
X = nets.images(64, 16)


@pytest.fixture
def exact(monkeypatch):
    """Convolutions in float32, not in TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(make):
    torch.manual_seed(0)
    return nets.settle(make()).cuda()


def devices(model):
    return {v.device.type for v in (*model.parameters(), *model.buffers())}


WISHES = [
    {},
    {"calibration": True},
    {"calibration": True, "cheap": "pointwise"},
    {"calibration": True, "cheap": 2, "activated": False},
    {"calibration": True, "activated": True},
    {"calibration": True, "cheap": "auto", "budget": {"macs": 0.7}},
    {"calibration": True, "cheap": "auto", "prune": True, "budget": {"macs": 0.6}},
    {"calibration": True, "reconstruct": True},
]


@pytest.mark.parametrize("wish", WISHES, ids=str)
@pytest.mark.parametrize("make", [nets.Residual, nets.Inverted, nets.Wild])
@pytest.mark.usefixtures("exact")
def test_conversion_is_that_of_the_cpu(make, wish):
    if make is nets.Wild and "reconstruct" in wish:
        pytest.skip("needs the whole graph")

    def converted(model, x):
        calibration = {"calibration": list(x.split(16))} if "calibration" in wish else {}
        return ghostify(model, **{**wish, **calibration}, example_inputs=x[:2])

    original = on_gpu(make)
    there = converted(original, X.cuda())
    here = converted(on_gpu(make).cpu(), X)
    assert devices(there) == {"cuda"}
    assert devices(original) == {"cuda"}
    if "reconstruct" not in wish and "budget" not in wish:  # where a rounding may not decide otherwise
        assert relative_error(predict(there, [X.cuda()]).cpu(), predict(here, [X])) < 1e-3
    reference = predict(original, [X.cuda()])
    lost, lost_here = (
        relative_error(predict(m, [x]).cpu(), reference.cpu()) for m, x in ((there, X.cuda()), (here, X))
    )
    assert lost < 1.5 * lost_here + 1e-3
    small = deploy(there, X[:2].cuda())
    assert devices(small) == {"cuda"}


def test_a_model_saved_there_loads_here_and_there(tmp_path):
    made = ghostify(on_gpu(nets.Residual), 2)
    save(made, tmp_path / "m")
    wanted = predict(made, [X.cuda()]).cpu()
    for device in ("cpu", "cuda"):
        loaded = load(tmp_path / "m", device=device)
        assert devices(loaded) == {device}
        torch.testing.assert_close(predict(loaded.eval(), [X.to(device)]).cpu(), wanted, rtol=1e-3, atol=1e-3)


def test_time_is_that_of_the_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path))
    wide, x = on_gpu(lambda: nets.Straight(256)), nets.images(32, 64).cuda()  # longer than its launches take
    made = ghostify(wide, cheap="auto", budget={"latency": 0.9}, example_inputs=x)
    before, after = interleaved_latency_ms([deploy(m, x) for m in (wide, made)], [x, x])
    assert after < 0.97 * before


def test_a_runtime_of_the_cpu_is_refused():
    pytest.importorskip("onnxruntime")
    with pytest.raises(GhostifyError, match="runtime 'onnx': is timed on the CPU"):
        ghostify(on_gpu(nets.Straight), budget={"latency": 0.8}, runtime="onnx", example_inputs=X.cuda())


def test_the_cheapest_that_is_good_enough():
    model = on_gpu(nets.Residual)
    wanted = predict(model, [X.cuda()])

    def evaluate(made):
        return -100 * relative_error(predict(made, [X.cuda()]), wanted)

    made = ghostify(
        model,
        cheap="auto",
        budget={"max_drop": 5},
        evaluate=evaluate,
        example_inputs=X[:2].cuda(),
        calibration=[X.cuda()],
    )
    assert -5 <= evaluate(made) < 0


def test_what_is_shown(tmp_path):
    pytest.importorskip("altair")
    model = on_gpu(lambda: nets.Straight(16))
    labels = predict(model, [X.cuda()]).argmax(1)
    made = ghostify(model, 2, example_inputs=X[:2].cuda(), calibration=[X.cuda()])
    images = list(X.cuda().split(16))
    file = write_report(
        made, tmp_path / "r.html", original=model, example_inputs=images[0], images=images, labels=labels
    )
    assert "agreement on 64 images" in file.read_text()


def test_a_study():
    found = study_layer(trace(on_gpu(lambda: nets.Straight(16)), X[:2].cuda()), "a.0", [X.cuda()])
    assert {v.device.type for v in (found.maps, found.ghost_maps, found.errors)} == {"cpu"}
    assert 0 < found.errors.median() < 1


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("wish", [{}, {"features": 0.1}, {"mixup": 0.2}, {"precision": "bf16", "ema": 0.9}])
def test_training_runs_there_and_gives_the_callers_device_back(wish, tmp_path):
    pytest.importorskip("accelerate")
    model = on_gpu(nets.Residual).cpu()
    with torch.no_grad():
        data = TrainingData(*(TensorDataset(v, model(v).argmax(1)) for v in (X.repeat(3, 1, 1, 1), X)), True)
    converted = ghostify(model, 2)
    recipe = Recipe(epochs=3, batch=16, learning_rate=0.05, weight_decay=0, **wish)
    tuned = finetune(converted, model, data, tmp_path / "t", recipe)
    assert devices(tuned) == {"cpu"}
    wanted = predict(model, [X])
    apart = [float(distillation_loss(predict(m, [X]), wanted)) for m in (tuned, converted)]
    assert apart[0] < apart[1]
