"""Tensors of a safetensors file: bit-equal to the library's; a file whose header is wrong is refused."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ghostify import GhostifyError
from ghostify.graph.tensor_facts import TensorFacts
from ghostify.io.tensor_file import DTYPES, HEADER_LIMIT, read_tensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(file, header, data=b"12345678"):
    """A safetensors file with this header; returns the file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_of_every_dtype_are_those_of_the_library(tmp_path, dtype):
    values = torch.arange(12).reshape(3, 4) % 2
    parts = {"a": values, "b": values[0, 1], "none": values[:0]}
    tensors = {name: part.to(dtype).clone() for name, part in parts.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    read, expected = read_tensors(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    assert read.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (dtype, tensor.shape)
        assert bytes(read[name].flatten().view(torch.uint8)) == bytes(tensor.flatten().view(torch.uint8))


def test_changing_a_tensor_leaves_the_file(tmp_path):
    file = write(tmp_path / "a.safetensors", {"a": ENTRY})
    before = file.read_bytes()
    read_tensors(file)["a"].fill_(1)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b"", "Expecting value"),
        (b"[" * 1000, "nested"),
        (b"\xff", "invalid start byte"),
        ([1], "its header is no object"),
        ({"a": 3}, "tensor 'a' has no dtype, shape and offsets"),
        ({"a": {**ENTRY, "dtype": "F4"}}, "tensor 'a' has no dtype"),
        ({"a": {**ENTRY, "shape": [3]}}, "tensor 'a' has no dtype"),
        ({"a": {**ENTRY, "shape": [-1, -2]}}, "tensor 'a' has no dtype"),
        ({"a": {**ENTRY, "shape": [2, True]}}, "tensor 'a' has no dtype"),
        ({"a": {**ENTRY, "shape": [2] + 40 * [1]}}, "tensor 'a' has no dtype"),
        ({"a": {**ENTRY, "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}, "tensor 'a' has no dtype"),
        ({"a": {**ENTRY, "data_offsets": [8, 0]}}, "tensor 'a' has no dtype"),
        ({"a": {**ENTRY, "shape": [10**9], "data_offsets": [0, 4 * 10**9]}}, "its tensors end at byte"),
        ({"a": ENTRY, "b": ENTRY}, "tensor 'b' is not where the one before it ends"),
        ({"a": {**ENTRY, "shape": [1], "data_offsets": [4, 8]}}, "tensor 'a' is not where"),
        ({"a": {**ENTRY, "shape": [1], "data_offsets": [0, 4]}}, "its tensors end at byte"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ],
)
def test_headers_that_do_not_describe_the_bytes_are_refused(tmp_path, header, problem):
    file = write(tmp_path / "a.safetensors", header)
    with pytest.raises(GhostifyError, match=rf"a\.safetensors: is damaged or not a safetensors file \(.*{problem}"):
        read_tensors(file)


@pytest.mark.parametrize("content", [b"", b"1234", (HEADER_LIMIT + 1).to_bytes(8, "little"), b"\xff" * 16])
def test_files_without_a_whole_header_are_refused(tmp_path, content):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(GhostifyError, match=r"not a safetensors file"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_sparse_file_behind_a_large_header_is_not_read(tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes((2**34).to_bytes(8, "little"))
    os.truncate(file, 2**34 + 2**10)
    with pytest.raises(GhostifyError, match=r"a header of 17179869184 bytes"):
        read_tensors(file)


@pytest.mark.parametrize(
    ("needed", "problem"),
    [
        ({}, "tensor 'a' is not part of the model"),
        ({"a": TensorFacts(), "b": TensorFacts()}, "tensor 'b' is missing"),
        ({"a": TensorFacts(shape=(3,), dtype="float32")}, r"tensor 'a' has shape \[2\], not \[3\]"),
        ({"a": TensorFacts(shape=(), dtype="float32")}, r"tensor 'a' has shape \[2\], not \[\]"),
        ({"a": TensorFacts(shape=(2,), dtype="float64")}, "tensor 'a' has dtype float32, not float64"),
        ({"a": TensorFacts(channels_last=True)}, "tensor 'a' has 1 dimensions, which have no order of channels"),
    ],
)
def test_other_tensors_than_needed_are_refused(tmp_path, needed, problem):
    file = write(tmp_path / "a.safetensors", {"a": ENTRY})
    with pytest.raises(GhostifyError, match=rf"a\.safetensors: does not fit description: {problem}\. Save it again\.$"):
        read_tensors(file, needed=needed)


def test_integers_that_need_gradients_are_refused(tmp_path):
    file = write(tmp_path / "a.safetensors", {"a": {**ENTRY, "dtype": "I32"}})
    with pytest.raises(GhostifyError, match="has dtype int32, which takes no gradient"):
        read_tensors(file, needed={"a": TensorFacts(requires_grad=True)})


def test_a_file_of_another_digest_is_refused(tmp_path):
    file = write(tmp_path / "a.safetensors", {"a": ENTRY})
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert read_tensors(file, digest=digest, needed={"a": TensorFacts(shape=(2,), dtype="float32")})["a"].shape == (2,)
    with pytest.raises(GhostifyError, match="is damaged or belongs to another description"):
        read_tensors(file, digest=digest[::-1])


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "a.safetensors", {"a": ENTRY})
    (tmp_path / "out/a.safetensors").symlink_to("../a.safetensors")
    with pytest.raises(GhostifyError, match="is a link out of"):
        read_tensors(tmp_path / "out/a.safetensors")
