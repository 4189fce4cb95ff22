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
    generator = np.random.default_rng(0)
    for label in classes:
        (path / label).mkdir(parents=True, exist_ok=True)
        for k in range(each):
            Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path / label / f"{k}.png")
    return path


def test_class_folders_are_split_by_seed_and_only_training_images_are_augmented(tmp_path, prepared):
    data = load_training_data(str(folder(tmp_path / "d")), prepared)
    assert data.labelled
    assert (len(data.train), len(data.validation)) == (46, 2)
    assert not set(data.train.indices) & set(data.validation.indices)
    repeated = load_training_data(str(tmp_path / "d"), prepared)
    assert (repeated.train.indices, repeated.validation.indices) == (data.train.indices, data.validation.indices)
    assert load_training_data(str(tmp_path / "d"), prepared, seed=1).validation.indices != data.validation.indices
    assert data.train[0][0].shape == data.validation[0][0].shape == (3, 16, 16)
    assert torch.equal(data.validation[0][0], data.validation[0][0])
    augmented = [data.train[0][0] for _ in range(4)]
    assert not all(torch.equal(m, augmented[0]) for m in augmented)


@pytest.mark.parametrize("inside", [".", "all"])
def test_a_folder_without_classes_has_no_labels(tmp_path, prepared, inside):
    folder(tmp_path / "d", classes=(inside,), each=40)
    data = load_training_data(str(tmp_path / "d"), prepared)
    assert not data.labelled
    assert (len(data.train), len(data.validation)) == (38, 2)
    image, label = data.validation[1]
    assert (tuple(image.shape), label) == ((3, 16, 16), -1)
    assert torch.equal(image, data.validation[1][0])
    augmented = [data.train[0][0] for _ in range(4)]
    assert not all(torch.equal(m, augmented[0]) for m in augmented)


@pytest.mark.parametrize("name", ["val", "test"])
def test_a_folder_with_a_validation_set_keeps_it(tmp_path, prepared, name):
    folder(tmp_path / "train")
    folder(tmp_path / name, each=3)
    data = load_training_data(str(tmp_path), prepared)
    assert (len(data.train), len(data.validation)) == (48, 6)


@pytest.mark.parametrize("labelled", [True, False])
def test_arrays_with_and_without_labels(tmp_path, prepared, labelled):
    images, labels = np.random.rand(40, 3, 16, 16).astype(np.float32), np.arange(40) % 3
    np.savez(tmp_path / "d.npz", images=images, **({"labels": labels} if labelled else {}))
    data = load_training_data(str(tmp_path / "d.npz"), prepared)
    assert data.labelled is labelled
    assert (len(data.train), len(data.validation)) == (38, 2)
    assert {int(data.train[k][1]) for k in range(38)} == ({0, 1, 2} if labelled else {-1})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("imagenet", "imagenet: is not a training set. Use fashion-mnist, cifar10, a folder"),
        ("cifar10", "cifar10: is not on this machine"),
        ("empty", "empty: holds no images"),
        ("fashion-mnist", "fashion-mnist: (has 1 channel, the model expects 3|is not on this machine)"),
    ],
)
def test_what_is_not_a_training_set_is_refused(tmp_path, prepared, monkeypatch, data, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(GhostifyError, match=message):
        load_training_data(data, prepared)


class Noisy(TensorDataset):
    """Items with noise of all three random generators."""

    def __getitem__(self, index):
        import random

        return super().__getitem__(index)[0] + torch.rand(1) + random.random() + float(np.random.rand())


def test_augmentation_depends_on_seed_epoch_and_image_only():
    items = SeededDataset(Noisy(torch.zeros(12)), seed=3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    items_of_epoch = [items[2, k] for k in range(12)]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert all(torch.equal(items[2, k], items_of_epoch[k]) for k in reversed(range(12)))
    assert len({float(v) for v in items_of_epoch}) == 12
    assert not torch.equal(items[1, 0], items_of_epoch[0])
    assert not torch.equal(SeededDataset(items.items, seed=4)[2, 0], items_of_epoch[0])
    sampler = EpochSampler(12, 0)
    sampler.epoch = 2
    for workers in (0, 2):
        loaded = torch.cat([b.flatten() for b in DataLoader(items, 3, sampler=sampler, num_workers=workers)])
        assert torch.equal(loaded, torch.cat([items[key] for key in sampler]))


def test_an_epoch_can_be_resumed_in_the_middle():
    sampler = EpochSampler(10, seed=1)
    complete = list(sampler)
    assert sorted(k for _, k in complete) == list(range(10))
    sampler.skip = 4
    assert list(sampler) == complete[4:]
    assert len(sampler) == 6
    sampler.skip, sampler.epoch = 0, 1
    assert [k for _, k in sampler] != [k for _, k in complete]


@pytest.mark.parametrize("extra", ["train/c", "val/c"])
def test_training_and_validation_folders_have_the_same_classes(tmp_path, prepared, extra):
    for part in ("train", "val"):
        folder(tmp_path / part, each=2)
    (tmp_path / extra).mkdir()
    Image.new("RGB", (20, 24)).save(tmp_path / extra / "x.png")
    with pytest.raises(GhostifyError, match=rf"^{tmp_path}: class 'c' is only in one of train and val\. Give both"):
        load_training_data(str(tmp_path), prepared)


def test_images_beside_class_folders_are_refused_where_there_is_a_validation_folder(tmp_path, prepared):
    for part in ("train", "val"):
        folder(tmp_path / part, each=2)
    Image.new("RGB", (20, 24)).save(tmp_path / "val" / "x.png")
    with pytest.raises(GhostifyError, match=r"val/x\.png: is in no class folder"):
        load_training_data(str(tmp_path), prepared)


def test_one_class_folder_is_enough_where_there_is_a_validation_folder(tmp_path, prepared):
    for part in ("train", "val"):
        folder(tmp_path / part, classes=("a",), each=2)
    data = load_training_data(str(tmp_path), prepared)
    assert (data.labelled, data.classes, data.train[0][1]) == (True, 1, 0)


def test_class_folders_are_read_in_grey_for_a_model_of_one_channel(tmp_path):
    prepared = sources.preprocessing(nets.Straight(), (1, 16, 16))
    data = load_training_data(str(folder(tmp_path / "d", each=2)), prepared)
    assert data.train[0][0].shape == data.validation[0][0].shape == (1, 16, 16)


def test_the_number_of_classes_is_known(tmp_path, prepared):
    images = np.random.rand(40, 3, 16, 16).astype(np.float32)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(40) % 7)
    assert load_training_data(str(tmp_path / "d.npz"), prepared).classes == 7
    assert load_training_data(str(folder(tmp_path / "d")), prepared).classes == 2
    with pytest.raises(GhostifyError, match="cifar10: has 3 channels, the model expects 1"):
        load_training_data("cifar10", sources.preprocessing(nets.Straight(), (1, 16, 16)))
