import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from ghostify import GhostifyError, ghostify, load, report, save
from ghostify.deployment.inference_form import deploy
from ghostify.modules.ghost import GhostModule
from tests import nets

EVERY = pytest.mark.parametrize("make", [*nets.ALL, nets.Wild, nets.Methods], ids=lambda c: c.__name__)
FORMS = pytest.mark.parametrize(
    "form",
    [{}, {"ratio": 3}, {"cheap": "pointwise"}, {"cheap": 2}, {"dw_size": 1}, {"activated": True}],
    ids=["depthwise", "uneven", "pointwise", "grouped", "one pixel", "activated"],
)


def converted(make, form):
    torch.manual_seed(0)
    model, x = nets.settle(make()), nets.images(32)
    images = [x] if "activated" in form else None
    return ghostify(model, targets="*", example_inputs=x[:2], calibration=images, **form)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@EVERY
@FORMS
def test_the_inference_form_answers_as_the_model_does(make, form):
    made = converted(make, form)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    small = deploy(made, nets.images(2))
    for x in (nets.images(2), nets.images(3, 16)):
        torch.testing.assert_close(small(x), made.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert not any(p.requires_grad for p in small.parameters())
    assert not small.training


@FORMS
def test_norms_and_ghost_modules_are_gone(form):
    small = deploy(converted(nets.Residual, form), nets.images(2))
    assert not norms(small)
    assert not [m for m in small.modules() if isinstance(m, GhostModule)]
    filters = [m.weight for m in small.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in filters)


def gathers(module):
    return [n for n in module.graph.nodes if n.target is torch.index_select]


class Wired(nn.Module):
    """A ghost whose order must go through what stands behind: by name."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.stem, self.conv = nets.conv_norm(3, 8), nets.conv_norm(8, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.pool, self.flat = nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.squeeze, self.expand, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1)
        self.wide, self.fc, self.large = nn.Conv2d(16, 6, 1), nn.Linear(8, 5), nn.Linear(8 * 36, 5)

    def forward(self, x):
        stem = self.stem(x)
        x = self.conv(stem)
        if self.how == "linear":
            return self.fc(self.flat(self.pool(x)))
        if self.how == "mean":
            return self.fc(x.mean((2, 3)))
        if self.how == "maps to linear":
            return self.large(F.max_pool2d(x, 2).view(x.size(0), -1))
        if self.how == "depthwise":
            return self.last(F.relu(self.depthwise(x)))
        if self.how == "squeeze and excite":
            return self.last(x * self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid())
        if self.how == "residual":
            return self.last(F.relu(x + stem))
        if self.how == "concatenation":
            return self.wide(F.relu(self.norm(torch.cat((x, stem), 1))))
        if self.how == "flip":
            return self.last(x.flip(1))
        return x


@pytest.mark.parametrize(
    ("how", "left"),
    [("linear", 0), ("mean", 0), ("maps to linear", 0), ("depthwise", 0), ("squeeze and excite", 0), ("residual", 0),
     ("concatenation", 0), ("flip", 1), ("output", 1)],
)  # fmt: skip
def test_orders_are_taken_up_by_whoever_reads(how, left):
    torch.manual_seed(1)
    model, x = nets.settle(Wired(how)), nets.images(2)
    made = ghostify(model, targets="conv.0", example_inputs=x)
    ghost = next(m for m in made.modules() if isinstance(m, GhostModule))
    if ghost.order is None:
        ghost.order = torch.randperm(8)
    small = deploy(made, x)
    torch.testing.assert_close(small(x), made(x), rtol=1e-4, atol=1e-5)
    assert len(gathers(small)) == left


def test_pointwise_ghosts_become_dense_rather_than_gathered():
    made = converted(nets.Residual, {"cheap": "pointwise"})
    small = deploy(made, nets.images(2))
    assert not gathers(small)
    assert not [n for n in small.graph.nodes if n.target is torch.cat]


def test_a_norm_without_scale_does_not_divide_by_nothing():
    model, x = nets.settle(nets.Straight()), nets.images(2)
    with torch.no_grad():
        model.a[1].weight[:5] = 0
    made = ghostify(model, targets="a.0", example_inputs=x)
    small = deploy(made, x)
    assert torch.isfinite(small(x)).all()
    torch.testing.assert_close(small(x), made(x), rtol=1e-4, atol=1e-5)


def test_an_original_can_be_deployed_too():
    model, x = nets.settle(nets.Residual()), nets.images(2)
    small = deploy(model, x)
    torch.testing.assert_close(small(x), model(x), rtol=1e-4, atol=1e-5)
    assert not norms(small)
    assert norms(model)


def test_a_deployed_model_saves_loads_and_copies(tmp_path):
    made = converted(nets.Branches, {})
    small = deploy(made, nets.images(2))
    assert report(small) == report(made)
    x = nets.images(3)
    assert torch.equal(load(save(small, tmp_path / "out"))(x), small(x))
    assert torch.equal(copy.deepcopy(small)(x), small(x))


def test_modes_are_settled():
    made = converted(nets.Branches, {}).train()
    small = deploy(made, nets.images(2))
    assert isinstance(small, fx.GraphModule)
    x = nets.images(2)
    assert torch.equal(small.train()(x), small.eval()(x))
    assert made.training


def test_what_does_not_run_is_one_line():
    with pytest.raises(GhostifyError, match="does not run on example_inputs"):
        deploy(converted(nets.Straight, {}), torch.rand(1, 4, 8, 8))
