import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ghostify import GhostifyError
from ghostify.data.sources import ModelSource, preprocessing, read_data
from tests import nets


def test_models_by_name():
    assert ModelSource("timm:resnet10t", {"num_classes": 7}).build().fc.out_features == 7
    assert ModelSource("torchvision:resnet18", {}).build().fc.out_features == 1000
    assert isinstance(ModelSource("tests.nets:Straight", {"width": 4}).build(), nets.Straight)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "model 'resnet18': unknown model name. Use timm:NAME"),
        ("timm:resnet81", "model 'timm:resnet81': timm has no model of this name. Similar names: resnet"),
        ("torchvision:lenet", "model 'torchvision:lenet': torchvision has no model of this name"),
        ("no.such:Net", "No module named 'no'"),
        ("tests.nets:Nope", "has no attribute 'Nope'"),
        ("tests.nets:images", "returns a Tensor. Name a callable that returns an nn.Module"),
        ("tests.nets:settle", "cannot be built \\(TypeError"),
        ("..:x", "model '..:x': is not a name of the form module.path:callable"),
        (".nets:Straight", "is not a name of the form"),
        ("tests..nets:Straight", "is not a name of the form"),
        ("tests.nets:", "unknown model name"),
        (":Straight", "is not a name of the form"),
        ("math:pi", "cannot be built"),
    ],
)
def test_wrong_names_and_arguments_are_refused(name, message):
    with pytest.raises(GhostifyError, match=message):
        ModelSource(name, {}).build()


@pytest.fixture
def prepared():
    return preprocessing(nets.Straight(), (3, 16, 16))


def test_image_folders_with_and_without_classes(tmp_path, prepared):
    for number in range(6):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.new("RGB", (20, 30), (40 * number, 0, 0)).save(folder / f"{number}.png")
    data = read_data(tmp_path, prepared, batch=4)
    assert [tuple(b.shape) for b in data.batches] == [(4, 3, 16, 16), (2, 3, 16, 16)]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert read_data(tmp_path, prepared, limit=2).labels.tolist() == [0, 1]
    assert read_data(tmp_path / "cat", prepared).labels is None


def test_arrays(tmp_path, prepared):
    images, labels = np.random.rand(5, 3, 16, 16).astype("float32"), np.arange(5)
    np.save(tmp_path / "a.npy", images)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    save_file({"images": torch.from_numpy(images)}, tmp_path / "a.safetensors")
    assert read_data(tmp_path / "a.npy", prepared).labels is None
    assert read_data(tmp_path / "a.npz", prepared).labels.tolist() == labels.tolist()
    assert torch.equal(
        torch.cat(read_data(tmp_path / "a.safetensors", prepared, batch=2).batches), torch.from_numpy(images)
    )


def test_bad_data_names_the_file(tmp_path, prepared):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_text("no image")
    np.save(tmp_path / "flat.npy", np.zeros((4, 9)))
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.savez(tmp_path / "unnamed.npz", a=np.zeros(1), b=np.zeros(1))
    for name, message in (
        ("empty", "empty: holds no images"),
        ("broken", r"x\.png: is not a readable image"),
        ("flat.npy", r"flat\.npy: holds 4x9, the model expects Nx3x16x16"),
        ("objects.npy", r"objects\.npy: cannot be read"),
        ("unnamed.npz", "Store the inputs under the name 'images'"),
        ("missing.txt", "is neither a folder nor an array file"),
        ("missing.npy", r"missing\.npy: cannot be read"),
    ):
        with pytest.raises(GhostifyError, match=message):
            read_data(tmp_path / name, prepared)


def test_images_in_grey_and_images_of_other_channels(tmp_path):
    Image.new("RGB", (20, 30), (90, 90, 90)).save(tmp_path / "x.png")
    image = read_data(tmp_path, preprocessing(nets.Straight(), (1, 16, 16))).batches[0]
    assert image.shape == (1, 1, 16, 16)
    assert torch.allclose(image, torch.tensor((90 / 255 - (0.485 + 0.456 + 0.406) / 3) / ((0.229 + 0.224 + 0.225) / 3)))
    with pytest.raises(GhostifyError, match=r"x\.png: is an image of 3 channels, the model expects 4\. Pass an array"):
        read_data(tmp_path, preprocessing(nets.Straight(), (4, 16, 16)))


@pytest.mark.parametrize("counts", [{"batch": 0}, {"batch": -1}, {"batch": "a"}, {"limit": 0}, {"limit": -5}])
def test_counts_of_images_are_at_least_one(tmp_path, prepared, counts):
    np.save(tmp_path / "x.npy", np.zeros((4, 3, 16, 16), "f4"))
    with pytest.raises(GhostifyError, match=next(iter(counts))):
        read_data(tmp_path / "x.npy", prepared, **counts)
