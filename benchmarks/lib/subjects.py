"""The networks of real.py, each with its calibration images, its test images and its measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib import demosaicking, imagenet, networks
from benchmarks.lib.agreement import agreement, right
from benchmarks.lib.cells import Row
from benchmarks.lib.composites import composites, normalised
from ghostify.evaluation.metrics import predict, relative_error

Batches = tuple[Tensor, ...]
STRIDE = 256  # a seed's calibration images start where those of the seed before it end, if these are 256


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network. `calibration` gives the unlabelled batches of a number of images and a seed.

    `run` gives the outputs on batches, `error` the relative squared error of outputs against the original's, `scores`
    the other measures of outputs against the original's on the test images, and `labelled` those of a model against
    labels. `ignore` names convolutions that are not converted.
    """

    model: nn.Module
    calibration: Callable[[int, int], Batches]
    test: Batches
    scores: Callable[[Tensor, Tensor], Row]
    labelled: Callable[[nn.Module], Row] = lambda _: {}
    run: Callable[[nn.Module, Batches], Tensor] = predict
    error: Callable[[Tensor, Tensor], float] = relative_error
    ignore: tuple[Any, ...] = ()

    @property
    def example(self) -> Tensor:
        return self.test[0][:1]

    @cached_property
    def reference(self) -> Tensor:
        """The original's outputs on the test images."""
        return self.run(self.model, self.test)

    @cached_property
    def right(self) -> Row:
        """The original's measures against labels."""
        return self.labelled(self.model)


def on_photographs(build: Callable[[], nn.Module], test_count: int) -> Subject:
    """A network with ImageNet weights: composites, and the labelled pictures."""
    pictures, test = composites()
    labelled, labels = imagenet.labelled_pictures()
    labelled = normalised(labelled)
    return Subject(
        build(),
        lambda count, seed: normalised(_part(pictures, count, seed)).split(32),
        normalised(test[:test_count]).split(32),
        agreement,
        lambda model: right(predict(model, [labelled]), labels),
    )


def mobilenet_v2(test_count: int) -> Subject:
    return on_photographs(imagenet.mobilenet_v2, test_count)


def lite0(test_count: int) -> Subject:
    from benchmarks.lib.lite0 import lite0

    return on_photographs(lite0, test_count)


def fashion(name: str, test_count: int) -> Subject:
    """A network trained on Fashion-MNIST; top-1 on the test images, which nothing else uses."""
    data = networks.images()
    test = data.test[:test_count].split(500)
    return Subject(
        networks.NETWORKS[name](data),
        lambda count, seed: networks.calibration(data, count, seed).split(64),
        test,
        agreement,
        lambda model: right(predict(model, test), data.test_labels[:test_count]),
    )


def craft(test_count: int) -> Subject:
    """EasyOCR's detector, with the pages of craft.py."""
    from benchmarks.lib import craft
    from benchmarks.lib.documents import calibration_pages, test_pages

    def run(model: nn.Module, batches: Batches) -> Tensor:
        return torch.cat([craft.score_maps(model, batch) for batch in batches])

    def scores(outputs: Tensor, reference: Tensor) -> Row:
        return {"f1": craft.agreement(outputs, reference)["f1"]}

    return Subject(
        craft.craft(),
        lambda count, seed: calibration_pages(count, 256, seed).split(8),
        test_pages(test_count, 512, 0).split(8),
        scores,
        run=run,
        error=craft.map_error,
        ignore=(craft.has_few_outputs,),
    )


def demosaic(test_count: int) -> Subject:
    """The demosaicking network: raw values are its inputs, and the pictures are the right answers."""
    pictures, test = composites()
    colours = demosaicking.crops(test[:test_count], 0)
    raw = demosaicking.mosaic(colours).split(32)
    return Subject(
        demosaicking.demosaicking(pictures),
        lambda count, seed: demosaicking.mosaic(demosaicking.crops(_part(pictures, count, seed), 1 + seed)).split(32),
        raw,
        lambda outputs, _: {"psnr": demosaicking.psnr(outputs, colours)},
    )


def _part(pictures: Tensor, count: int, seed: int) -> Tensor:
    """`count` pictures in a ring, from one that the seed says: in their order, every object comes equally often."""
    return pictures.roll(-STRIDE * seed, 0)[:count]


@dataclass(frozen=True)
class Setting:
    """What is measured of a network: shares of the MACs, numbers of calibration images, number of test images."""

    build: Callable[[int], Subject]
    shares: tuple[float, ...]
    images: tuple[int, ...]
    test: int
    rivals: tuple[str, ...]


FACTORED = ("Torch-Pruning, magnitude", "channels, least squares", "low rank")
SETTINGS = {
    "MobileNetV2": Setting(mobilenet_v2, (0.875, 0.75), (256, 1024), 384, ("smaller input", *FACTORED)),
    "EfficientNet-Lite0": Setting(lite0, (0.875, 0.75), (256, 1024), 384, ("smaller input", *FACTORED)),
    "CRAFT": Setting(craft, (1 / 2, 1 / 3), (128,), 48, FACTORED),
    "ResNet-20": Setting(partial(fashion, "resnet20"), (1 / 4, 1 / 8), (512,), 10_000, FACTORED),
    "VGG-16-BN": Setting(partial(fashion, "vgg16"), (1 / 4, 1 / 8), (512,), 10_000, FACTORED),
    "demosaicking": Setting(demosaic, (1 / 2, 1 / 4), (256,), 384, FACTORED),
}


@cache
def subject(network: str, test_count: int) -> Subject:
    return SETTINGS[network].build(test_count)
