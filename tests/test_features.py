import pytest
from torch import nn

from ghostify import GhostifyError, ghostify
from ghostify.training.features import collect_features
from ghostify.training.losses import relative_map_error
from tests import nets


def test_features_are_compared_in_one_order():
    """Also where the next layer absorbs the ghosts' order, and where channels are pruned."""
    model, x = nets.settle(nets.Straight(16)), nets.images(64)
    ghosted = ghostify(model, 1.1, cheap="pointwise", calibration=[x])
    assert ghosted.get_submodule("a.0").order is None
    student, teacher = collect_features(ghosted, model)
    ghosted(x), model(x)
    assert len(student) == 2
    assert all(relative_map_error(s, t) < 0.05 for s, t in zip(student, teacher, strict=True))
    pruning = {"prune": True, "cheap": "auto", "budget": {"macs": 0.6}, "example_inputs": x[:1]}
    for model in (nets.settle(nets.Inverted()), nets.settle(nets.Straight())):
        ghosted = ghostify(model, **pruning, calibration=[x])
        student, teacher = collect_features(ghosted, model)
        ghosted(x), model(x)
        assert [s.shape for s in student] == [t.shape for t in teacher]
        assert all(s.dim() == 4 for s in student)


def test_a_teacher_without_the_layer_is_refused_by_name():
    student = ghostify(nets.settle(nets.Straight()), 2)
    with pytest.raises(GhostifyError, match=r"a\.0: the original has no such module"):
        collect_features(student, nn.Sequential(nn.Flatten()))
