import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ghostify import GhostifyError
from ghostify.data.array_files import read_arrays

SIZE = (3, 4, 4)
IMAGES = np.random.default_rng(0).standard_normal((6, *SIZE), dtype=np.float32)
CLASSES = np.arange(6) % 4


def read(path, select=range):
    return read_arrays(path, SIZE, select)


def header_of(shape, dtype="<f4"):
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4", "u1", "i1", "i8", "?"])
@pytest.mark.parametrize("suffix", ["npy", "NPY", "npz", "NpZ"])
def test_numbers_of_any_real_type_are_the_inputs(tmp_path, kind, suffix):
    values, path = (IMAGES * 9).astype(kind), tmp_path / f"x.{suffix}"
    with path.open("wb") as file:
        np.save(file, values) if suffix.lower() == "npy" else np.savez(file, images=values)
    images, labels = read(path)
    assert labels is None
    assert torch.equal(images, torch.from_numpy(values.astype(np.float32)))
    assert torch.equal(read(path, lambda count: [0, count - 1])[0], images[[0, 5]])


def test_arrays_in_column_order_and_of_types_that_numpy_lacks(tmp_path):
    np.save(tmp_path / "x.npy", np.asfortranarray(IMAGES))
    images, _ = read(tmp_path / "x.npy")
    assert torch.equal(images, torch.from_numpy(IMAGES))
    assert images.is_contiguous()
    half = torch.from_numpy(IMAGES).bfloat16()
    save_file({"images": half, "labels": torch.from_numpy(CLASSES)}, tmp_path / "x.safetensors")
    images, labels = read(tmp_path / "x.safetensors", lambda _: [1, 5])
    assert torch.equal(images, half[[1, 5]].float())
    assert labels.tolist() == [1, 1]


@pytest.mark.parametrize(
    "labels",
    [CLASSES, CLASSES[:, None], CLASSES.astype("f4"), CLASSES.astype("u1"), np.eye(4)[CLASSES], np.eye(4)[CLASSES] > 0],
    ids=["numbers", "column", "floats", "bytes", "one-hot", "boolean one-hot"],
)
def test_labels_are_one_class_number_for_each_image(tmp_path, labels):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=labels)
    assert read(tmp_path / "x.npz")[1].tolist() == CLASSES.tolist()
    assert read(tmp_path / "x.npz", lambda _: [3, 5])[1].tolist() == [3, 1]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), "holds 6 images and labels of shape 3"),
        (np.zeros(7, int), "holds 6 images and labels of shape 7"),
        (np.int64(3), "holds 6 images and labels of shape"),
        (np.full((6, 4), 0.25), "holds 6 images and labels of shape 6x4"),
        (np.zeros((6, 4)), "holds 6 images and labels of shape 6x4"),
        (np.linspace(0, 3, 6), "its labels, between 0 and 3, are not class numbers"),
        (np.full(6, np.nan), "its labels, between nan and nan, are not"),
        (np.full(6, -1), "its labels, between -1 and -1, are not"),
        (np.full(6, 2**40), "its labels, between 1.*e.12 and 1.*e.12, are not"),
        (np.array(list("abcdef")), "its labels, of type <U1, are not"),
    ],
)
def test_other_labels_are_refused(tmp_path, labels, message):
    np.savez(tmp_path / "x.npz", images=IMAGES, labels=labels)
    with pytest.raises(GhostifyError, match=rf"x\.npz: {message}"):
        read(tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array(["a", "b"]), "holds values of type <U1"),
        (IMAGES.astype("M8[s]"), r"holds values of type datetime64\[s\]"),
        (IMAGES.astype("c8"), "holds values of type complex64"),
        (np.zeros(6, [("a", "f4")]), "holds values of type"),
        (np.array([{}]), "cannot be read .ValueError: it holds Python objects"),
        (IMAGES[:0], "holds 0x3x4x4, the model expects Nx3x4x4"),
        (IMAGES[:, :, :0], "holds 6x3x0x4"),
        (IMAGES[:, :1], "holds 6x1x4x4"),
        (IMAGES[0, 0], "holds 4x4"),
        (np.float32(3), "holds a single value"),
        (np.where(np.arange(6)[:, None, None, None] == 4, np.nan, IMAGES), "image 4 holds values that are not finite"),
        (np.full((2, *SIZE), np.inf), "image 0 holds values that are not finite"),
        (np.full((2, *SIZE), 1e300), "image 0 holds values that are not finite"),
    ],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays_that_are_no_images_are_refused(tmp_path, array, message, suffix):
    path = tmp_path / f"x.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, images=array)
    with pytest.raises(GhostifyError, match=rf"x\.{suffix}: {message}"):
        read(path)


def test_values_that_are_not_read_are_not_checked(tmp_path):
    np.save(tmp_path / "x.npy", np.where(np.arange(6)[:, None, None, None] == 4, np.nan, IMAGES))
    assert len(read(tmp_path / "x.npy", lambda _: [0, 5])[0]) == 2


def archive_of(content, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("images.npy", content)
    return file.getvalue()


def lzma_damaged():
    """An archive whose LZMA stream is overwritten from its middle on."""
    rng = np.random.default_rng(0)
    content = bytearray(archive_of(header_of((6, 3, 4, 4)) + rng.random(144).tobytes(), zipfile.ZIP_LZMA))
    content[60:300] = bytes(240)
    return bytes(content)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.npy", b""),
        ("x.npy", b"no array"),
        ("x.npy", header_of((10**6, 3, 1000, 1000))),
        ("x.npy", header_of((10**18, 3, 4, 4))),
        ("x.npy", header_of((-1, 3, 4, 4))),
        ("x.npy", header_of((6, 3, 4, 4), "|O")),
        ("x.npy", header_of((6, 3, 4, 4))[:40]),
        ("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 100) + b"(" * 99 + b"\n"),
        ("x.npz", b""),
        ("x.npz", archive_of(b"")),
        ("x.npz", lzma_damaged()),
        ("x.npz", archive_of(header_of((10**6, 3, 1000, 1000)))),
        ("x.npz", archive_of(header_of((6, 3, 4, 4)))[:-30]),
        ("x.safetensors", b""),
        ("x.safetensors", b"\xff" * 64),
    ],
)
def test_damaged_files_are_refused_before_anything_is_allocated(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GhostifyError, match=rf"^{tmp_path / name}: [^\n]+$"):
        read(tmp_path / name)
