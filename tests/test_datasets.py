import gzip

import pytest

from ghostify import GhostifyError
from ghostify.data import datasets

IMAGE = bytes([0, 0, 8, 3, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 2, 1, 2, 3, 4])
LABEL = bytes([0, 0, 8, 1, 0, 0, 0, 1, 7])


def copy_of(folder, **changes):
    for stem in datasets.STEMS:
        content = changes.get(stem.replace("-", "_"), IMAGE if "images" in stem else LABEL)
        if content is not None:
            (folder / f"{stem}-ubyte.gz").write_bytes(content if content[:1] == b"x" else gzip.compress(content))


def test_a_copy_on_this_machine_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "FASHION_MNIST", (tmp_path,))
    copy_of(tmp_path)
    images = datasets.fashion_mnist()
    assert images.train.shape == (1, 1, 2, 2)
    assert images.test_labels.tolist() == [7]


@pytest.mark.parametrize(
    "change",
    [{"t10k_images": None}, {"train_labels": b"x"}, {"train_images": IMAGE[:-1]}, {"train_images": IMAGE[:3]}],
    ids=["missing", "no gzip", "cut", "cut header"],
)
def test_a_damaged_copy_is_refused_in_one_line(tmp_path, monkeypatch, change):
    monkeypatch.setattr(datasets, "FASHION_MNIST", (tmp_path,))
    copy_of(tmp_path, **change)
    with pytest.raises(GhostifyError, match=rf"^{tmp_path}: is not a complete copy of Fashion-MNIST \([^\n]+$"):
        datasets.fashion_mnist()
