"""Networks of the Fashion-MNIST experiments: trained once on the first use and cached outside the repository."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import MobileNetV2, vgg16_bn

from ghostify import GhostModule, rewrite
from ghostify.cli.demo_network import ResidualNet, train
from ghostify.data.datasets import LabelledImages, fashion_mnist
from ghostify.evaluation.metrics import predict, top1
from ghostify.fitting.initialization import untrained_weights
from ghostify.graph.program import Program
from ghostify.planning.planner import Plan
from ghostify.timing.latency import cache_folder

CACHE = cache_folder()


def images() -> LabelledImages:
    data = fashion_mnist()
    if data is None:
        sys.exit("Fashion-MNIST is not on this machine: apt-get install dataset-fashion-mnist")
    return data


def calibration(data: LabelledImages, count: int, seed: int) -> Tensor:
    """Unlabelled training images."""
    return data.train[torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:count]]


def accuracy(model: nn.Module, data: LabelledImages) -> float:
    """Top-1 in percent on all test images, float32; on a GPU where there is one."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    target = {"device": device, "memory_format": torch.channels_last}  # faster on a CPU
    test = (images.to(**target) for images in data.test.split(500))
    return top1(predict(copy.deepcopy(model).to(**target), test).cpu(), data.test_labels)


def trained(
    name: str, build: Callable[[], nn.Module], data: LabelledImages, *, epochs: float, seed: int = 0
) -> nn.Module:
    """The network `name`, from the cache or trained now on the training images alone."""
    path = CACHE / f"{name}-{data.name.lower()}-{epochs}-{seed}.safetensors"
    torch.manual_seed(seed)
    model = build()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()

    def on_progress(step: int, steps: int) -> None:
        if step % 100 == 0:
            print(f"  training {name}: step {step} of {steps}", file=sys.stderr, flush=True)

    train(model, data.train, data.train_labels, epochs=epochs, seed=seed, on_progress=on_progress)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    print(f"  {name}: {accuracy(model, data):.2f} % top-1", file=sys.stderr)
    return model.to(memory_format=torch.contiguous_format)


def resnet20(data: LabelledImages, width: int = 32, seed: int = 0) -> nn.Module:
    return trained(f"resnet20-w{width}", lambda: ResidualNet(20, width), data, epochs=6, seed=seed)


def vgg16(data: LabelledImages, seed: int = 0) -> nn.Module:
    """The form of VGG-16-BN for small images: torchvision's features but the last pooling, one linear layer."""

    def build() -> nn.Module:
        first, *others = vgg16_bn().features[:-1]
        first = nn.Conv2d(data.train.shape[1], first.out_channels, 3, padding=1)
        return nn.Sequential(first, *others, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))

    return trained("vgg16-bn", build, data, epochs=3, seed=seed)


def resnet56(data: LabelledImages, seed: int = 0) -> nn.Module:
    """The paper's ResNet-56, of width 16."""
    return trained("resnet56-w16", lambda: ResidualNet(56, 16), data, epochs=6, seed=seed)


def mobilenet(data: LabelledImages, seed: int = 0) -> nn.Module:
    """torchvision's MobileNetV2 of half its width, with strides for small images."""
    setting = [[1, 16, 1, 1], [6, 24, 2, 1], [6, 32, 3, 2], [6, 64, 4, 2], [6, 96, 3, 1], [6, 160, 2, 1]]

    def build() -> nn.Module:
        model = MobileNetV2(data.classes, width_mult=0.5, inverted_residual_setting=setting, dropout=0.0)
        first = model.features[0][0]
        model.features[0][0] = nn.Conv2d(data.train.shape[1], first.out_channels, 3, padding=1, bias=False)
        return model

    return trained("mobilenetv2-0.5", build, data, epochs=6, seed=seed)


def untrained_ghosts(program: Program, plan: Plan, seed: int, *, keep_filters: bool) -> nn.Module:
    """The usual initialisation: random cheap kernels; primary filters are the first of the original's, or random."""
    module = rewrite(program, plan, untrained_weights(program, plan, seed=seed))
    torch.manual_seed(seed)
    for ghost in module.modules():
        if isinstance(ghost, GhostModule) and not keep_filters:
            nn.init.kaiming_normal_(ghost.primary_conv.weight, nonlinearity="relu")
    return module


@torch.no_grad()
def reestimated(model: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy whose BatchNorm statistics are averages over the batches, as other methods re-estimate them."""
    copied = copy.deepcopy(model).eval()
    norms = [m for m in copied.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    for batch in batches:
        copied(batch)
    for norm in norms:
        norm.momentum = 0.1
    return copied.eval()


NETWORKS = {"resnet20": resnet20, "resnet56": resnet56, "vgg16": vgg16, "mobilenet": mobilenet}

if __name__ == "__main__":
    for build in NETWORKS.values():
        build(images())
