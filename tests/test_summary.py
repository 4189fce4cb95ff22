import copy
import json
import pickle

import pytest
import torch

from ghostify import GhostifyError, ghostify, report
from ghostify.summary import ConversionInfo, Report, attach_report, conversion_info
from tests import nets


def converted():
    return ghostify(nets.settle(nets.Residual()), example_inputs=nets.images(1), calibration=nets.images())


def test_a_report_survives_json():
    summary = report(converted())
    assert Report.from_dict(json.loads(json.dumps(summary.to_dict()))) == summary


def test_a_report_of_an_earlier_version_has_no_forecast():
    data = report(converted()).to_dict()
    earlier = {key: value for key, value in data.items() if key not in ("forecast", "measured", "measurements")}
    read = Report.from_dict(earlier)
    assert (read.forecast, read.measured, read.measurements) == (None, None, 0)


def test_layers_add_up_to_the_totals():
    model = converted()
    summary = report(model)
    saved = sum(layer.macs_before - layer.macs_after for layer in summary.layers)
    assert summary.macs_before - summary.macs_after == saved
    weights = sum(p.numel() for n, p in model.named_parameters() if "bn" not in n and "stem.1" not in n)
    assert sum(layer.params_after for layer in summary.layers) == weights


def test_copies_and_pickles_keep_the_report_and_the_source():
    model = converted()
    attach_report(model, report(model), {"name": "timm:x"})
    info = ConversionInfo(report(model), {"name": "timm:x"})
    assert conversion_info(copy.deepcopy(model)) == info
    assert pickle.loads(pickle.dumps(conversion_info(model))) == info
    with pytest.raises(GhostifyError, match="Conv2d: has no report"):
        report(torch.nn.Conv2d(1, 1, 1))
