import json

import torch
from rich.console import Console

from ghostify.cli import demo
from ghostify.data import datasets
from ghostify.evaluation.metrics import predict, top1


def test_digits_split_and_scale():
    data = datasets.digits()
    assert len(data.train) + len(data.test) == 1797
    assert data.train.shape[1:] == (1, 8, 8)
    assert abs(float(torch.cat((data.train, data.test)).mean())) < 1e-3


def test_training_is_deterministic_and_learns():
    data = datasets.digits()
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = demo.ResidualNet(8, 8)
        demo.train(model, data.train, data.train_labels, epochs=6, flip=False)
        models.append(model)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert top1(predict(models[0], [data.test]), data.test_labels) > 80


def test_the_demo_tells_its_story(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "FASHION_MNIST", ())
    console = Console(width=100, stderr=True)
    results = demo.run_demo(tmp_path / "kept", console, as_json=True)
    original, free, calibrated, tuned = results
    assert original.macs > 1.7 * calibrated.macs
    assert calibrated.accuracy > free.accuracy
    assert calibrated.accuracy > original.accuracy - 5
    assert tuned.accuracy > original.accuracy - 3
    shown = capsys.readouterr()
    assert [r["name"] for r in json.loads(shown.out)] == [r.name for r in results]
    assert "bit-equal" in shown.err
    assert (tmp_path / "kept" / "converted" / "ghostify.json").exists()
