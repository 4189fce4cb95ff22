import gc
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ghostify import GhostifyError
from ghostify.fitting.activation_store import ActivationStore, FileTensor, trim_heap


@given(st.permutations(range(4)), st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]))
def test_a_stored_tensor_comes_back_with_its_strides(order, dtype):
    tensor = torch.randn(2, 3, 4, 5).to(dtype).permute(order)
    back = FileTensor(tensor).load()
    assert torch.equal(back, tensor)
    assert (back.stride(), back.dtype) == (tensor.stride(), tensor.dtype)


def test_a_slice_is_stored_without_what_it_was_cut_from():
    tensor = torch.randn(8, 4)[2:5]
    stored = FileTensor(tensor)
    assert Path(stored.path).stat().st_size == 3 * 4 * 4
    assert torch.equal(stored.load(), tensor)


def test_the_file_goes_with_the_object():
    stored = FileTensor(torch.zeros(4))
    path = Path(stored.path)
    assert path.exists()
    del stored
    gc.collect()
    assert not path.exists()


def test_the_shelf_keeps_to_its_limit_and_room_comes_back():
    shelf, value = ActivationStore(150), torch.arange(20.0).reshape(4, 5).T
    kept = shelf.put(value)
    assert torch.equal(kept, value)
    assert (kept.stride(), kept is value) == (value.stride(), False)
    assert shelf.put(kept) is kept
    assert isinstance(shelf.put(value), FileTensor)
    assert shelf.put(7) == 7
    view = kept[1:]
    del kept
    assert isinstance(shelf.put(value), FileTensor)
    del view
    assert isinstance(shelf.put(value), torch.Tensor)


@given(st.lists(st.tuples(st.integers(1, 90), st.integers(0, 9)), max_size=30))
def test_rooms_never_overlap_and_all_come_back(orders):
    shelf, held = ActivationStore(1024), []
    for number, (size, victim) in enumerate(orders):
        value = torch.full((size,), float(number))
        kept = shelf.put(value)
        held.append((kept, number))
        if victim < len(held):
            held.pop(victim)
        del kept
        assert all((t == n).all() for t, n in held if isinstance(t, torch.Tensor))
    del held
    assert shelf.free_ranges == [(0, 1024)]


def test_tidying_changes_nothing():
    value = torch.arange(5)
    trim_heap()
    assert value.sum() == 10


@pytest.mark.parametrize(
    "value", [torch.zeros(9, 9)[:, ::2], torch.zeros(1).expand(99), (torch.zeros(99),), torch.zeros(0)]
)
def test_what_is_not_one_dense_tensor_stays(value):
    assert ActivationStore(0).put(value) is value
    tensor = torch.zeros(9)
    assert ActivationStore(0).put(tensor, movable=False) is tensor


def test_a_full_disk_is_told_in_one_line(monkeypatch):
    def full(**_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", full)
    with pytest.raises(GhostifyError, match=r"writing the activations of the calibration failed \(No space left"):
        FileTensor(torch.zeros(4))
