import re

from ghostify.cli import doctor


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
