import pytest
import torch
from torch import nn

from ghostify.evaluation.metrics import predict
from ghostify.graph.modes import eval_mode


def test_modes_are_restored_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[1].eval()
    with pytest.raises(RuntimeError):
        predict(model, [torch.zeros(1, 3)])
    assert [m.training for m in model.modules()] == [True, True, False]
    with eval_mode(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
