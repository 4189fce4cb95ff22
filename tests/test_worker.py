import io
import json

import numpy as np
import torch
from torch import nn

from ghostify.deployment.inference_form import deploy
from ghostify.timing import worker
from ghostify.timing.timer import export_for_timing


def answers_to(requests, capsys):
    worker.run_worker("openvino", 1, io.StringIO("".join(json.dumps(r) + "\n" for r in requests)))
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_request_that_fails_is_answered_and_the_next_one_is_served(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(worker.sys, "stdout", worker.sys.stdout)  # run_worker sends other output to stderr
    x = torch.zeros(1, 3, 8, 8)
    good = export_for_timing(deploy(nn.Conv2d(3, 4, 3).eval(), x), "openvino", x, tmp_path / "good")
    bad = tmp_path / "bad.xml"
    failed, served = answers_to([{"files": [str(f)], "rounds": 2} for f in (bad, good)], capsys)
    assert failed["error"]
    assert len(served["times"][0]) == 2


def test_inputs_are_those_that_were_stored(tmp_path):
    x = torch.arange(96.0).reshape(2, 3, 4, 4)
    file = export_for_timing(deploy(nn.Conv2d(3, 4, 1).eval(), x), "openvino", x, tmp_path / "model")
    with np.load(file.with_name(worker.INPUTS)) as arrays:
        assert np.array_equal(arrays["arr_0"], x.numpy())
    (inputs,) = worker._open(file, "openvino", 1, exclusive=True).args
    assert torch.equal(inputs, x)
