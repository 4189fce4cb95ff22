"""A network of each kind, by `make test-slow` of more families, examined as in `benchmarks/experiments/zoo.py`."""

import pytest

from benchmarks.experiments.zoo import examine

NAMES = (
    "timm:botnet26t_256", "timm:convnext_atto", "timm:densenet121", "timm:dla34", "timm:dpn68",
    "timm:edgenext_xx_small", "timm:efficientformer_l1", "timm:efficientvit_b0", "timm:fastvit_t8",
    "timm:ghostnet_100", "timm:levit_conv_128s", "timm:mobilenetv3_small_100", "timm:mobilevit_xxs",
    "timm:regnety_002", "timm:repvgg_a0", "timm:res2net50_14w_8s", "timm:resnest14d",
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", "torchvision:googlenet",
    "torchvision:lraspp_mobilenet_v3_large", "torchvision:quantized_mobilenet_v2", "torchvision:shufflenet_v2_x1_0",
    "torchvision:ssdlite320_mobilenet_v3_large",
)  # fmt: skip
SIMILAR = (  # each is built like one of those above
    "timm:coat_tiny", "timm:cspresnet50", "timm:eca_botnext26ts_256", "timm:efficientnet_lite0", "timm:gcvit_xxtiny",
    "timm:hardcorenas_a", "timm:hgnet_tiny", "timm:inception_next_atto", "timm:poolformer_s12", "timm:repghostnet_050",
    "timm:resnetv2_50", "timm:rexnet_100", "timm:selecsls42b", "timm:tiny_vit_5m_224", "timm:vovnet39a",
    "torchvision:mnasnet0_5", "torchvision:vgg11_bn",
)  # fmt: skip
DETACHED = ("rpn.",)  # region proposals take no gradient from the boxes in evaluation


@pytest.mark.filterwarnings("default")  # the models' own
@pytest.mark.parametrize("name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in SIMILAR)])
def test_a_family(name):
    row = examine(name, fitted=False)
    assert row["outcome"] == "good"
    assert row["rewritten"]
    assert row["macs_as_planned"] or row["class"] != "GraphModule"
    assert not [n for n in row["no_gradient"] if not n.startswith(DETACHED)]
