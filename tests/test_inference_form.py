import copy
from dataclasses import dataclass

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_structure

from ghostify import GhostifyError, ghostify, load, report, save
from ghostify.deployment.inference_form import deploy
from ghostify.modules.ghost import GhostModule
from tests import nets

NETWORKS = pytest.mark.parametrize("make", [*nets.ALL, nets.Wild, nets.Methods], ids=lambda c: c.__name__)
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


@NETWORKS
@FORMS
def test_the_inference_form_has_the_models_outputs(make, form):
    model = converted(make, form)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    deployed = deploy(model, nets.images(2))
    for x in (nets.images(2), nets.images(3, 16)):
        torch.testing.assert_close(deployed(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not any(p.requires_grad for p in deployed.parameters())
    assert not deployed.training


@FORMS
def test_norms_and_ghost_modules_are_gone(form):
    deployed = deploy(converted(nets.Residual, form), nets.images(2))
    assert not norms(deployed)
    assert not [m for m in deployed.modules() if isinstance(m, GhostModule)]
    filters = [m.weight for m in deployed.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in filters)


@FORMS
@pytest.mark.parametrize("make", [nets.Residual, nets.Branches], ids=lambda c: c.__name__)
def test_an_inference_form_can_be_deployed_again(make, form):
    deployed, x = deploy(converted(make, form), nets.images(2)), nets.images(3)
    torch.testing.assert_close(deploy(deployed, x)(x), deployed(x), rtol=1e-4, atol=1e-5)


def reorders(module):
    return [n for n in module.graph.nodes if n.target is torch.index_select]


class GhostBefore(nn.Module):
    """A convolution, and the operator by this name between it and its consumers."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.stem, self.conv = nets.conv_norm(3, 8), nets.conv_norm(8, 8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.pool, self.flat = nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.squeeze, self.expand, self.last = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1)
        self.wide, self.fc, self.large = nn.Conv2d(16, 6, 1), nn.Linear(8, 5), nn.Linear(8 * 36, 5)

    def forward(self, x):
        stem = self.stem(x)
        x = self.conv(stem)
        if self.operator == "linear":
            return self.fc(self.flat(self.pool(x)))
        if self.operator == "mean":
            return self.fc(x.mean((2, 3)))
        if self.operator == "maps to linear":
            return self.large(F.max_pool2d(x, 2).view(x.size(0), -1))
        if self.operator == "depthwise":
            return self.last(F.relu(self.depthwise(x)))
        if self.operator == "squeeze and excite":
            return self.last(x * self.expand(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid())
        if self.operator == "residual":
            return self.last(F.relu(x + stem))
        if self.operator == "concatenation":
            return self.wide(F.relu(self.norm(torch.cat((x, stem), 1))))
        if self.operator == "flip":
            return self.last(x.flip(1))
        return x


@pytest.mark.parametrize(
    ("operator", "remaining"),
    [("linear", 0), ("mean", 0), ("maps to linear", 0), ("depthwise", 0), ("squeeze and excite", 0), ("residual", 0),
     ("concatenation", 0), ("flip", 1), ("output", 1)],
)  # fmt: skip
def test_consumers_are_permuted_in_place_of_outputs(operator, remaining):
    torch.manual_seed(1)
    model, x = nets.settle(GhostBefore(operator)), nets.images(2)
    model_with_ghost = ghostify(model, targets="conv.0", example_inputs=x)
    ghost = next(m for m in model_with_ghost.modules() if isinstance(m, GhostModule))
    if ghost.order is None:
        ghost.order = torch.randperm(8)
    deployed = deploy(model_with_ghost, x)
    torch.testing.assert_close(deployed(x), model_with_ghost(x), rtol=1e-4, atol=1e-5)
    assert len(reorders(deployed)) == remaining


def test_pointwise_ghosts_become_dense_where_their_output_would_be_reordered():
    deployed = deploy(converted(nets.Residual, {"cheap": "pointwise"}), nets.images(2))
    assert not reorders(deployed)
    assert not [n for n in deployed.graph.nodes if n.target is torch.cat]


def test_a_norm_with_zero_scale_does_not_divide_by_zero():
    model, x = nets.settle(nets.Straight()), nets.images(2)
    with torch.no_grad():
        model.a[1].weight[:5] = 0
    model_with_ghost = ghostify(model, targets="a.0", example_inputs=x)
    deployed = deploy(model_with_ghost, x)
    assert torch.isfinite(deployed(x)).all()
    torch.testing.assert_close(deployed(x), model_with_ghost(x), rtol=1e-4, atol=1e-5)


def test_an_original_can_be_deployed_too():
    model, x = nets.settle(nets.Residual()), nets.images(2)
    deployed = deploy(model, x)
    torch.testing.assert_close(deployed(x), model(x), rtol=1e-4, atol=1e-5)
    assert not norms(deployed)
    assert norms(model)


def test_a_deployed_model_saves_loads_and_copies(tmp_path):
    model = converted(nets.Branches, {})
    deployed = deploy(model, nets.images(2))
    assert report(deployed) == report(model)
    x = nets.images(3)
    assert torch.equal(load(save(deployed, tmp_path / "out"))(x), deployed(x))
    assert torch.equal(copy.deepcopy(deployed)(x), deployed(x))


def test_the_mode_is_fixed():
    model = converted(nets.Branches, {}).train()
    deployed = deploy(model, nets.images(2))
    assert isinstance(deployed, fx.GraphModule)
    x = nets.images(2)
    assert torch.equal(deployed.train()(x), deployed.eval()(x))
    assert model.training


def test_a_model_that_does_not_run_is_an_error():
    with pytest.raises(GhostifyError, match="the model does not run on them"):
        deploy(converted(nets.Straight, {}), torch.rand(1, 4, 8, 8))


class Answering(nets.Straight):
    """Answers with `answer` of its features, which `layer` may compute further."""

    def __init__(self, answer, layer=None):
        super().__init__()
        self.answer, self.layer = answer, layer or nn.Identity()

    def forward(self, x):
        return self.layer(self.answer(self.b(self.a(self.stem(x)))))


@dataclass
class Answer:
    scores: torch.Tensor
    threshold: float


@pytest.mark.parametrize(
    "answer",
    [
        lambda y: (y, y > 0.1, None, 3),
        lambda y: {"classes": y.mean((2, 3)).argmax(1), "half": y.half()},
        lambda y: [torch.complex(y, -y), [y.shape[1]]],
    ],
    ids=["tuple", "dict", "list"],
)
def test_outputs_of_any_type_are_compared(answer):
    x = nets.images(2)
    made = ghostify(nets.settle(Answering(answer)), targets="*", example_inputs=x)
    deployed = deploy(made, x)
    assert tree_structure(deployed(x)) == tree_structure(made(x))


class Stays(Answering):
    def forward(self, x):
        return x if x.sum() > 1e9 else super().forward(x)


def test_answers_in_objects_are_compared():
    x = nets.images(2)
    made = ghostify(nets.settle(Stays(lambda y: Answer(y.mean((2, 3)), 0.5))), example_inputs=x)
    deployed = deploy(made, x)
    torch.testing.assert_close(deployed(x).scores, made(x).scores, rtol=1e-4, atol=1e-4)


def test_an_output_that_differs_is_an_error_whatever_holds_it(monkeypatch):
    x = nets.images(2)
    made = ghostify(nets.settle(Stays(lambda y: Answer(y.mean((2, 3)), 0.5))), example_inputs=x)
    monkeypatch.setattr(
        "ghostify.deployment.inference_form._to_channels_last", lambda m: nn.init.zeros_(next(m.parameters()))
    )
    with pytest.raises(GhostifyError, match=r"differs from the model: output\.scores differs by"):
        deploy(made, x)


def test_outputs_with_another_number_of_rows_are_named():
    rows, x = [9], nets.images(4)
    made = ghostify(nets.settle(Stays(lambda y: (y, y[: rows[0]]))), example_inputs=x)
    rows[0] = 3

    def find_one_less(*_):
        rows[0] = 2

    made.register_forward_hook(find_one_less)
    with pytest.warns(UserWarning, match=r"not compared with the model's: output\[1\] has 2 rows in place of 3"):
        deploy(made, x)


@pytest.mark.parametrize(
    ("layer", "shaped"),
    [
        (nn.Conv3d(16, 4, 1), lambda y: y[:, :, None]),
        (nn.Conv1d(16, 4, 3), lambda y: y.flatten(2)),
        (nn.ConvTranspose2d(16, 4, 2, 2), lambda y: y),
        (nn.ConvTranspose3d(16, 4, 1), lambda y: y[:, :, None]),
        (nn.Sequential(nn.Conv3d(16, 4, 1), nn.BatchNorm3d(4)), lambda y: y[:, :, None]),
        (nn.Linear(6, 4), lambda y: y),
    ],
    ids=["Conv3d", "Conv1d", "ConvTranspose2d", "ConvTranspose3d", "BatchNorm3d", "Linear"],
)
def test_layers_over_other_dimensions_stay_beside_convolutions(layer, shaped):
    x = nets.images(2)
    made = ghostify(nets.settle(Answering(shaped, layer)), targets="*", example_inputs=x)
    torch.testing.assert_close(deploy(made, x)(x), made(x), rtol=1e-4, atol=1e-4)


def test_a_model_that_overwrites_its_input_is_deployed():
    class Overwriting(nets.Straight):
        def forward(self, x):
            return super().forward(x.add_(1))

    x = nets.images(2)
    made = ghostify(nets.settle(Overwriting()), targets="*", example_inputs=x.clone())
    given = x.clone()
    deployed = deploy(made, given)
    assert torch.equal(given, x)
    torch.testing.assert_close(deployed(x.clone()), made(x.clone()), rtol=1e-4, atol=1e-4)


def test_half_precision_within_is_permitted_the_tolerance_of_half_precision():
    class Cast(nets.Straight):
        def forward(self, x):
            return super().forward(x.bfloat16()).float()

    x = nets.images(2)
    made = ghostify(nets.settle(Cast()).bfloat16(), targets="*", example_inputs=x)
    assert deploy(made, x)(x).dtype == torch.float32


class _ReadsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
        self.conv, self.norm = nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(self.stem(x))) * self.conv.weight.abs().mean()


class _OverwritesInput(_ReadsWeight):
    def forward(self, x):
        return self.norm(self.conv(self.stem(x.mul_(2))))


class _UnderAutocast(_ReadsWeight):
    @torch.autocast("cpu", dtype=torch.bfloat16)
    def forward(self, x):
        return self.norm(self.conv(self.stem(x))).float()


class _EnablesGradients(_ReadsWeight):
    def forward(self, x):
        with torch.set_grad_enabled(not self.training):
            x = self.conv(self.stem(x))
        return self.norm(x)


@pytest.mark.parametrize("network", [_ReadsWeight, _OverwritesInput, _UnderAutocast, _EnablesGradients])
def test_models_that_read_weights_overwrite_inputs_or_set_modes_are_fitted_and_deployed(network):
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(4, 3, 12, 12)
    model.norm.running_mean.normal_()
    given = x.clone()
    options = {"example_inputs": x, "calibration": [x, x + 0.1]}
    for converted in (ghostify(model, 2, **options), ghostify(model, cheap="auto", budget={"macs": 0.8}, **options)):
        deployed = deploy(converted, x)
        assert torch.equal(x, given)
        with torch.no_grad():
            torch.testing.assert_close(deployed(x.clone()), converted.eval()(x.clone()), atol=0.05, rtol=0.05)
