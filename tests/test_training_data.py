import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from ghostify import GhostifyError
from ghostify.data import sources
from ghostify.data.training_data import EpochSampler, SeededDataset, load_training_data
from tests import nets


@pytest.fixture
def prepared():
    return sources.preprocessing(nets.Straight(), (3, 16, 16))


def folder(path, classes=("a", "b"), each=24):
    draw = np.random.default_rng(0)
    for label in classes:
        (path / label).mkdir(parents=True, exist_ok=True)
        for k in range(each):
            Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path / label / f"{k}.png")
    return path


def test_class_folders_are_parted_by_seed_and_only_training_images_are_moved(tmp_path, prepared):
    found = load_training_data(str(folder(tmp_path / "d")), prepared)
    assert found.labelled
    assert (len(found.train), len(found.validation)) == (46, 2)
    assert not set(found.train.indices) & set(found.validation.indices)
    again = load_training_data(str(tmp_path / "d"), prepared)
    assert (again.train.indices, again.validation.indices) == (found.train.indices, found.validation.indices)
    assert load_training_data(str(tmp_path / "d"), prepared, seed=1).validation.indices != found.validation.indices
    assert found.train[0][0].shape == found.validation[0][0].shape == (3, 16, 16)
    assert torch.equal(found.validation[0][0], found.validation[0][0])
    moved = [found.train[0][0] for _ in range(4)]
    assert not all(torch.equal(m, moved[0]) for m in moved)


@pytest.mark.parametrize("inside", [".", "all"])
def test_a_folder_without_classes_has_no_labels(tmp_path, prepared, inside):
    folder(tmp_path / "d", classes=(inside,), each=40)
    found = load_training_data(str(tmp_path / "d"), prepared)
    assert not found.labelled
    assert (len(found.train), len(found.validation)) == (38, 2)
    image, label = found.validation[1]
    assert (tuple(image.shape), label) == ((3, 16, 16), -1)
    assert torch.equal(image, found.validation[1][0])
    moved = [found.train[0][0] for _ in range(4)]
    assert not all(torch.equal(m, moved[0]) for m in moved)


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_folder_that_is_parted_already_stays_so(tmp_path, prepared, name):
    folder(tmp_path / "train")
    folder(tmp_path / name, each=3)
    found = load_training_data(str(tmp_path), prepared)
    assert (len(found.train), len(found.validation)) == (48, 6)


@pytest.mark.parametrize("labelled", [True, False])
def test_arrays_with_and_without_labels(tmp_path, prepared, labelled):
    images, labels = np.random.rand(40, 3, 16, 16).astype(np.float32), np.arange(40) % 3
    np.savez(tmp_path / "d.npz", images=images, **({"labels": labels} if labelled else {}))
    found = load_training_data(str(tmp_path / "d.npz"), prepared)
    assert found.labelled is labelled
    assert (len(found.train), len(found.validation)) == (38, 2)
    assert {int(found.train[k][1]) for k in range(38)} == ({0, 1, 2} if labelled else {-1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("imagenet", "imagenet: is no training set: use fashion-mnist, cifar10, a folder"),
        ("cifar10", "cifar10: is not on this machine"),
        ("empty", "empty: holds no images"),
        ("fashion-mnist", "fashion-mnist: (has 1 channel, the model takes 3|is not on this machine)"),
    ],
)
def test_training_sets_that_are_none(tmp_path, prepared, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GhostifyError, match=message):
        load_training_data(data, prepared)


class Noisy(TensorDataset):
    """Items with noise of all three random generators."""

    def __getitem__(self, index):
        import random

        return super().__getitem__(index)[0] + torch.rand(1) + random.random() + float(np.random.rand())


def test_randomness_is_that_of_seed_epoch_and_image():
    items = SeededDataset(Noisy(torch.zeros(12)), seed=3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    one = [items[2, k] for k in range(12)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert all(torch.equal(items[2, k], one[k]) for k in reversed(range(12)))
    assert len({float(v) for v in one}) == 12
    assert not torch.equal(items[1, 0], one[0])
    assert not torch.equal(SeededDataset(items.items, seed=4)[2, 0], one[0])
    order = EpochSampler(12, 0)
    order.epoch = 2
    for workers in (0, 2):
        loaded = torch.cat([b.flatten() for b in DataLoader(items, 3, sampler=order, num_workers=workers)])
        assert torch.equal(loaded, torch.cat([items[key] for key in order]))


def test_an_order_can_be_taken_up_in_the_middle():
    order = EpochSampler(10, seed=1)
    whole = list(order)
    assert sorted(k for _, k in whole) == list(range(10))
    order.skip = 4
    assert list(order) == whole[4:]
    assert len(order) == 6
    order.skip, order.epoch = 0, 1
    assert [k for _, k in order] != [k for _, k in whole]
