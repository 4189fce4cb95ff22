import os
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify import GhostifyError
from ghostify.fitting.activation_store import ActivationStore, FileTensor, SpillFile, trim_heap


@given(st.permutations(range(4)), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
def test_a_stored_tensor_is_loaded_with_its_strides(order, dtype):
    tensor = torch.randn(2, 3, 4, 5).to(dtype).permute(order)
    loaded = FileTensor(tensor, SpillFile()).load()
    assert torch.equal(loaded, tensor)
    assert (loaded.stride(), loaded.dtype) == (tensor.stride(), tensor.dtype)


def file_size(spill):
    return os.fstat(spill.file.fileno()).st_size


def test_a_slice_is_stored_without_the_rest_of_its_tensor():
    tensor, spill = torch.randn(8, 4)[2:5], SpillFile()
    stored = FileTensor(tensor, spill)
    assert file_size(spill) == 3 * 4 * 4
    assert torch.equal(stored.load(), tensor)


def test_the_file_shrinks_with_its_last_tensors_and_free_ranges_are_used_again():
    spill = SpillFile()
    stored = [FileTensor(torch.full((64,), float(k)), spill) for k in range(4)]
    del stored[1]
    assert file_size(spill) == 4 * 256
    stored.append(FileTensor(torch.full((64,), 4.0), spill))
    assert file_size(spill) == 4 * 256
    assert [float(t.load().mean()) for t in stored] == [0, 2, 3, 4]
    del stored[1:]
    assert file_size(spill) == 256
    stored.clear()
    assert file_size(spill) == 0


@pytest.mark.skipif(os.name != "posix", reason="elsewhere the file has a name until it is closed")
def test_the_file_has_no_name_and_is_gone_however_the_process_ends():
    spill = SpillFile()
    stored = FileTensor(torch.zeros(4), spill)
    assert os.fstat(spill.file.fileno()).st_nlink == 0
    assert torch.equal(stored.load(), torch.zeros(4))


def test_the_store_respects_its_limit_and_memory_is_freed():
    store, value = ActivationStore(150), torch.arange(20.0).reshape(4, 5).T
    stored_value = store.put(value)
    assert torch.equal(stored_value, value)
    assert (stored_value.stride(), stored_value is value) == (value.stride(), False)
    assert store.put(stored_value) is stored_value
    assert isinstance(store.put(value), FileTensor)
    assert store.put(7) == 7
    view = stored_value[1:]
    del stored_value
    assert isinstance(store.put(value), FileTensor)
    del view
    assert isinstance(store.put(value), torch.Tensor)


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 9)), max_size=30))
def test_stored_values_never_overlap_and_all_memory_is_freed(requests):
    store, stored = ActivationStore(1024), []
    for number, (size, removed) in enumerate(requests):
        value = torch.full((size,), float(number))
        stored_value = store.put(value)
        stored.append((stored_value, number))
        if removed < len(stored):
            stored.pop(removed)
        del stored_value
        assert all((t == n).all() for t, n in stored if isinstance(t, torch.Tensor))
    del stored
    assert store.free_ranges.ranges == [(0, 1024)]
    assert store.file.file is None or file_size(store.file) == 0


def test_trimming_the_heap_changes_no_value():
    value = torch.arange(5)
    trim_heap()
    assert value.sum() == 10


@pytest.mark.parametrize(
    "value", [torch.zeros(9, 9)[:, ::2], torch.zeros(1).expand(99), (torch.zeros(99),), torch.zeros(0)]
)
def test_other_values_than_dense_tensors_are_not_moved(value):
    assert ActivationStore(0).put(value) is value
    tensor = torch.zeros(9)
    assert ActivationStore(0).put(tensor, movable=False) is tensor


def test_a_full_disk_is_a_ghostify_error(monkeypatch):
    def full(**_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(GhostifyError, match=r"writing the activations of the calibration failed \(No space left"):
        FileTensor(torch.zeros(4), SpillFile())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a full device is known on Linux only")
def test_a_disk_that_gets_full_keeps_the_tensors_that_are_stored():
    spill = SpillFile()
    stored = FileTensor(torch.arange(32.0), spill)
    file = spill.file
    spill.file = open("/dev/full", "rb+", buffering=0)  # noqa: SIM115
    with spill.file, pytest.raises(GhostifyError, match="No space left"):
        FileTensor(torch.zeros(64), spill)
    spill.file = file
    assert torch.equal(stored.load(), torch.arange(32.0))
    assert torch.equal(FileTensor(torch.ones(8), spill).load(), torch.ones(8))
