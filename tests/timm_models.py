"""A tiny network of timm's, with the layer names of its ResNet-18, for the examples of the documentation."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

default_cfgs = generate_default_cfgs({
    "tiny_resnet": {"input_size": (3, 64, 64), "pool_size": (2, 2), "num_classes": 1000, "crop_pct": 0.95,
                    "interpolation": "bicubic", "mean": (0.5,) * 3, "std": (0.5,) * 3, "first_conv": "conv1.0",
                    "classifier": "fc"},
})  # fmt: skip


@register_model
def tiny_resnet(pretrained=False, **options):
    stem = {"stem_type": "deep", "stem_width": 8}
    options = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (16, 24, 24, 48), **stem, **options}
    return build_model_with_cfg(ResNet, "tiny_resnet", pretrained, **options)
