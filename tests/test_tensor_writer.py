import errno

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ghostify.io import tensor_writer
from ghostify.io.tensor_writer import write_tensors


def test_views_and_other_memory_formats_are_written_with_their_values(tmp_path):
    base = torch.randn(2, 3, 4, 4)
    tensors = {"a": base, "b": base[1], "c": base.to(memory_format=torch.channels_last), "d": base.transpose(0, 1)}
    write_tensors(tmp_path / "t", tensors)
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(tmp_path / "t").items())


@pytest.mark.parametrize(
    ("message", "code"), [("I/O error: No space left on device (os error 28)", errno.ENOSPC), ("odd", errno.EIO)]
)
def test_a_disk_that_refuses_is_an_error_of_the_system(tmp_path, monkeypatch, message, code):
    def full(*_):
        raise SafetensorError(f"Error while serializing: {message}")

    monkeypatch.setattr(tensor_writer, "save_file", full)
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        write_tensors(tmp_path / "t", {})
    assert caught.value.errno == code
