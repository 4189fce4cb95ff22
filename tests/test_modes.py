import random

import numpy as np
import pytest
import torch
from torch import nn

from ghostify.graph.modes import eval_mode


def test_modes_are_restored_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)).train()
    model[1].eval()
    with eval_mode(model):
        assert not model[0].training
        assert not torch.is_grad_enabled()
    with pytest.raises(RuntimeError), eval_mode(model):
        model(torch.zeros(1, 3))
    assert [m.training for m in model.modules()] == [True, True, False]


def test_random_numbers_drawn_inside_are_drawn_again_outside():
    with eval_mode(nn.Identity()):
        inside = torch.rand(1).item(), np.random.rand(), random.random()
    assert inside == (torch.rand(1).item(), np.random.rand(), random.random())
