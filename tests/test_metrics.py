import pytest
import torch

from ghostify.evaluation.metrics import relative_error, top1


def test_measures_by_hand():
    answers = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 2.0], [0.0, 4.0]])
    assert top1(answers, torch.tensor([0, 1, 1, 1])) == 75
    assert relative_error(answers, answers) == 0
    assert relative_error(answers.mean(0).expand(4, 2), answers) == pytest.approx(1)
