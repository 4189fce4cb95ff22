import importlib
import importlib.metadata
import shutil

import pytest
import torch

from ghostify import GhostifyError, ghostify, save
from ghostify.deployment.exporter import export
from ghostify.deployment.inference_form import deploy
from ghostify.runtimes.registry import (
    EXPORT_FORMATS,
    RUNTIMES,
    check_supported,
    installed_version,
    load_runner,
    require_runtime,
)
from ghostify.runtimes.tensors import ExportInputs, to_channels_last
from ghostify.timing.timer import LatencyTimer
from tests import nets

pytestmark = pytest.mark.filterwarnings("default")  # the exporters' own
ALL_RUNTIMES = pytest.mark.parametrize("name", RUNTIMES)
SLOW_ONES_MARKED = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * r.compiles_slowly) for n, r in RUNTIMES.items()]
)
WORKERS = [name for name, runtime in RUNTIMES.items() if not runtime.is_in_process]
COMPILED = [name for name, runtime in RUNTIMES.items() if runtime.package == "torch" and runtime.compiles_slowly]


def runtime_or_skip(name):
    """The runtime; skips the test where it does not work on this machine."""
    try:
        return require_runtime(name)
    except GhostifyError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiler_missing(monkeypatch):
    def fail():
        raise RuntimeError("no compiler")

    builder = importlib.import_module("torch._inductor.cpp_builder")
    monkeypatch.setattr(builder, "get_cpp_compiler", fail)


@ALL_RUNTIMES
def test_a_written_file_has_the_modules_outputs(name, tmp_path):
    """For any batch size, in both memory formats of the images."""
    runtime, x = runtime_or_skip(name), nets.images(1)
    deployed = deploy(nets.settle(nets.Residual()), x)
    file = runtime.write(deployed, ExportInputs((x,), {}), tmp_path)
    assert file.name == f"model{runtime.suffix}"
    assert list(tmp_path.glob(f"*{runtime.suffix}")) == [file]
    run = load_runner(file, threads=1, runtime=name, exclusive=False)
    for images in (x, to_channels_last(nets.images(3))):
        torch.testing.assert_close(run(images)[0], deployed(images), rtol=1e-3, atol=1e-4)


@SLOW_ONES_MARKED
@pytest.mark.parametrize("make", [nets.Residual, lambda: nets.conv_norm(3, 8)], ids=["model", "layer"])
def test_a_file_for_timing_has_the_modules_outputs_on_inputs_of_its_size(name, make, tmp_path):
    runtime, x = runtime_or_skip(name), nets.images(2)
    deployed = deploy(nets.settle(make()), x)
    run = runtime.load(runtime.write_for_timing(deployed, ExportInputs((x,), {}), tmp_path), 1, True)
    for images in (x, to_channels_last(x)):
        torch.testing.assert_close(run(images)[0], deployed(x), rtol=1e-3, atol=1e-4)


@SLOW_ONES_MARKED
def test_runtimes_load_folders_if_they_can(name, tmp_path):
    runtime, x = runtime_or_skip(name), nets.images(2)
    converted = ghostify(nets.settle(nets.Straight())).eval()
    folder = save(converted, tmp_path / "out")
    torch.testing.assert_close(load_runner(folder)(x)[0], converted(x), rtol=0, atol=0)
    if runtime.loads_folders:
        torch.testing.assert_close(load_runner(folder, runtime=name)(x)[0], converted(x), rtol=1e-3, atol=1e-4)
        return
    with pytest.raises(GhostifyError, match=rf"is a folder. Pass the {runtime.suffix} file in it to runtime '{name}'"):
        load_runner(folder, runtime=name)


@ALL_RUNTIMES
def test_the_version_is_that_of_the_package_and_part_of_the_latency_key(name, monkeypatch):
    runtime = runtime_or_skip(name)
    version = importlib.metadata.version(runtime.package)
    assert installed_version(runtime) == version
    assert LatencyTimer(name).version == f"{name} {version}"

    def missing(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    message = rf"runtime '{name}': needs {runtime.package}. Run pip install 'ghostify\[export\]'"
    with pytest.raises(GhostifyError, match=message):
        require_runtime(name)


def test_an_unknown_name_is_an_error():
    with pytest.raises(GhostifyError, match=r"runtime 'tflite': is unknown\. Use eager, compile, onnx, openvino, aot"):
        require_runtime("tflite")


@pytest.mark.parametrize("name", WORKERS)
def test_inputs_that_a_worker_process_cannot_run_are_errors(name):
    x = nets.images(1)
    for example, reason in (
        ({"x": x}, "takes no keyword inputs. Pass example_inputs as a tuple"),
        ((x, x.bfloat16()), r"is timed in float32. Convert model.float\(\)"),
        (x.to("meta"), "is timed on the CPU. Use runtime 'eager' on a GPU"),
    ):
        check_supported(RUNTIMES["eager"], example)
        with pytest.raises(GhostifyError, match=f"runtime '{name}': {reason}"):
            check_supported(RUNTIMES[name], example)


@pytest.mark.usefixtures("compiler_missing")
def test_only_compiling_runtimes_need_a_compiler(tmp_path):
    for name in COMPILED:
        with pytest.raises(GhostifyError, match=rf"'{name}': finds no C\+\+ compiler \(RuntimeError\)\. Install"):
            require_runtime(name)
    assert {r.unsupported(None) for n, r in RUNTIMES.items() if n not in COMPILED} == {None}
    with pytest.raises(GhostifyError, match=r"finds no C\+\+ compiler"):
        export(nets.settle(nets.Straight()), tmp_path / "out", format="aotinductor", example_inputs=nets.images(1))
    assert not list(tmp_path.iterdir())


def test_the_suffix_of_a_file_selects_the_runtime(tmp_path, monkeypatch):
    loaded = []
    for name, runtime in RUNTIMES.items():
        monkeypatch.setattr(type(runtime), "load", lambda *_, name=name: loaded.append(name))
    for format, runtime in EXPORT_FORMATS.items():
        file = tmp_path / f"model{runtime.suffix}"
        file.touch()
        load_runner(file)
        assert loaded.pop() == EXPORT_FORMATS[format].name
    assert list(EXPORT_FORMATS) == ["pt2", "onnx", "openvino", "aotinductor"]
    assert EXPORT_FORMATS["pt2"] is RUNTIMES["eager"]
    shutil.rmtree(tmp_path)
    with pytest.raises(GhostifyError, match=r"model\.onnx: does not exist\. Pass"):
        load_runner(tmp_path / "model.onnx")
    with pytest.raises(GhostifyError, match=r"Pass a file that ends in \.pt2, \.onnx, \.xml, \.aoti\.pt2"):
        load_runner(tmp_path / "model.txt")
