"""Folders that earlier versions saved still load, and give the same outputs to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ghostify import load, report

FOLDERS = sorted(p for p in (Path(__file__).parent / "data/format1").iterdir() if p.is_dir())


@pytest.fixture
def one_thread():
    """Sums over several threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_a_folder_of_format_1_gives_its_saved_outputs(folder):
    values = load_file(folder.with_name(f"{folder.name}.io.safetensors"))
    inputs = [values[k] for k in sorted(values) if k.startswith("input")]
    expected = [values[k] for k in sorted(values) if k.startswith("output")]
    model = load(folder).eval()
    with torch.no_grad():
        outputs = model(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    assert len(outputs) == len(expected)
    same_kernels = torch.backends.cpu.get_cpu_capability() == "AVX512"  # as where the folders were saved
    tolerance = 0.0 if same_kernels else 1e-6
    for output, value in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_a_folder_of_format_1_keeps_its_report(folder):
    assert report(load(folder)).rewritten > 0
