from ghostify.cli import doctor


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(doctor.EXTRAS, "export", ("onnx", "no-such-package"))
    monkeypatch.setattr(doctor, "fashion_mnist_folder", lambda: None)
    found = doctor.collect_facts()
    assert found["extra export"] == "no-such-package not installed: pip install 'ghostify[export]'"
    assert found["Fashion-MNIST"] == "not on this machine"
    assert found["runtime onnx"].startswith("onnxruntime 1.")
    assert {"python", "torch", "timm", "accelerator", "threads of PyTorch"} <= set(found)
