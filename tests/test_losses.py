import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from ghostify.training.losses import distillation_loss, feature_loss, relative_map_error


@given(st.integers(0, 99), st.floats(0.5, 8))
def test_the_loss_of_logits_is_the_divergence_of_softened_probabilities(seed, temperature):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64).float() for _ in range(2))
    p, q = ((x / temperature).softmax(1) for x in (teacher, student))
    expected = (p * (p.log() - q.log())).sum(1).mean() * temperature**2
    assert distillation_loss(student, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-6)
    assert distillation_loss(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-6)
    assert distillation_loss(student, teacher, temperature) >= 0


def test_a_hot_divergence_has_the_gradient_of_squared_errors():
    """Hinton et al., 2015, section 2.1: (s - t) / N of centred logits, divided by the temperature, times T^2."""
    teacher = torch.randn(4, 7, dtype=torch.float64)
    student = (teacher + 0.1 * torch.randn(4, 7, dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, 1e3), student)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    torch.testing.assert_close(gradient, centred.detach() / 7 / 4, rtol=1e-2, atol=1e-3)


def test_the_error_of_maps_ignores_constant_shifts():
    teacher = torch.randn(3, 4, 5, 5)
    assert relative_map_error(teacher + torch.arange(4.0)[:, None, None], teacher).item() == pytest.approx(0, abs=1e-6)
    assert relative_map_error(torch.zeros_like(teacher), teacher).item() == pytest.approx(1, abs=1e-5)
    assert distillation_loss(torch.zeros_like(teacher), teacher).item() == pytest.approx(1, abs=1e-5)
    mean = feature_loss([teacher, torch.zeros_like(teacher)], [teacher, teacher])
    assert mean.item() == pytest.approx(0.5, abs=1e-5)
    assert relative_map_error(torch.ones(3, 2), torch.ones(3, 2)).item() == 0


def test_the_loss_goes_down_along_its_gradient():
    teacher, student = torch.randn(8, 3), torch.randn(8, 3, requires_grad=True)
    before = distillation_loss(student, teacher)
    before.backward()
    after = distillation_loss(student.detach() - 0.5 * student.grad, teacher)
    assert after < before
    assert torch.isfinite(F.softmax(student, 1)).all()
