"""Training with Accelerate, here in one or two processes on the CPU."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from ghostify import GhostifyError, ghostify
from ghostify.data.training_data import TrainingData
from ghostify.evaluation.metrics import predict
from ghostify.training import optimizer, run_folder, trainer
from ghostify.training.losses import distillation_loss
from ghostify.training.trainer import Recipe, finetune
from tests import nets
from tests.command import run_code, run_pair

pytest.importorskip("accelerate")
pytestmark = pytest.mark.filterwarnings("default")  # warnings of Accelerate and TensorBoard
ROOT = Path(__file__).parent.parent
QUICK = Recipe(epochs=3, batch=16, learning_rate=0.05, save_every=3, weight_decay=0)


def training_setup(labelled=True, make=nets.Residual):
    torch.manual_seed(0)
    model = nets.settle(make())
    x, y = nets.images(160), nets.images(32, seed=9)
    labels = [model(v).argmax(1) if labelled else torch.full((len(v),), -1) for v in (x, y)]
    data = TrainingData(TensorDataset(x, labels[0]), TensorDataset(y, labels[1]), labelled)
    return model, ghostify(model, 2), data, y


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"features": 0.1},
        {"labels": 1.0, "distill": 0.0, "smoothing": 0.1},
        {"mixup": 0.2, "cutmix": 0.5, "labels": 0.5},
        {"mixup": 0.2, "features": 0.1},
        {"ema": 0.9, "clip": 1.0, "optimizer": "adamw", "learning_rate": 0.005},
        {"precision": "bf16", "frozen_norms": True},
    ],
    ids=str,
)
def test_training_brings_the_outputs_nearer_to_the_original(changes, tmp_path):
    model, converted, data, test = training_setup()
    before = {k: v.clone() for k, v in converted.state_dict().items()}
    tuned = finetune(converted, model, data, tmp_path / "t", Recipe(**{**vars(QUICK), **changes}))
    assert all(torch.equal(v, before[k]) for k, v in converted.state_dict().items())
    expected = predict(model, [test])
    distances = [float(distillation_loss(predict(m, [test]), expected)) for m in (converted, tuned)]
    assert "labels" in changes or distances[1] < 0.5 * distances[0]
    lines = metrics(tmp_path / "t")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert lines[-1]["step"] == 30
    assert "validation" in lines[-1]
    assert list((tmp_path / "t" / "tensorboard").iterdir())


def test_unlabelled_images_suffice(tmp_path):
    model, converted, data, _ = training_setup(labelled=False)
    running = set(threading.enumerate())
    tuned = finetune(converted, model, data, tmp_path, QUICK)
    assert not [t for t in set(threading.enumerate()) - running if "Writer" in type(t).__name__]
    assert set(tuned.state_dict()) == set(converted.state_dict())
    with pytest.raises(GhostifyError, match="the training images have none"):
        finetune(converted, model, data, tmp_path, Recipe(labels=1))


class KilledError(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "optimizer": "adamw", "mixup": 0.1}], ids=str)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(changes, tmp_path):
    recipe = Recipe(**{**vars(QUICK), **changes})
    model, converted, data, _ = training_setup()
    uninterrupted = finetune(converted, model, data, tmp_path / "whole", recipe)

    def interrupt(step, _, __):
        if step in (2, 11, 12, 25):
            raise KilledError

    steps = set()
    for _ in range(9):
        try:
            resumed = finetune(
                converted, model, data, tmp_path / "parts", recipe,
                on_progress=lambda s, a, b: None if s in steps else (steps.add(s), interrupt(s, a, b)),
            )  # fmt: skip
            break
        except KilledError:
            continue
    assert {2, 11, 12, 25} <= steps
    assert all(torch.equal(v, uninterrupted.state_dict()[k]) for k, v in resumed.state_dict().items())
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert len(list((tmp_path / "parts").glob("state-*"))) == 1
    again = finetune(
        converted, model, data, tmp_path / "parts", recipe, on_progress=lambda *_: pytest.fail("nothing is left")
    )
    assert all(torch.equal(v, uninterrupted.state_dict()[k]) for k, v in again.state_dict().items())


def test_training_ends_after_evaluations_without_a_gain(tmp_path):
    model, converted, data, _ = training_setup()
    steps = []
    recipe = Recipe(**{**vars(QUICK), "epochs": 20, "learning_rate": 1e-9, "patience": 2})
    finetune(converted, model, data, tmp_path, recipe, on_progress=lambda step, *_: steps.append(step))
    assert steps[-1] == 30  # the first evaluation, and two without a gain


def test_a_folder_of_another_run_is_refused(tmp_path):
    model, converted, data, _ = training_setup()
    finetune(converted, model, data, tmp_path / "t", QUICK)
    with pytest.raises(GhostifyError, match="belongs to a run with different epochs, learning_rate"):
        finetune(converted, model, data, tmp_path / "t", Recipe(**{**vars(QUICK), "epochs": 1, "learning_rate": 1.0}))
    with pytest.raises(GhostifyError, match="belongs to a run with different model"):
        finetune(ghostify(model, 4), model, data, tmp_path / "t", QUICK)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    with pytest.raises(GhostifyError, match="holds files that are not of a training run"):
        finetune(converted, model, data, tmp_path / "other", QUICK)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "recipe: epochs 0: is not a positive number"),
        ({"precision": "int8"}, "precision 'int8': is unknown. Use no, bf16, fp16"),
        ({"distill": 0}, "distill, features and labels are all 0"),
        ({"batch": 5, "mixup": 0.5}, "mixup, cutmix: mix images in pairs, a batch of 5 is odd"),
        ({"batch": 1000}, "batch 1000 is more than the 160 training images"),
    ],
)
def test_invalid_recipes_are_refused(changes, message, tmp_path):
    model, converted, data, _ = training_setup()
    with pytest.raises(GhostifyError, match=message):
        finetune(converted, model, data, tmp_path, Recipe(**changes))


def test_another_accelerator_s_precision_is_named(tmp_path):
    model, converted, data, _ = training_setup()
    finetune(converted, model, data, tmp_path / "a", QUICK)
    with pytest.raises(GhostifyError, match="precision is 'bf16', this process has an Accelerator of another one"):
        finetune(converted, model, data, tmp_path / "b", Recipe(precision="bf16"))
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    finetune(converted, model, data, tmp_path / "b", Recipe(precision="bf16", batch=16), accelerator=accelerator)


def test_features_need_the_original_s_modules(tmp_path):
    _, converted, data, _ = training_setup()
    with pytest.raises(GhostifyError, match="the original has no such module"):
        finetune(converted, nn.Sequential(nn.Flatten(), nn.Linear(432, 5)), data, tmp_path, Recipe(features=1.0))


def test_a_training_that_diverges_ends_with_the_last_good_state(tmp_path):
    model, converted, data, _ = training_setup()
    with pytest.raises(
        GhostifyError, match=r"finetune: \w+ is (nan|inf) at step \d+\. Lower the learning rate"
    ) as caught:
        finetune(converted, model, data, tmp_path, Recipe(**{**vars(QUICK), "learning_rate": 1e30, "save_every": 1}))
    assert "\n" not in str(caught.value)
    assert all(v == v for line in metrics(tmp_path) for v in line.values())
    for file in tmp_path.glob("state-*/model.safetensors"):
        assert all(v.isfinite().all() for v in load_file(file).values())


def test_a_full_disk_at_the_first_evaluation_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    model, converted, data, _ = training_setup()
    monkeypatch.setattr(run_folder, "write_tensors", fail)
    with pytest.raises(GhostifyError, match=r"best\.safetensors: cannot be written \(No space left on device\)"):
        finetune(converted, model, data, tmp_path / "t", Recipe(**{**vars(QUICK), "save_every": 100}))
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("broken", ["weight", "metric"])
def test_results_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, broken):
    model, converted, data, _ = training_setup()

    def evaluate(training):
        if broken == "metric":
            return float("nan"), 0.0
        next(training.student.parameters()).data.fill_(float("inf"))
        return 50.0, 0.0

    monkeypatch.setattr(trainer._Training, "evaluate", evaluate)
    with pytest.raises(GhostifyError, match="validation is nan" if broken == "metric" else "holds NaN or infinity"):
        finetune(converted, model, data, tmp_path, QUICK)
    assert not list(tmp_path.glob("state-00000001*"))
    assert not (tmp_path / "best.safetensors").exists()


SCRIPT = """
import sys, torch
from tests.test_trainer import QUICK, nets, training_setup
from ghostify import Recipe, finetune
model, converted, data, test = training_setup(make=getattr(nets, sys.argv[3]))
recipe = Recipe(**{**vars(QUICK), "frozen_norms": True, "epochs": float(sys.argv[2])})
tuned = finetune(converted, model, data, sys.argv[1], recipe)
torch.save(tuned.state_dict(), sys.argv[1] + "/tuned.pt")
"""


def start(folder, epochs):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, str(folder), str(epochs), "Residual"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_two_processes_train_as_one_does(tmp_path):
    network = "Straight"  # without random depth
    results = [run_code(SCRIPT, tmp_path / "one", 3, network, cwd=ROOT)]
    results += run_pair(SCRIPT, tmp_path / "two", 3, network, cwd=ROOT)
    assert [process.returncode for process in results] == [0, 0, 0], results
    one, two = (metrics(tmp_path / name) for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        assert all(a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6) for key in a)


@pytest.mark.slow
def test_twenty_kills_lose_nothing(tmp_path):
    """The processes are killed at random times; the result is that of an uninterrupted run."""
    generator = torch.Generator().manual_seed(0)
    whole = start(tmp_path / "whole", epochs=60)
    started = time.monotonic()
    assert whole.wait() == 0, whole.stderr.read()
    whole.stderr.close()
    duration, kills = time.monotonic() - started, 0
    while kills < 20:
        process = start(tmp_path / "parts", epochs=60)
        try:
            process.wait(5 + float(torch.rand((), generator=generator)) * duration / 8)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        process.stderr.close()
        if process.returncode == 0:
            break
    last = start(tmp_path / "parts", epochs=60)
    assert last.wait() == 0, last.stderr.read()
    last.stderr.close()
    a, b = (torch.load(tmp_path / name / "tuned.pt") for name in ("whole", "parts"))
    assert kills >= 10
    assert all(torch.equal(v, b[k]) for k, v in a.items())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "parts")


X, LABELS = nets.images(), torch.zeros(8)
GOOD, ONE_CHANNEL = TensorDataset(X, LABELS), TensorDataset(X[:, :1], LABELS)
NONE, LABEL_99 = TensorDataset(X[:0], LABELS[:0]), TensorDataset(X, torch.full((8,), 99))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((ONE_CHANNEL, ONE_CHANNEL, False), r"data: .* does not run on its images"),
        ((GOOD, NONE, False), "data: has no validation images"),
        (([1, 2, 3, 4], [1], False), r"data: a training image is 1\. Let the dataset return \(image, label\)"),
        ((LABEL_99, GOOD, True), "data: has label 99, the model has 5 classes"),
    ],
)
def test_data_that_the_models_cannot_be_trained_on_is_refused(data, message, tmp_path):
    model = nets.settle(nets.Straight())
    with pytest.raises(GhostifyError, match=message):
        finetune(ghostify(model), model, TrainingData(*data), tmp_path / "t", Recipe(batch=4, labels=float(data[2])))


def test_an_original_with_other_outputs_is_refused(tmp_path):
    _, converted, data, _ = training_setup()
    with pytest.raises(GhostifyError, match=r"original: its outputs are \[\(1, 10, 12, 12\)\], those of the model"):
        finetune(converted, nets.settle(nets.Branches()), data, tmp_path / "t", QUICK)


def test_labels_beyond_the_classes_are_refused_before_the_training(tmp_path):
    model, converted, data, _ = training_setup()
    with pytest.raises(GhostifyError, match=r"^photos: has label 5, the model has 5 classes, counted from 0\."):
        finetune(converted, model, replace(data, name="photos", classes=6), tmp_path / "t", QUICK)
    assert not (tmp_path / "t").exists()


def test_an_optimizer_that_this_machine_lacks_is_refused(tmp_path, monkeypatch):
    def create(*_, **__):
        raise AssertionError("needs another package")

    monkeypatch.setattr(optimizer, "create_optimizer_v2", create)
    model, converted, data, _ = training_setup()
    with pytest.raises(GhostifyError, match=r"optimizer 'sgd': cannot be used here \(needs another package\)"):
        finetune(converted, model, data, tmp_path / "t", QUICK)
