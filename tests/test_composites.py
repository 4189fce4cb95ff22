"""Composites: made of pictures in a folder, the halves share none, and they come back from the cache."""

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.lib import composites


@pytest.fixture
def folder(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    names = ["tuxpaint/stamps/animals/a.png", "tuxpaint/stamps/animals/b.png", "tuxpaint/stamps/symbols/c.png"]
    scenes = ["backgrounds/mate/nature/d.jpg", "wallpapers/W/contents/images/1920x1080.jpg"]
    other = ["wallpapers/W/contents/images/640x480.jpg"]
    for name in names + scenes + other:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shape = (40, 60, 4) if file.suffix == ".png" else (250, 260, 3)
        Image.fromarray(draw.integers(256, size=shape, dtype=np.uint8)).save(file)
    monkeypatch.setattr(composites, "FOLDER", tmp_path)
    monkeypatch.setenv("GHOSTIFY_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_photographs_alone_are_used(folder):
    assert [file.name for file in composites.objects()] == ["a.png", "b.png"]
    assert [str(file.relative_to(folder)) for file in composites.backgrounds()] == [
        "backgrounds/mate/nature/d.jpg",
        "wallpapers/W/contents/images/1920x1080.jpg",
    ]


def test_halves_share_no_picture():
    files = [composites.FOLDER / str(k) for k in range(7)]
    first, second = composites.halves(files, 0)
    assert {*first} | {*second} == {*files}
    assert len(first) + len(second) == 7


def test_images_are_the_same_from_the_cache(folder, monkeypatch):
    calibration, test = composites.composites(3, 2)
    assert (calibration.shape, test.shape, test.dtype) == ((3, 3, 224, 224), (2, 3, 224, 224), torch.uint8)
    monkeypatch.setattr(composites, "FOLDER", folder / "none")
    assert torch.equal(composites.composites(3, 2)[0], calibration)
    with pytest.raises(SystemExit, match="GHOSTIFY_PHOTOGRAPHS"):
        composites.composites(4, 2)


def test_normalised_images_are_those_of_torchvision():
    from torchvision.transforms.v2.functional import normalize

    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    expected = normalize(images.float() / 255, list(composites.MEAN), list(composites.DEVIATION))
    assert torch.allclose(composites.normalised(images), expected, atol=1e-6)
