import json

import pytest
import torch
from rich.console import Console

from ghostify import GhostifyError
from ghostify.cli import demo
from ghostify.data import datasets


def test_digits_split_and_scale():
    data = datasets.digits()
    assert len(data.train) + len(data.test) == 1797
    assert data.train.shape[1:] == (1, 8, 8)
    assert abs(float(torch.cat((data.train, data.test)).mean())) < 1e-3


def test_the_demo_converts_and_saves(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "FASHION_MNIST", ())
    console = Console(width=100, stderr=True)
    results = demo.run_demo(tmp_path / "kept", console, as_json=True)
    original, data_free, calibrated, tuned = results
    assert original.macs > 1.7 * calibrated.macs
    assert calibrated.accuracy > data_free.accuracy
    assert calibrated.accuracy > original.accuracy - 5
    assert tuned.accuracy > original.accuracy - 3
    printed = capsys.readouterr()
    assert [r["name"] for r in json.loads(printed.out)] == [r.name for r in results]
    assert "bit-equal" in printed.err
    assert (tmp_path / "kept" / "converted" / "ghostify.json").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("", "holds other files"), ("file", "is a file"), ("file/more", "is a file")],
)
def test_other_places_than_a_new_folder_are_refused_before_the_training(tmp_path, name, message):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(GhostifyError, match=rf"^--output {tmp_path / name}: .*{message}"):
        demo.run_demo(tmp_path / name, Console(stderr=True))
    assert (tmp_path / "file").read_text() == "mine"
