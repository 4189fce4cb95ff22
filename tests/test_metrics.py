import pytest
import torch

from ghostify.evaluation.metrics import relative_error, top1


def test_measures_by_hand():
    outputs = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.0, 4.0]])
    assert top1(outputs, torch.tensor([0, 1, 1, 1])) == 75
    assert relative_error(outputs, outputs) == 0
    assert relative_error(outputs.mean(0).expand(4, 2), outputs) == pytest.approx(1)
