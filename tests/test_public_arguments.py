"""Every argument of every public function and class with values of every kind: accepted, or refused in one line."""

import inspect
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import ghostify
from ghostify import GhostifyError, Policy, Recipe, Rule
from tests import nets

VALUES = {
    "None": None,
    "text": "text",
    "no text": "",
    "true": True,
    "zero": 0,
    "one": 1,
    "five": 5,
    "negative": -3,
    "fraction": 0.5,
    "1.5": 1.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "huge": 2**80,
    "digits": 10**5000,
    "numpy integer": np.int64(3),
    "numpy float": np.float32(2.5),
    "numpy bool": np.bool_(True),
    "array": np.zeros((2, 2)),
    "no list": [],
    "list of numbers": [1, 2],
    "list of texts": ["stem.0"],
    "list of None": [None],
    "nested list": [[[]]],
    "no dict": {},
    "dict": {"macs": 0.5},
    "dict of numbers": {1: 2},
    "object": object(),
    "bytes": b"bytes",
    "python module": torch,
    "class": nn.Conv2d,
    "function": lambda name, module: True,  # noqa: ARG005
    "function of nothing": lambda: 0,
    "generator": None,  # each row makes a new one
    "tensor": torch.zeros(2),
    "image": torch.zeros(1, 3, 8, 8),
    "module": nn.Conv2d(3, 8, 3),
    "state": nn.Conv2d(3, 8, 3).state_dict(),
    "exception": ValueError("a\nb"),
}
NUMBERS = {"one", "five", "1.5", "huge", "numpy integer", "numpy float"}
COUNTS = frozenset({"one", "five", "numpy integer"})
POSITIVE = frozenset({"fraction", *NUMBERS})
NOT_NEGATIVE = frozenset({"zero", *POSITIVE})
SEEDS = {"zero", *COUNTS}
FLAGS = {"true", "numpy bool"}
PATTERNS = {"no list", "list of texts", "function"}
PATHS = {"text"}
CALLBACKS = {"None"}

ACCEPTED = {
    "ghostify": {
        "model": {"module"},
        "ratio": {"None", *NUMBERS},
        "dw_size": COUNTS,
        "cheap": COUNTS,
        "activated": FLAGS,
        "prune": set(),
        "targets": {"None", *PATTERNS},
        "ignore": {"None", *PATTERNS},
        "policy": {"None"},
        "budget": {"None", "dict"},
        "example_inputs": {"None", "image"},
        "calibration": {"None", "image"},
        "evaluate": {"None"},
        "importance": CALLBACKS,
        "runtime": set(),
        "reconstruct": set(),
        "heal": {"None"},
        "seed": SEEDS,
        "on_progress": CALLBACKS,
    },
    "trace": {"model": {"module"}, "example_inputs": {"None", "image"}},
    "plan": {"program": set(), "policy": {"None"}},
    "fit": {
        "program": set(),
        "plan": set(),
        "calibration": {"None", "image"},
        "seed": SEEDS,
        "on_progress": CALLBACKS,
        "method": set(),
        "importance": CALLBACKS,
    },
    "rewrite": {"program": set(), "plan": set(), "weights": set()},
    "deploy": {"model": {"module"}, "example_inputs": {"image"}},
    "export": {
        "model": {"module"},
        "path": PATHS,
        "format": set(),
        "example_inputs": {"image"},
        "dynamic": {"None", *FLAGS},
        "overwrite": FLAGS,
    },
    "save": {"module": set(), "path": PATHS, "source": {"None", "no dict", "dict"}, "overwrite": FLAGS},
    "load": {"path": set(), "allow": {"no list"}, "device": set()},
    "load_weights": {"model": set(), "path": set()},
    "report": {"module": set()},
    "frontier": {
        "program": set(),
        "policy": set(),
        "key": set(),
        "calibration": {"None", "image"},
        "evaluate": {"None"},
        "seed": SEEDS,
        "runtime": set(),
        "points": COUNTS,
        "importance": CALLBACKS,
    },
    "plan_for_budget": {
        "program": set(),
        "policy": set(),
        "budget": {"dict"},
        "calibration": {"None", "image"},
        "seed": SEEDS,
        "runtime": set(),
        "importance": CALLBACKS,
    },
    "write_report": {
        "module": set(),
        "file": PATHS,
        "original": {"None"},
        "example_inputs": {"None", "image"},
        "images": {"no list", "image"},
        "labels": {"None"},
        "layers": {"None", "no list"},
        "runtime": {"None"},
        "curve": {"no list"},
        "title": {"text", "no text"},
        "overwrite": FLAGS,
    },
    "preprocessing": {"model": {"module"}, "size": {"None"}},
    "read_data": {"path": set(), "prepared": set(), "limit": {"None", *COUNTS}, "batch": COUNTS},
    "load_training_data": {"data": set(), "prepared": set(), "seed": SEEDS},
    "finetune": {
        "model": {"module"},
        "original": {"module"},
        "data": set(),
        "folder": PATHS,
        "recipe": {"None"},
        "accelerator": {"None"},
        "on_progress": CALLBACKS,
    },
    "GhostModule": {
        "primary_conv": {"module"},
        "cheap_operation": {"module"},
        "order": {"None", "tensor", "image"},
        "activation": {"None", "module"},
    },
    "Policy": {"rules": {"no list"}, "keep_first": FLAGS},
    "Policy.from_toml": {"path": set()},
    "Rule": {
        "targets": {"text", "no text", *PATTERNS},
        "ignore": {"text", "no text", *PATTERNS},
        "ratio": {"None", *NUMBERS},
        "dw_size": COUNTS,
        "cheap": COUNTS,
        "activated": FLAGS,
        "prune": FLAGS,
    },
    "Healing": {
        "seconds": {"None", "fraction", *NUMBERS},
        "steps": {"None", *COUNTS},
        "learning_rate": POSITIVE,
        "batch": COUNTS,
        "augment": FLAGS,
        "precision": set(),
    },
    "Recipe": {
        "epochs": POSITIVE - {"huge"},
        **dict.fromkeys(("learning_rate", "temperature", "evaluate_every"), POSITIVE),
        **dict.fromkeys(("batch", "save_every"), COUNTS),
        **dict.fromkeys(("weight_decay", "distill", "features", "labels", "mixup", "cutmix"), NOT_NEGATIVE),
        "optimizer": set(),
        "schedule": set(),
        "warmup": {"zero", "fraction", "one"},
        "smoothing": {"zero", "fraction"},
        "ema": {"None", "zero", "fraction"},
        "clip": {"None", "fraction", *NUMBERS},
        "frozen_norms": FLAGS,
        "precision": set(),
        "patience": {"None", *COUNTS},
        "workers": {"zero", *COUNTS},
        "seed": SEEDS,
    },
}
ONLY_REFUSED = {"export", "finetune", "deploy"}  # whose accepted values take long, or belong together
ROWS = [(name, argument) for name, arguments in ACCEPTED.items() for argument in arguments]


def function_of(name):
    return Policy.from_toml if name == "Policy.from_toml" else getattr(ghostify, name)


@cache
def objects():
    """The results of the stages for one tiny network."""
    torch.manual_seed(0)
    model, x = nets.settle(nets.Straight()), nets.images(4, 8)
    program = ghostify.trace(model, x)
    planned = ghostify.plan(program)
    fits = ghostify.fit(program, planned)
    return model, x, program, planned, fits, ghostify.ghostify(model)


def right_arguments(name, folder):
    """Arguments that each function accepts; `folder` holds images, weights and a saved model."""
    model, x, program, planned, fits, converted = objects()
    prepared = ghostify.preprocessing(model, (3, 8, 8))
    policy, budget = Policy((Rule(),)), {"macs": 0.9}
    if name in ("load", "load_weights", "read_data", "load_training_data", "finetune"):
        np.savez(folder / "data.npz", images=torch.cat((x, x)).numpy(), labels=np.arange(8) % 5)
        torch.save(model.state_dict(), folder / "weights.pt")
        ghostify.save(converted, folder / "saved")
    return {
        "ghostify": lambda: {"model": model, "example_inputs": x},
        "trace": lambda: {"model": model},
        "plan": lambda: {"program": program},
        "fit": lambda: {"program": program, "plan": planned},
        "rewrite": lambda: {"program": program, "plan": planned, "weights": fits.weights},
        "deploy": lambda: {"model": converted, "example_inputs": x},
        "export": lambda: {"model": converted, "path": folder / "out", "format": "pt2", "example_inputs": x},
        "save": lambda: {"module": converted, "path": folder / "out"},
        "load": lambda: {"path": folder / "saved"},
        "load_weights": lambda: {"model": nets.Straight(), "path": folder / "weights.pt"},
        "report": lambda: {"module": converted},
        "frontier": lambda: {"program": program, "policy": policy, "points": 2},
        "plan_for_budget": lambda: {"program": program, "policy": policy, "budget": budget},
        "write_report": lambda: {"module": converted, "file": folder / "r.html", "original": model, "runtime": None},
        "preprocessing": lambda: {"model": model},
        "read_data": lambda: {"path": folder / "data.npz", "prepared": prepared},
        "load_training_data": lambda: {"data": folder / "data.npz", "prepared": prepared},
        "finetune": lambda: {
            "model": converted,
            "original": model,
            "data": ghostify.load_training_data(str(folder / "data.npz"), prepared),
            "folder": folder / "training",
            "recipe": Recipe(batch=2),
        },
        "GhostModule": lambda: {"primary_conv": nn.Conv2d(3, 4, 3), "cheap_operation": nn.Conv2d(4, 4, 3)},
        "Policy": dict,
        "Policy.from_toml": dict,
        "Rule": dict,
        "Healing": lambda: {"seconds": 60.0, "steps": 1},
        "Recipe": lambda: {"features": 1.0},
    }[name]()


def test_every_argument_of_every_public_function_has_a_row():
    functions = [n for n in ghostify.__all__ if n not in ("GhostifyError", "GhostifyWarning")]
    assert {*functions, "Policy.from_toml"} == set(ACCEPTED)
    for name, rows in ACCEPTED.items():
        assert set(inspect.signature(function_of(name)).parameters) == set(rows), name
    assert len(ROWS) * len(VALUES) > 3000


@pytest.mark.filterwarnings("ignore::ghostify.GhostifyWarning")
@pytest.mark.parametrize(("name", "argument"), ROWS, ids=lambda part: part)
def test_each_kind_of_value_is_accepted_or_refused_in_one_line(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    right, function = right_arguments(name, tmp_path), function_of(name)
    wrong = []
    for kind, value in VALUES.items():
        is_accepted = kind in ACCEPTED[name][argument]
        if is_accepted and name in ONLY_REFUSED:
            continue
        passed = (k for k in ()) if kind == "generator" else value
        try:
            function(**{**right, argument: passed})
            outcome = "accepted"
        except GhostifyError as error:
            message = str(error)
            is_plain = message.strip() and message.isprintable() and len(message) < 1000
            outcome = "refused" if is_plain else f"refused as {message!r}"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        if outcome != ("accepted" if is_accepted else "refused"):
            wrong.append(f"{kind}: {outcome}")
    assert not wrong


def test_a_name_that_is_not_an_argument_is_pythons_own_error():
    with pytest.raises(TypeError, match=r"ghostify\(\)"):
        ghostify.ghostify(objects()[0], ratios=2)
    with pytest.raises(TypeError, match=r"trace\(\).*'model'"):
        ghostify.trace()
