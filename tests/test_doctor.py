import re
import sys
from pathlib import Path

from ghostify.cli import doctor

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "export", ("onnx", "no-such-package"))
    monkeypatch.setattr(doctor, "fashion_mnist_folder", lambda: None)
    facts = doctor.collect_facts()
    assert facts["extra_export"] == "no-such-package not installed: pip install 'ghostify[export]'"
    assert facts["fashion_mnist"] == "not on this machine"
    assert facts["runtime_onnx"].startswith("onnxruntime 1.")
    assert {"python", "torch", "timm", "accelerator", "pytorch_threads"} <= set(facts)
    assert all(re.fullmatch("[a-z0-9_]+", key) for key in facts)
    assert set(doctor.LABELS) <= set(facts)


def test_extras_are_those_of_the_package():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {
        extra: tuple(re.split(r"[\[>=]", requirement)[0] for requirement in requirements)
        for extra, requirements in project["optional-dependencies"].items()
        if extra in doctor.EXTRAS
    }
    assert declared == doctor.EXTRAS
