"""Fine-tuning of a converted model by distillation from the original, and on labels where there are any."""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ghostify.arguments import a_function, a_model, a_path, instance_of, optional, public
from ghostify.data.training_data import EpochSampler, SeededDataset, TrainingData
from ghostify.errors import GhostifyError
from ghostify.graph.batchnorm import has_running_statistics
from ghostify.graph.inputs import tensor_leaves
from ghostify.numerics import first_not_finite
from ghostify.runtimes.tensors import to_channels_last
from ghostify.text import format_value
from ghostify.training.features import collect_features
from ghostify.training.losses import distillation_loss, feature_loss
from ghostify.training.optimizer import optimizer_and_schedule
from ghostify.training.output_checks import check_labels, check_outputs
from ghostify.training.recipe import Recipe
from ghostify.training.run_folder import RunFolder, TrainingProgress

LOG_EVERY = 10
UNSTABLE = "Lower the learning rate or set clip, and use another folder; the last good state stays in this one."
ProgressCallback = Callable[[int, int, str], None]


def _an_accelerator(name: str, value: Any) -> Any:
    """An Accelerator, by its methods: accelerate is an extra."""
    if all(hasattr(value, attribute) for attribute in ("prepare", "backward", "unwrap_model")):
        return value
    raise GhostifyError(f"{name}: is {format_value(value)}. Pass an accelerate.Accelerator, or leave it out.")


@public(
    model=a_model,
    original=a_model,
    data=instance_of(TrainingData, "Pass what load_training_data(name, prepared) returns."),
    folder=a_path,
    recipe=optional(instance_of(Recipe, "Pass Recipe(epochs=1, ...).")),
    accelerator=optional(_an_accelerator),
    on_progress=optional(a_function("done", "total", "text")),
)
def finetune(
    model: nn.Module,
    original: nn.Module,
    data: TrainingData,
    folder: str | Path,
    recipe: Recipe | None = None,
    *,
    accelerator: Any = None,
    on_progress: ProgressCallback | None = None,
) -> nn.Module:
    """A copy of a converted model, fine-tuned towards `original` on `data`, with the weights of its best evaluation.

    The best evaluation has the highest top-1 on the validation images where there are labels, else the highest
    agreement with the original; among equal ones, the smallest distance to the original. `folder` keeps the state, so
    that a call with the same arguments resumes after an interruption and ends with the same result. It also keeps the
    metrics, as JSON lines and for TensorBoard. Devices, precision and processes are those of Accelerate (`accelerate
    launch`, `torchrun`), or of the given `accelerator`. Raises `GhostifyError` for a folder of another run, and where a
    loss, a metric or a weight is not finite: the last good state stays in the folder. A run that ends before its first
    state leaves nothing.
    """
    recipe, folder = recipe or Recipe(), Path(folder)
    if recipe.labels and not data.labelled:
        raise GhostifyError(f"recipe: labels is {recipe.labels:g}, the training images have none. Set it to 0.")
    accelerator = accelerator or _accelerator(recipe.precision)
    training = _Training(accelerator, model, original, data, recipe)
    run_folder = RunFolder(folder, {**asdict(recipe), **training.data_settings}, is_main=accelerator.is_main_process)
    try:
        _train(training, run_folder, on_progress or (lambda *_: None))
    except BaseException:
        run_folder.discard_start()
        raise
    finally:
        run_folder.close()
    result = copy.deepcopy(model)
    result.load_state_dict(run_folder.load_best())
    return result


def _accelerator(precision: str) -> Any:
    try:
        accelerator_class = importlib.import_module("accelerate").Accelerator
        return accelerator_class(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    except ImportError as error:
        raise GhostifyError("finetune: accelerate is not installed. Run pip install 'ghostify[finetune]'.") from error
    except ValueError as error:
        raise GhostifyError(
            f"recipe: precision is {precision!r}, this process has an Accelerator of another one. Pass accelerator=."
        ) from error


def _train(training: _Training, run_folder: RunFolder, on_progress: ProgressCallback) -> None:
    """Train from the newest state to the last step, or until `patience` evaluations brought no gain."""
    recipe, accelerator = training.recipe, training.accelerator
    evaluation_steps = max(1, round(recipe.evaluate_every * training.per_epoch))
    progress = run_folder.resume(accelerator)
    for step, batch in training.batches(progress.step):
        if progress.evaluations_without_gain >= (recipe.patience or math.inf):
            break
        losses = training.step(step, batch)
        _check_finite(step + 1, losses)
        progress = replace(progress, step=step + 1)
        is_last = progress.step == training.steps
        on_progress(progress.step, training.steps, f"loss {losses['loss']:.4f}")
        if not step % LOG_EVERY or is_last:
            run_folder.log_metrics(progress.step, losses)
        is_evaluated = not progress.step % evaluation_steps or is_last
        if is_evaluated:
            progress = _evaluate(training, run_folder, progress)
        if is_evaluated or not progress.step % recipe.save_every:
            training.check_weights(progress.step)
            run_folder.save(accelerator, progress)


def _evaluate(training: _Training, run_folder: RunFolder, progress: TrainingProgress) -> TrainingProgress:
    """The progress after an evaluation; logs its metrics, and saves the weights if they are the best so far."""
    score, distance = training.evaluate()
    metrics = {"validation": score, "distance_to_original": distance}
    _check_finite(progress.step, metrics)
    training.check_weights(progress.step)
    run_folder.log_metrics(progress.step, metrics)
    is_best = progress.best is None or (score, -distance) > (progress.best, -progress.distance_to_original)
    if not is_best:
        return replace(progress, evaluations_without_gain=progress.evaluations_without_gain + 1)
    run_folder.save_best(training.weights())
    return replace(progress, best=score, distance_to_original=distance, evaluations_without_gain=0)


def _check_finite(step: int, values: Mapping[str, float]) -> None:
    """Raise `GhostifyError` for NaN and infinity, which no later step repairs."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise GhostifyError(f"finetune: {name} is {value} at step {step}. {UNSTABLE}")


class _Training:
    """The parts of a training run: student, teacher, data, optimizer and schedule."""

    def __init__(
        self, accelerator: Any, model: nn.Module, original: nn.Module, data: TrainingData, recipe: Recipe
    ) -> None:
        student = copy.deepcopy(model).requires_grad_().to(memory_format=torch.channels_last)
        teacher = copy.deepcopy(original).requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.classes = check_outputs(student, teacher, data)
        count, processes = len(data.train), accelerator.num_processes  # type: ignore[arg-type]
        if recipe.batch % processes:
            raise GhostifyError(
                f"recipe: batch {recipe.batch} is not a multiple of the {processes} processes. Use one that is."
            )
        if (recipe.mixup or recipe.cutmix) and recipe.batch // processes % 2:
            raise GhostifyError(
                f"recipe: mixup, cutmix: mix images in pairs, a batch of {recipe.batch // processes} is odd. "
                f"Use an even batch."
            )
        if recipe.batch > count:
            raise GhostifyError(
                f"recipe: batch {recipe.batch} is more than the {count} training images. Use a smaller batch."
            )
        self.accelerator, self.recipe, self.labelled = accelerator, recipe, data.labelled
        self.per_epoch = count // recipe.batch
        self.steps = max(1, round(recipe.epochs * self.per_epoch))
        torch.manual_seed(recipe.seed)
        self.student_features, self.teacher_features = (
            collect_features(student, teacher) if recipe.features else ([], [])
        )
        optimizer, self.schedule = optimizer_and_schedule(student, recipe, self.steps)
        self.sampler = EpochSampler(count, recipe.seed)
        loading = {"batch_size": recipe.batch // processes, "num_workers": recipe.workers}
        train_loader = DataLoader(
            SeededDataset(data.train, recipe.seed), sampler=self.sampler, drop_last=True, **loading
        )
        validation_loader = DataLoader(data.validation, **loading)
        self.student, self.optimizer, self.train_loader, self.validation_loader = accelerator.prepare(
            student, optimizer, train_loader, validation_loader
        )
        self.teacher = teacher.to(accelerator.device)
        self.ema = None if recipe.ema is None else ModelEmaV3(accelerator.unwrap_model(self.student), recipe.ema)
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)
        self.mixup: Any = None
        self.data_settings = {"images": count, "model": _fingerprint(model), "original": _fingerprint(original)}

    def batches(self, start: int) -> Iterator[tuple[int, Any]]:
        """Step numbers and their batches, from step `start` on."""
        step = start
        while step < self.steps:
            self.sampler.epoch, steps_done = divmod(step, self.per_epoch)
            self.sampler.skip = steps_done * self.recipe.batch
            for batch in self.train_loader:
                yield step, batch
                step += 1
                if step == self.steps or not step % self.per_epoch:
                    break

    def step(self, step: int, batch: Any) -> dict[str, float]:
        """One optimizer step; returns the loss, its terms and the learning rate."""
        self.student.train()
        if self.recipe.frozen_norms:
            for module in self.student.modules():
                if has_running_statistics(module):
                    module.eval()
        seed = np.random.SeedSequence((self.recipe.seed, step, self.accelerator.process_index)).generate_state(1)
        torch.manual_seed(int(seed[0]))
        np.random.seed(seed)
        self.schedule.step_update(step)
        images, labels = to_channels_last([v.to(self.accelerator.device) for v in batch])
        if self.recipe.labels:
            check_labels(labels, self.classes)
        losses = self._losses(images, labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(losses["loss"])
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.student), step)
        means = self.accelerator.reduce(torch.stack([v.detach().float() for v in losses.values()]), "mean")
        learning_rate = self.optimizer.param_groups[0]["lr"]
        return {**dict(zip(losses, means.tolist(), strict=True)), "learning_rate": learning_rate}

    def _losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The terms of the loss by name, and their weighted sum as "loss"."""
        recipe, targets = self.recipe, labels
        with self.accelerator.autocast():
            with torch.no_grad():
                if recipe.mixup or recipe.cutmix:
                    images, targets = self._mixed(images, labels)
                teacher_outputs = tensor_leaves(self.teacher(images))
            outputs = tensor_leaves(self.student(images))
        terms: dict[str, Tensor] = {}
        if recipe.distill:
            pairs = zip(outputs, teacher_outputs, strict=True)
            terms["distill"] = torch.stack([distillation_loss(s, t, recipe.temperature) for s, t in pairs]).sum()
        if recipe.features:
            terms["features"] = feature_loss(self.student_features, self.teacher_features)
        if recipe.labels:
            terms["labels"] = F.cross_entropy(outputs[0].float(), targets, label_smoothing=self._smoothing(targets))
        self.student_features.clear()
        self.teacher_features.clear()
        total = torch.stack([getattr(recipe, name) * value for name, value in terms.items()]).sum()
        return {"loss": total, **terms}

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets mixed in pairs; the number of classes is that of the original's outputs."""
        if self.mixup is None:
            recipe, classes = self.recipe, tensor_leaves(self.teacher(images[:1]))[0].shape[1]
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
            self.teacher_features.clear()
        return self.mixup(images, labels.clamp_min(0))

    def _smoothing(self, targets: Tensor) -> float:
        """The label smoothing that cross entropy still has to apply; mixed targets are smoothed already."""
        return 0.0 if targets.is_floating_point() else self.recipe.smoothing

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Score in percent and mean distillation loss on the validation images.

        The score is top-1, or, without labels, the agreement of the predicted class with the original's.
        """
        model = self.student if self.ema is None else self.ema.module
        model.eval()
        hits, distances = [], []
        for images, labels in self.validation_loader:
            outputs, teacher_outputs = (tensor_leaves(m(images))[0] for m in (model, self.teacher))
            is_classifier = outputs.dim() == 2
            pairs = zip(outputs.split(1), teacher_outputs.split(1), strict=True)
            distance = torch.stack([distillation_loss(s, t, self.recipe.temperature) for s, t in pairs])
            distances.append(self.accelerator.gather_for_metrics(distance))
            if is_classifier:
                targets = labels if self.labelled else teacher_outputs.argmax(1)
                hit = (outputs.argmax(1) == targets).float()
            else:
                hit = torch.zeros_like(distance)
            hits.append(self.accelerator.gather_for_metrics(hit))
        self.student_features.clear()
        self.teacher_features.clear()
        return 100 * torch.cat(hits).mean().item(), torch.cat(distances).mean().item()

    def check_weights(self, step: int) -> None:
        """Raise `GhostifyError` for weights that are not finite."""
        model = self.accelerator.unwrap_model(self.student)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for state in (model.state_dict(), self.weights()):
            name = first_not_finite(state, parameters)
            if name is not None:
                raise GhostifyError(f"finetune: {name} holds NaN or infinity after step {step}. {UNSTABLE}")

    def weights(self) -> dict[str, Tensor]:
        """The weights that are evaluated: the student's, or their moving average."""
        model = self.accelerator.unwrap_model(self.student) if self.ema is None else self.ema.module
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _fingerprint(model: nn.Module) -> str:
    """A hash of the names, shapes and sums of all weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item():.12g}".encode())
    return digest.hexdigest()[:16]
