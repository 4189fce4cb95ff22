"""`heal()`: gradient steps on a converted model towards the original's outputs, kept where the holdout improves."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ghostify.errors import GhostifyError
from ghostify.fitting.calibration import HOLDOUT_EVERY
from ghostify.fitting.distributed import rank_and_world_size
from ghostify.fitting.driver import ProgressCallback
from ghostify.fitting.output_scale import OutputScale
from ghostify.fitting.sensitivity import PreparedCalibration
from ghostify.graph.batches import run_batch
from ghostify.graph.inputs import tensor_leaves
from ghostify.healing.augmentation import augment, can_augment
from ghostify.healing.image_sampler import ImageSample, holdout_pieces, training_samples
from ghostify.healing.last_maps import LastMaps, last_maps
from ghostify.healing.settings import Healing
from ghostify.healing.trained_parameters import trained_parameters
from ghostify.reconstruction.block_runner import eval_copy
from ghostify.reconstruction.optimizer import adam_steps, cosine_factor

CHECKS = 10
MAX_WORSE = 1.1
RATE_DIVISOR = 3.0
WARMUP_STEPS = 10


@dataclass(frozen=True)
class HealingResult:
    """The steps taken, the seconds, and the error of the outputs on the holdout before and after."""

    steps: int
    seconds: float
    error_before: float
    error_after: float


def heal(
    original: nn.Module,
    converted: nn.Module,
    calibration: PreparedCalibration,
    settings: Healing,
    *,
    seed: int = 0,
    on_progress: ProgressCallback | None = None,
) -> HealingResult:
    """Train the parameters of `converted`, in place, towards the outputs of `original` and its last maps.

    Both run in evaluation mode, so that norms keep their statistics. Of the weights at `CHECKS` moments, those with the
    smallest error of the outputs on the holdout are kept, or those from before. Where that error rises much, training
    goes on from the best weights at lower rates. Raises `GhostifyError` without images in the holdout or outside it, in
    a group of several processes, and where the outputs have no values to compare.
    """
    if rank_and_world_size()[1] > 1:
        raise GhostifyError("heal: works in a single process only. Convert in several processes without it.")
    batches, scale = calibration.batches, calibration.output_scale
    holdout, samples = holdout_pieces(batches), training_samples(batches, settings.batch, seed)
    first = next(samples, None)
    if not holdout or first is None:
        raise GhostifyError(f"heal: holds out one of {HOLDOUT_EVERY} images. Pass at least {HOLDOUT_EVERY}.")
    with torch.inference_mode(False), torch.no_grad():
        teacher, student = eval_copy(original), eval_copy(converted)
        if not scale.deviations:
            raise GhostifyError("heal: the outputs have no floating-point values that vary. Leave out heal.")
        run = partial(run_batch, inputs=first.inputs, number=first.number)
        maps = last_maps(teacher, student, run)
        loss = _DistillationLoss(teacher, student, scale, maps, settings, seed)
        parameters = trained_parameters(student, run, settings.learning_rate)
        result = _train(loss, parameters, samples, holdout, _Progress(settings, on_progress))
        if result.error_after < result.error_before:
            for parameter, healed in zip(converted.parameters(), student.parameters(), strict=True):
                parameter.copy_(healed)
    return result


class _DistillationLoss:
    """The error of the student's outputs and of its last maps, each relative to the variance of the teacher's."""

    def __init__(
        self,
        teacher: nn.Module,
        student: nn.Module,
        scale: OutputScale,
        maps: LastMaps,
        settings: Healing,
        seed: int,
    ) -> None:
        self.teacher, self.student, self.scale, self.maps = teacher, student, scale, maps
        self.is_augmented, self.generator = settings.augment, torch.Generator().manual_seed(seed)
        self.autocast_to = _autocast_type(settings.precision, next(teacher.parameters(), torch.zeros(())))

    def of(self, sample: ImageSample) -> Tensor:
        """The loss on some images, changed at random; a scalar."""
        sample = self._augmented(sample)
        with self._autocast(sample):
            with torch.no_grad(), self.maps.record(self.teacher, "teacher"):
                expected = run_batch(self.teacher, sample.inputs, sample.number)
            with self.maps.record(self.student, "student"):
                outputs = run_batch(self.student, sample.inputs, sample.number)
        loss = self.scale.error(expected, outputs, sample.images)
        of_maps = self.maps.error("student", "teacher")
        return loss if of_maps is None else loss + of_maps

    def error(self, pieces: list[ImageSample]) -> float:
        """The error of the student's outputs on the holdout."""
        total = torch.zeros(())
        for piece in pieces:
            expected, outputs = (run_batch(model, piece.inputs, piece.number) for model in (self.teacher, self.student))
            total += piece.images * self.scale.error(expected, outputs, piece.images).cpu()
        return float(total) / sum(piece.images for piece in pieces)

    def _augmented(self, sample: ImageSample) -> ImageSample:
        images = [v for v in tensor_leaves(sample.inputs) if can_augment(v)]
        if not self.is_augmented or len(images) != 1 or len(tensor_leaves(sample.inputs)) != 1:
            return sample
        return sample.with_tensor(augment(images[0], self.generator))

    def _autocast(self, sample: ImageSample) -> contextlib.AbstractContextManager[object]:
        device = next(iter(tensor_leaves(sample.inputs))).device.type
        return contextlib.nullcontext() if self.autocast_to is None else torch.autocast(device, self.autocast_to)


def _autocast_type(precision: str, parameter: Tensor) -> torch.dtype | None:
    """bfloat16 for float32 models where it is asked for, or fast; None to compute in the model's own type."""
    is_fast = (
        torch.cuda.is_bf16_supported()
        if parameter.device.type == "cuda"
        else parameter.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    )
    use = parameter.dtype == torch.float32 and (precision == "bf16" or (precision == "auto" and is_fast))
    return torch.bfloat16 if use else None


class _Progress:
    """The share of the steps or seconds that is used, and when to check the holdout next."""

    def __init__(self, settings: Healing, on_progress: ProgressCallback | None) -> None:
        self.settings, self.on_progress = settings, on_progress
        self.started, self.steps, self.checks = time.perf_counter(), 0, 0

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def share(self) -> float:
        """At least 1 at the end."""
        limits = (self.steps, self.settings.steps), (self.seconds, self.settings.seconds)
        return max(used / limit for used, limit in limits if limit is not None)

    def rate_factor(self, step: int) -> float | None:
        """The factor of the learning rates for a step of a run: a short rise, and a cosine over the whole limit."""
        share = self.share
        return None if share >= 1 else min(1.0, (step + 1) / WARMUP_STEPS) * cosine_factor(share)

    def is_check(self) -> bool:
        """Count a step; whether the holdout is checked after it."""
        self.steps += 1
        if self.share < (self.checks + 1) / CHECKS and self.share < 1:
            return False
        self.checks = int(CHECKS * self.share)
        return True

    def show(self, error: float) -> None:
        if self.on_progress:
            self.on_progress(min(self.checks, CHECKS), CHECKS, f"healing, output error {error:.4f}")


def _train(
    loss: _DistillationLoss,
    parameters: list[tuple[Tensor, float]],
    samples: Iterator[ImageSample],
    holdout: list[ImageSample],
    progress: _Progress,
) -> HealingResult:
    """Steps until the limit; the parameters are then the best ones, or as before."""
    error_before = best_error = loss.error(holdout)
    best = [p.clone() for p, _ in parameters]
    divisor = 1.0
    while progress.share < 1:
        rates = [(p, rate / divisor) for p, rate in parameters]
        is_diverging = False
        for _ in adam_steps(lambda: loss.of(next(samples)), rates, progress.rate_factor):
            if not progress.is_check():
                continue
            error = loss.error(holdout)
            progress.show(error)
            if error < best_error:
                best, best_error = [p.clone() for p, _ in parameters], error
            elif not error < MAX_WORSE * best_error:
                is_diverging = True
                break
        for (parameter, _), kept in zip(parameters, best, strict=True):
            parameter.copy_(kept)
        if not is_diverging:
            break
        divisor *= RATE_DIVISOR
    return HealingResult(progress.steps, progress.seconds, error_before, best_error)
