"""Training a converted model towards the original's answers, and to labels where there are any."""

from __future__ import annotations

import copy
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ghostify.data.training_data import EpochSampler, SeededDataset, TrainingData
from ghostify.errors import GhostifyError
from ghostify.graph.batchnorm import has_running_statistics
from ghostify.graph.call_hooks import AfterCall, on_calls
from ghostify.graph.inputs import tensor_leaves
from ghostify.modules.ghost import GhostModule
from ghostify.runtimes.tensors import to_channels_last
from ghostify.summary import report
from ghostify.training.losses import distillation_loss, feature_loss
from ghostify.training.run_folder import RunFolder

LOG = 10
ProgressCallback = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Recipe:
    """How to train. Optimizers and schedules are timm's, by name; `batch` counts the images of all processes together.

    The loss is `distill` times the distance to the original's answers (`temperature` softens classes), `features`
    times that of the rewritten layers' maps, and, where there are labels, `labels` times cross entropy. `clip` limits
    the gradients' norm. `frozen_norms` keeps the norms' statistics. `precision` is "no", "bf16" or "fp16". An
    evaluation comes every `evaluate_every` epochs, and training ends after `patience` of them without a gain. The state
    is kept every `save_every` steps. `warmup` is a share of all steps.
    """

    epochs: float = 1.0
    batch: int = 128
    optimizer: str = "sgd"
    learning_rate: float = 0.02
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    distill: float = 1.0
    temperature: float = 2.0
    features: float = 0.0
    labels: float = 0.0
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    ema: float | None = None
    clip: float | None = None
    frozen_norms: bool = False
    precision: str = "no"
    evaluate_every: float = 1.0
    patience: int | None = None
    save_every: int = 200
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("epochs", "batch", "learning_rate", "temperature", "evaluate_every", "save_every"):
            if not 0 < getattr(self, key) < math.inf:
                raise GhostifyError(f"{key} {getattr(self, key)!r} is not a positive number")
        if self.precision not in ("no", "bf16", "fp16"):
            raise GhostifyError(f"precision {self.precision!r} is unknown: use no, bf16 or fp16")
        if self.distill == self.features == self.labels == 0:
            raise GhostifyError("nothing to learn from: distill, features and labels are all 0")


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
    """A copy of a converted model, trained towards `original` on `data`; the best of its evaluations.

    The best is the one with the highest top-1 on validation images where there are labels, else with the highest
    agreement with the original; of equal ones, the nearer to the original. `folder` keeps the state of training, so
    that a call with the same arguments goes on after any interruption, up to the same result; and metrics, as JSON
    lines and for TensorBoard. Devices, precision and processes are Accelerate's (`accelerate launch`, `torchrun`); an
    `accelerator` of the caller's is used as it is. Raises `GhostifyError` for a folder of another training.
    """
    recipe, folder = recipe or Recipe(), Path(folder)
    if recipe.labels and not data.labelled:
        raise GhostifyError(f"labels {recipe.labels:g}: the training images have none: set it to 0")
    accelerator = accelerator or _accelerator(recipe.precision)
    training = _Training(accelerator, model, original, data, recipe)
    records = RunFolder(folder, {**asdict(recipe), **training.facts}, accelerator.is_main_process)
    try:
        _train(training, records, on_progress or (lambda *_: None))
    finally:
        records.close()
    result = copy.deepcopy(model)
    result.load_state_dict(records.best())
    return result


def _accelerator(precision: str) -> Any:
    try:
        made = importlib.import_module("accelerate").Accelerator
        return made(mixed_precision=precision, cpu=not torch.accelerator.is_available())
    except ImportError as error:
        raise GhostifyError("fine-tuning needs accelerate: pip install 'ghostify[finetune]'") from error
    except ValueError as error:
        raise GhostifyError(f"precision {precision!r}: an Accelerator of another one is in use: pass it") from error


def _train(training: _Training, records: RunFolder, on_progress: ProgressCallback) -> None:
    """From where the records end to the last step, or to the patience's end."""
    recipe, accelerator = training.recipe, training.accelerator
    every = max(1, round(recipe.evaluate_every * training.per_epoch))
    progress = records.resume(accelerator)
    for step, batch in training.batches(progress.step):
        if progress.evaluations_without_gain >= (recipe.patience or math.inf):
            break
        found = training.step(step, batch)
        progress = replace(progress, step=step + 1)
        last = progress.step == training.steps
        on_progress(progress.step, training.steps, f"loss {found['loss']:.4f}")
        if not step % LOG or last:
            records.log_metrics(progress.step, found)
        judged = not progress.step % every or last
        if judged:
            score, apart = training.evaluate()
            better = progress.best is None or (score, -apart) > (progress.best, -progress.distance_to_original)
            records.log_metrics(progress.step, {"validation": score, "apart": apart})
            progress = (
                replace(progress, best=score, distance_to_original=apart, evaluations_without_gain=0)
                if better
                else replace(progress, evaluations_without_gain=progress.evaluations_without_gain + 1)
            )
            if better:
                records.save_best(training.weights())
        if judged or not progress.step % recipe.save_every:
            records.save(accelerator, progress)


class _Training:
    """What takes part in one training: student, teacher, images, optimizer and schedule."""

    def __init__(
        self, accelerator: Any, model: nn.Module, original: nn.Module, data: TrainingData, recipe: Recipe
    ) -> None:
        count, processes = len(data.train), accelerator.num_processes  # type: ignore[arg-type]
        if recipe.batch % processes:
            raise GhostifyError(f"batch {recipe.batch} does not divide among {processes} processes")
        if recipe.batch > count:
            raise GhostifyError(f"batch {recipe.batch} is more than the {count} training images")
        self.accelerator, self.recipe, self.labelled = accelerator, recipe, data.labelled
        self.per_epoch = count // recipe.batch
        self.steps = max(1, round(recipe.epochs * self.per_epoch))
        torch.manual_seed(recipe.seed)
        student = copy.deepcopy(model).requires_grad_().to(memory_format=torch.channels_last)
        teacher = copy.deepcopy(original).requires_grad_(False).eval().to(memory_format=torch.channels_last)
        self.student_features, self.teacher_features = (
            _collect_features(student, teacher) if recipe.features else ([], [])
        )
        optimizer = create_optimizer_v2(
            student, recipe.optimizer, lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )
        self.schedule, _ = create_scheduler_v2(
            optimizer,
            recipe.schedule,
            num_epochs=self.steps,
            warmup_epochs=int(recipe.warmup * self.steps),
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=1,
        )
        self.order = EpochSampler(count, recipe.seed)
        share = {"batch_size": recipe.batch // processes, "num_workers": recipe.workers}
        train_loader = DataLoader(SeededDataset(data.train, recipe.seed), sampler=self.order, drop_last=True, **share)
        validation_loader = DataLoader(data.validation, **share)
        self.student, self.optimizer, self.train_loader, self.validation_loader = accelerator.prepare(
            student, optimizer, train_loader, validation_loader
        )
        self.teacher = teacher.to(accelerator.device)
        self.ema = None if recipe.ema is None else ModelEmaV3(accelerator.unwrap_model(self.student), recipe.ema)
        if self.ema is not None:
            accelerator.register_for_checkpointing(self.ema)
        self.mixup: Any = None
        self.facts = {"images": count, "model": _fingerprint(model), "original": _fingerprint(original)}

    def batches(self, start: int) -> Iterator[tuple[int, Any]]:
        """Steps and their images, from step `start` on."""
        step = start
        while step < self.steps:
            self.order.epoch, begun = divmod(step, self.per_epoch)
            self.order.skip = begun * self.recipe.batch
            for batch in self.train_loader:
                yield step, batch
                step += 1
                if step == self.steps or not step % self.per_epoch:
                    break

    def step(self, step: int, batch: Any) -> dict[str, float]:
        """One step; what its loss is made of."""
        self.student.train()
        if self.recipe.frozen_norms:
            for module in self.student.modules():
                if has_running_statistics(module):
                    module.eval()
        drawn = np.random.SeedSequence((self.recipe.seed, step, self.accelerator.process_index)).generate_state(1)
        torch.manual_seed(int(drawn[0]))
        np.random.seed(drawn)
        self.schedule.step_update(step)
        images, labels = to_channels_last([v.to(self.accelerator.device) for v in batch])
        losses = self._losses(images, labels)
        self.optimizer.zero_grad()
        self.accelerator.backward(losses["loss"])
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self.student.parameters(), self.recipe.clip)
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.accelerator.unwrap_model(self.student), step)
        means = self.accelerator.reduce(torch.stack([v.detach().float() for v in losses.values()]), "mean")
        rates = {"learning_rate": self.optimizer.param_groups[0]["lr"]}
        return {**dict(zip(losses, means.tolist(), strict=True)), **rates}

    def _losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        recipe, targets = self.recipe, labels
        with self.accelerator.autocast():
            with torch.no_grad():
                if recipe.mixup or recipe.cutmix:
                    images, targets = self._mixed(images, labels)
                wanted = tensor_leaves(self.teacher(images))
            answers = tensor_leaves(self.student(images))
        found: dict[str, Tensor] = {}
        if recipe.distill:
            each = [distillation_loss(a, w, recipe.temperature) for a, w in zip(answers, wanted, strict=True)]
            found["distill"] = torch.stack(each).sum()
        if recipe.features:
            found["features"] = feature_loss(self.student_features, self.teacher_features)
        if recipe.labels:
            found["labels"] = F.cross_entropy(answers[0].float(), targets, label_smoothing=self._smoothing(targets))
        self.student_features.clear()
        self.teacher_features.clear()
        total = torch.stack([getattr(recipe, key) * value for key, value in found.items()]).sum()
        return {"loss": total, **found}

    def _mixed(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images and targets blended in pairs; the classes are counted once, by the original's answers."""
        if self.mixup is None:
            recipe, classes = self.recipe, tensor_leaves(self.teacher(images[:1]))[0].shape[1]
            self.mixup = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.smoothing, num_classes=classes)
            self.teacher_features.clear()
        return self.mixup(images, labels.clamp_min(0))

    def _smoothing(self, targets: Tensor) -> float:
        """Mixed targets are smoothed already."""
        return 0.0 if targets.is_floating_point() else self.recipe.smoothing

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float]:
        """Percent of the validation images answered right, or, without labels, as the original does; and how far the
        answers are from the original's."""
        model = self.student if self.ema is None else self.ema.module
        model.eval()
        right, apart = [], []
        for images, labels in self.validation_loader:
            answers, wanted = (tensor_leaves(m(images))[0] for m in (model, self.teacher))
            classes = answers.dim() == 2
            asked = labels if self.labelled else wanted.argmax(1) if classes else torch.full_like(labels, -1)
            each = zip(answers.split(1), wanted.split(1), strict=True)
            own = torch.stack([distillation_loss(a, w, self.recipe.temperature) for a, w in each])
            apart.append(self.accelerator.gather_for_metrics(own))
            hit = (answers.argmax(1) == asked).float() if classes else torch.zeros_like(own)
            right.append(self.accelerator.gather_for_metrics(hit))
        self.student_features.clear()
        self.teacher_features.clear()
        return 100 * torch.cat(right).mean().item(), torch.cat(apart).mean().item()

    def weights(self) -> dict[str, Tensor]:
        """Those that an evaluation judges."""
        model = self.accelerator.unwrap_model(self.student) if self.ema is None else self.ema.module
        return {name: value.detach().cpu() for name, value in model.state_dict().items()}


def _collect_features(student: nn.Module, teacher: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Two lists that fill with the maps of the rewritten layers as the models run, in the student's channel order.

    Layers that make fewer maps than the original's are left out.
    """
    both: tuple[list[Tensor], list[Tensor]] = ([], [])
    for line in report(student).layers:
        if line.skip_reason is not None or line.outputs < line.weight_shape[0]:
            continue
        ghost: Any = _compared(student, line.name)
        moved = isinstance(ghost, GhostModule) and ghost.order is None and bool(line.channels)
        order = list(line.channels) if moved else slice(None)
        on_calls([ghost], after=lambda _, made: both[0].append(made))
        on_calls([_compared(teacher, line.name)], after=_appending(both[1], order))
    return both


def _appending(maps: list[Tensor], channels: list[int] | slice) -> AfterCall:
    """Appends what a module makes, its channels in this order, to a list."""
    return lambda _, made: maps.append(made[:, channels])


def _compared(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise GhostifyError(
            f"{name}: its maps cannot be compared: the original has no such module: set features to 0"
        ) from None


def _fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item():.12g}".encode())
    return digest.hexdigest()[:16]
