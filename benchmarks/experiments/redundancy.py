"""How redundant feature maps are: each predicted from another by one small kernel, in networks with trained weights.

    python benchmarks/experiments/redundancy.py

GhostNet's table 1 (Han et al., 2020) fits pairs of maps of ResNet-50's first block by linear operations with d = 1, 3,
5 and 7, and gives their mean squared errors. Here: the second convolution of CRAFT's VGG-16-BN (EasyOCR's weights) and
the first blocks of EfficientNet-Lite0 (ImageNet weights) on 16 photographs, and those of ResNet-20 of width 32 on 64
Fashion-MNIST images. No package has ResNet-50's own weights: `ghostify study timm:resnet50 --layer layer1.0.conv1
--checkpoint ...` makes the same table for it. The squared error is small for any map that hardly varies, so the table
also has the error relative to the map's variance: of the three best pairs, and the median over maps of the best. "Half
ghosted" is the median relative error of the ghosts if the layer becomes a ghost module at ratio 2, depthwise d = 3.
Nothing is trained. Results go to benchmarks/results/redundancy.json, pictures to build/redundancy/.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib import networks
from benchmarks.lib.craft import craft
from benchmarks.lib.lite0 import crops, lite0
from benchmarks.lib.photographs import CALIBRATION
from benchmarks.lib.tables import ROOT, Row, options, publish
from ghostify import trace
from ghostify.reporting.redundancy import study_layer, write_pictures

PICTURES = ROOT / "build/redundancy"
PHOTOGRAPHS, SMALL, SEED = 16, 64, 0


def subjects() -> Iterator[tuple[str, nn.Module, tuple[str, ...], Tensor]]:
    photographs = crops(CALIBRATION, PHOTOGRAPHS, SEED)
    yield "CRAFT's VGG-16-BN", craft(), ("basenet.slice1.3",), photographs
    yield "EfficientNet-Lite0", lite0(), ("blocks.1.0.conv_pw", "blocks.1.0.conv_pwl"), photographs
    data = networks.images()
    yield "ResNet-20", networks.resnet20(data), ("blocks.0.conv1", "blocks.0.conv2"), data.train[:SMALL]


def rows() -> Iterator[Row]:
    for network, model, layers, images in subjects():
        program = trace(model, images[:1])
        for layer in layers:
            layer_study = study_layer(program, layer, images.split(8))
            write_pictures(layer_study, PICTURES / f"{network}-{layer}")
            yield {"how": f"{network}, {layer}", **layer_study.to_dict()}


def main() -> None:
    options(__doc__).parse_args()
    publish("redundancy", rows())


if __name__ == "__main__":
    main()
