import pytest
import torch
from torch import nn

from ghostify.evaluation.metrics import interleaved_latency_ms, relative_error, top1


def test_measures_by_hand():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.0, 4.0]])
    assert top1(outputs, torch.tensor([0, 1, 1, 1])) == 75
    assert relative_error(outputs, outputs) == 0
    assert relative_error(outputs.mean(0).expand(4, 2), outputs) == pytest.approx(1)


def test_a_model_that_does_more_takes_longer():
    small, big = nn.Conv2d(8, 8, 3), nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(12)])
    small_ms, big_ms = interleaved_latency_ms([small, big], [torch.zeros(4, 8, 64, 64)] * 2, rounds=5)
    assert 0 < small_ms < big_ms
