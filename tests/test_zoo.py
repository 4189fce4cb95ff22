"""One network of each of many families: empty plan and reloading bit-equal, MACs as planned. `make test-slow`."""

import pytest
import timm
import torch
import torchvision
from torch.utils._pytree import tree_leaves

from ghostify import ghostify, load, report, save
from ghostify.cost import count_macs

NAMES = (
    "timm:botnet26t_256", "timm:coat_tiny", "timm:convnext_atto", "timm:cspresnet50", "timm:densenet121",
    "timm:dla34", "timm:dpn68", "timm:eca_botnext26ts_256", "timm:edgenext_xx_small", "timm:efficientnet_lite0",
    "timm:fastvit_t8", "timm:ghostnet_100", "timm:hrnet_w18_small",
    "timm:mobilenetv3_small_100", "timm:poolformer_s12", "timm:regnety_002", "timm:repvgg_a0",
    "timm:res2net50_14w_8s", "timm:resnest14d", "timm:resnetv2_50", "timm:selecsls42b",
    "timm:tf_efficientnet_b0", "timm:vovnet39a", "timm:xception41", "torchvision:convnext_tiny",
    "torchvision:densenet121", "torchvision:efficientnet_b0", "torchvision:mnasnet0_5",
    "torchvision:mobilenet_v2", "torchvision:resnet50", "torchvision:shufflenet_v2_x1_0",
    "torchvision:squeezenet1_1", "torchvision:vgg11_bn",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the models' own
@pytest.mark.parametrize("name", NAMES)
def test_a_family(name, tmp_path):
    kind, _, name = name.partition(":")
    torch.manual_seed(0)
    model = timm.create_model(name) if kind == "timm" else torchvision.models.get_model(name, weights=None)
    size = model.default_cfg["input_size"] if kind == "timm" else (3, 224, 224)
    x = torch.randn(1, *size)
    wanted = tree_leaves(model.eval()(x))
    assert all(map(torch.equal, tree_leaves(ghostify(model, 1, example_inputs=x)(x)), wanted))
    converted = ghostify(model, 2, cheap="pointwise", example_inputs=x)
    assert report(converted).rewritten > 0
    assert count_macs(converted, x) == report(converted).macs_after
    save(converted, tmp_path / "out")
    assert all(map(torch.equal, tree_leaves(load(tmp_path / "out")(x)), tree_leaves(converted(x))))
