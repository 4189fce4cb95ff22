"""Untrained networks of other packages, none of which ghostify handles specially."""

import sys

import pytest
import segmentation_models_pytorch as smp
import torch
import transformers as hf
from easyocr.craft import CRAFT
from easyocr.model.model import Model as Recogniser
from easyocr.model.vgg_model import Model as VGGRecogniser
from torch.utils._pytree import tree_leaves

from ghostify import ghostify, load, report, save

pytestmark = pytest.mark.filterwarnings("default")  # the packages' own
PACKAGES = ("easyocr", "segmentation_models_pytorch", "transformers")
WIDTHS = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 128]}
MAKERS = {
    "unet": lambda: smp.Unet("resnet18", encoder_weights=None, classes=2),
    "deeplabv3plus": lambda: smp.DeepLabV3Plus("tu-mobilenetv3_small_100", encoder_weights=None, classes=2),
    "hf-resnet": lambda: hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=16, **WIDTHS)),
    "hf-convnext": lambda: hf.ConvNextForImageClassification(hf.ConvNextConfig(**WIDTHS)),
    "hf-regnet": lambda: hf.RegNetForImageClassification(hf.RegNetConfig(embedding_size=16, groups_width=16, **WIDTHS)),
    "hf-segformer": lambda: hf.SegformerForSemanticSegmentation(
        hf.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=16,
            num_labels=4,
        )
    ),
    "hf-mobilenet-v2": lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config()),
}


def outputs(model, x):
    with torch.no_grad():
        output = model(**x)
    return [v for v in tree_leaves(output.to_tuple() if hasattr(output, "to_tuple") else output) if v is not None]


@pytest.mark.parametrize("name", MAKERS)
def test_a_network_of_another_package(name, tmp_path):
    torch.manual_seed(0)
    model = MAKERS[name]().eval()
    x = {"pixel_values" if name.startswith("hf") else "x": torch.randn(2, 3, 64, 64)}
    expected = outputs(model, x)
    assert all(map(torch.equal, outputs(ghostify(model, 1, example_inputs=x), x), expected))
    converted = ghostify(model, 2, cheap="pointwise", example_inputs=x)
    conversion_report = report(converted)
    dense = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and m.groups == 1]
    skip_reasons = {layer.name: layer.skip_reason for layer in conversion_report.layers}
    skipped = [skip_reasons[n] for n in dense if skip_reasons[n] is not None]
    assert all(reason.startswith(("first convolution", "no MACs saved")) for reason in skipped)
    assert conversion_report.rewritten > 1
    converted_outputs = outputs(converted, x)
    assert [v.shape for v in converted_outputs] == [v.shape for v in expected]
    loaded = load(save(converted, tmp_path / "out"), allow=[m for m in sys.modules if m.startswith(PACKAGES)])
    assert all(map(torch.equal, outputs(loaded, x), converted_outputs))


def test_an_output_class_is_preserved():
    model = hf.ResNetForImageClassification(hf.ResNetConfig(embedding_size=16, **WIDTHS)).eval()
    converted = ghostify(model, cheap="pointwise")
    assert converted(pixel_values=torch.randn(1, 3, 64, 64)).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("make", "x", "targets"),
    [
        (lambda: CRAFT(pretrained=False), (torch.randn(1, 3, 64, 64),), ["upconv[34]*", "basenet.slice1.*"]),
        (lambda: Recogniser(1, 32, 16, 11), (torch.randn(2, 1, 64, 100), torch.zeros(2, 5)), "*"),
        (lambda: VGGRecogniser(1, 32, 16, 11), (torch.randn(2, 1, 64, 100), torch.zeros(2, 5)), "*"),
    ],
    ids=["craft", "recogniser", "vgg-recogniser"],
)
def test_the_networks_of_easyocr(make, x, targets, tmp_path):
    torch.manual_seed(0)
    model = make().eval()
    assert all(map(torch.equal, tree_leaves(ghostify(model, 1, example_inputs=x)(*x)), tree_leaves(model(*x))))
    converted = ghostify(model, 2, cheap="pointwise", example_inputs=x, calibration=[x], targets=targets)
    assert report(converted).rewritten > 4
    assert not [
        layer.skip_reason
        for layer in report(converted).layers
        if layer.skip_reason and not layer.skip_reason.startswith(("not targeted", "no MACs saved"))
    ]
    loaded = load(save(converted, tmp_path / "out"), allow=[m for m in sys.modules if m.startswith(PACKAGES)])
    assert all(map(torch.equal, tree_leaves(loaded(*x)), tree_leaves(converted(*x))))
