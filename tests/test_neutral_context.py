"""Public functions compute the same bits in every context of the caller, and leave the context as it is."""

import contextlib
import logging
import os
import random
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from ghostify import (
    GhostifyError,
    Policy,
    Recipe,
    Rule,
    deploy,
    finetune,
    fit,
    frontier,
    ghostify,
    load,
    plan,
    rewrite,
    save,
    trace,
)
from ghostify.data.training_data import TrainingData
from ghostify.neutral_context import caller_modes, neutral_context
from tests import nets


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def anomalies():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the mode's costs
        mode = torch.autograd.detect_anomaly()
    with mode:
        yield


@contextlib.contextmanager
def other_seeds():
    torch.manual_seed(123)
    np.random.seed(123)
    random.seed(123)
    yield


@contextlib.contextmanager
def strict_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def all_at_once():
    with contextlib.ExitStack() as stack:
        for name in ("inference_mode", "autocast", "float64", "meta by default", "other seeds", "strict warnings"):
            stack.enter_context(CONTEXTS[name]())
        yield


CONTEXTS = {
    "no_grad": torch.no_grad,
    "gradients off": lambda: torch.set_grad_enabled(False),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta by default": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomalies": anomalies,
    "other seeds": other_seeds,
    "strict warnings": strict_warnings,
    "all at once": all_at_once,
}


class Noisy(nets.Straight):
    """A forward that draws random numbers in evaluation mode too."""

    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x)) + torch.rand(1)


def model_and_images(make=nets.Straight):
    torch.manual_seed(0)
    return nets.settle(make()), nets.images(16)


def convert(_folder):
    model, x = model_and_images(Noisy)
    return lambda: ghostify(model, example_inputs=x[:1], calibration=[x]).state_dict()


def convert_shuffled(_folder):
    model, x = model_and_images()
    loader = torch.utils.data.DataLoader(x, 4, shuffle=True)
    return lambda: ghostify(model, calibration=loader).state_dict()


def convert_for_a_budget(_folder):
    model, x = model_and_images()
    return lambda: ghostify(
        model, cheap="auto", budget={"macs": 0.7}, example_inputs=x[:1], calibration=[x], reconstruct=True
    ).state_dict()


def stages(_folder):
    model, x = model_and_images(nets.Wild)

    def run():
        program = trace(model, x[:1])
        planned = plan(program, Policy(Rule(ratio=3)))
        return rewrite(program, planned, fit(program, planned, [x]).weights).state_dict()

    return run


def curve(_folder):
    model, x = model_and_images()
    program = trace(model, x[:1])

    def run():
        points = frontier(program, Rule(cheap="auto"), calibration=[x], evaluate=lambda _: 1.0, points=3)
        return {str(k): torch.tensor(p.error, dtype=torch.float64, device="cpu") for k, p in enumerate(points)}

    return run


def inference_form(_folder):
    model, x = model_and_images()
    converted = ghostify(model)
    return lambda: deploy(converted, x).state_dict()


def saved(folder):
    model, _ = model_and_images()
    converted = ghostify(model)
    return lambda: load(save(converted, folder / "out")).state_dict()


def finetuned(folder):
    model, x = model_and_images()
    converted, data = ghostify(model), TrainingData(*[torch.utils.data.TensorDataset(x, torch.zeros(16))] * 2, False)
    numbers = iter(range(100))
    return lambda: finetune(converted, model, data, folder / str(next(numbers)), Recipe(batch=8)).state_dict()


OTHER_RUNS = [convert_shuffled, convert_for_a_budget, curve, inference_form, saved, finetuned]
CASES = [(run, context) for run in (convert, stages) for context in CONTEXTS]
CASES += [(run, "all at once") for run in OTHER_RUNS]


def process_state():
    return {
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "random": (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "anomalies": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, logging.root.manager.disable),
        "path": list(sys.path),
        "folder": os.getcwd(),
        "modules": (nn.Module.__call__, nn.Module.__getattr__, nn.Module.forward),
    }


@pytest.mark.parametrize(("run", "context"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_the_same_bits_in_every_context_which_stays_as_it_is(run, context, tmp_path):
    call = run(tmp_path)
    expected = call()
    with CONTEXTS[context]():
        before = process_state()
        actual = call()
        after = process_state()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())
    assert after == before


@pytest.mark.parametrize("context", CONTEXTS)
def test_the_context_stays_as_it_is_after_an_error(context):
    model, x = model_and_images()
    with CONTEXTS[context]():
        before = process_state()
        with pytest.raises(GhostifyError):
            ghostify(model, calibration=[x.flatten()])
        with pytest.raises(KeyboardInterrupt):
            ghostify(model, calibration=[x], on_progress=interrupt)
        assert process_state() == before


def interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("context", [c for c in CONTEXTS if "meta" not in c and c != "all at once"])
@pytest.mark.parametrize("make", [nets.Straight, nets.Wild])
def test_models_made_and_converted_in_any_context_are_trainable(make, context):
    with CONTEXTS[context]():
        model, x = nets.settle(make()), nets.images(32).to(torch.get_default_dtype())
        converted = ghostify(model, calibration=[x])
    converted.train()(x.clone()).float().sum().backward()
    assert all(p.grad is not None and not p.is_inference() for p in converted.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_give_the_same_bits_as_one_alone(dtype):
    made, x, results = [nets.Straight, nets.Residual, nets.Wild, nets.Branches], nets.images(16), {}
    models = [model_and_images(make)[0] for make in made]

    def convert_one(k):
        converted = ghostify(models[k], example_inputs=x[:1], calibration=[x])
        results[k] = {**converted.state_dict(), "output": deploy(converted, x)(x)}

    for k in range(len(made)):
        convert_one(k)
    expected = dict(results)
    with default_dtype(dtype):
        before = process_state()
        workers = [threading.Thread(target=convert_one, args=(k,)) for k in range(len(made))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert process_state() == before
    for k, state in expected.items():
        assert all(torch.equal(value, results[k][name]) for name, value in state.items())


def test_evaluate_runs_in_the_modes_of_the_caller():
    model, x = model_and_images()
    modes = []

    def evaluate(converted):
        modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_default_device().type))
        return float(converted(x.to("cpu")).numpy().shape[1])

    given = {"cheap": "auto", "budget": {"max_drop": 1, "macs": 0.9}, "example_inputs": x[:1], "evaluate": evaluate}
    with torch.no_grad(), torch.autocast("cpu", torch.float16), torch.device("cpu"):
        ghostify(model, **given)
    assert set(modes) == {(False, True, "cpu")}


def test_contexts_nest():
    with torch.no_grad(), neutral_context(), neutral_context():
        assert torch.is_grad_enabled()
        with caller_modes():
            assert not torch.is_grad_enabled()
            with neutral_context():
                assert torch.is_grad_enabled()
        assert torch.is_grad_enabled()
    with caller_modes():
        assert torch.is_grad_enabled()
