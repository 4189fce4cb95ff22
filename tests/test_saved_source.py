from pathlib import Path

import pytest

from ghostify import GhostifyError
from ghostify.data.saved_source import FETCHING, SAFE_ARGUMENTS, parse_input_size, parse_saved_source

FOLDER = Path("shared/out")


def source(name="timm:resnet10t", **arguments):
    return {"name": name, "arguments": arguments, "input_size": [3, 8, 8]}


@pytest.mark.parametrize(
    ("content", "allow"),
    [
        (source(num_classes=7, in_chans=1, global_pool="avg", drop_rate=0.1), ()),
        (source("torchvision:resnet18", num_classes=7), ()),
        (source("torchvision:resnet18", groups=2), ["torchvision:resnet18"]),
        (source("tests.nets:Straight", width=4), ["tests.nets:Straight"]),
        (source("tests.nets:Straight", width=4), ["tests.nets"]),
    ],
)
def test_a_builder_with_plain_arguments(content, allow):
    saved = parse_saved_source(content, FOLDER, allow)
    assert saved.model.to_dict() == {"name": content["name"], "arguments": content["arguments"]}
    assert saved.input_size == (3, 8, 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (source("os:mkdir", path="x"), r"names its original as 'os:mkdir', which would run code .*--allow os:mkdir\.$"),
        (source("tests.nets:Straight"), r"--allow tests\.nets:Straight\.$"),
        (source("timm:hf-hub:timm/resnet18"), "which is not a model of timm"),
        (source("timm:local-dir:/tmp/x"), "which is not a model of timm"),
        (source("timm:../x"), "which is not a model of timm"),
        (source(pretrained=True), "argument 'pretrained', which may read or fetch files"),
        (source(checkpoint_path="w"), "argument 'checkpoint_path', which may read or fetch files"),
        (source(pretrained_cfg="x"), "argument 'pretrained_cfg', which may read"),
        (source(pretrained_cfg_overlay=None), "argument 'pretrained_cfg_overlay', which may read"),
        (source(cache_dir="x"), "argument 'cache_dir', which may read"),
        (source("torchvision:resnet18", weights="DEFAULT"), "argument 'weights', which may read"),
        (source("torchvision:fcos_resnet50_fpn", weights_backbone="DEFAULT"), "'weights_backbone', which may read"),
        (source(block=3), r"argument 'block', which is not known\. .*--allow timm:resnet10t\.$"),
        (source(num_classes={"a": 1}), "its source is not the name, arguments and input size"),
        (source(num_classes=10**9), "its source is not"),
        (source(global_pool="a/b"), "its source is not"),
        ({**source(), "name": 3}, "its source is not"),
        ({**source(), "input_size": [3, 8]}, "its source is not"),
        ({**source(), "input_size": [3, 8, True]}, "its source is not"),
        ({**source(), "input_size": [3, 8, 10**9]}, "its source is not"),
        ({"name": "timm:resnet10t", "input_size": [3, 8, 8]}, "its source is not"),
        ({"name": "timm:resnet10t"}, "its source is not"),
        ([1], "its source is not"),
        ("timm:resnet10t", "its source is not"),
    ],
)
def test_any_other_source_is_refused_in_one_line(content, message):
    with pytest.raises(GhostifyError, match=message) as caught:
        parse_saved_source(content, FOLDER)
    assert str(caught.value).startswith(f"{FOLDER}: ")
    assert "\n" not in str(caught.value)


def test_arguments_that_fetch_need_the_users_own_command():
    with pytest.raises(GhostifyError, match="may read or fetch files"):
        parse_saved_source(source(pretrained=True), FOLDER, ["timm:resnet10t"])


def test_no_safe_argument_fetches():
    assert [name for name in SAFE_ARGUMENTS if FETCHING.search(name)] == ["init_weights"]


def test_the_input_size_is_optional():
    assert parse_input_size(None, FOLDER) is None
    assert parse_input_size({"name": "x"}, FOLDER) is None
    assert parse_input_size(source(), FOLDER) == (3, 8, 8)
    with pytest.raises(GhostifyError, match="its source is not"):
        parse_input_size({"input_size": "3,8,8"}, FOLDER)
