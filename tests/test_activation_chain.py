import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn import functional as F

from ghostify import GhostifyError, GhostModule, Policy, Rule, ghostify, load, plan, report, save, trace
from ghostify.deployment.inference_form import deploy
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.rewriting.activation_chain import copy_activation_chain, slice_chain
from tests import nets


class Functional(nn.Module):
    """Activations as functions, methods and a module with a norm of its own; no activation before the sum."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.c = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.both = BatchNormAct2d(width)
        self.d = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        x = F.silu(self.stem(x))
        x = F.relu(self.norm(self.a(x)), inplace=True)
        x = self.both(self.c(self.b(x).relu()))
        return x + self.d(x)


def targets(model):
    return {e.conv.name: e.activation for e in plan(trace(model), Policy((Rule(activated=True),))).rewrites}


def test_the_activation_behind_a_convolution_is_found():
    assert targets(nets.settle(Functional())) == {"a": "relu", "b": "relu_1", "c": "both", "d": None}
    assert targets(nets.settle(nets.Residual())) == {"conv1": "relu", "conv2": None}
    assert not any(e.activation for e in plan(trace(nets.settle(Functional()))).rewrites)


class Slopes(nn.Module):
    """Activations with arguments or parameters, as functions and as a module, and one written out."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.a, self.b, self.c, self.d = (nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.norm, self.act = nn.BatchNorm2d(width), nn.PReLU(width)
        self.slopes = nn.Parameter(torch.linspace(0.1, 0.9, width))
        nn.init.uniform_(self.act.weight, 0.1, 0.9)

    def forward(self, x):
        x = F.leaky_relu(self.a(self.stem(x)), 0.3)
        x = self.act(self.norm(self.b(x)))
        x = F.prelu(self.c(x), self.slopes)
        x = self.d(x)
        return x * torch.sigmoid(x)


def test_activations_with_arguments_and_parameters_are_found():
    model = nets.settle(Slopes())
    assert targets(model) == {"a": "leaky_relu", "b": "act", "c": "prelu", "d": "mul"}


def test_the_slopes_of_the_chosen_channels_are_kept():
    model = nets.settle(Slopes())
    program = trace(model)
    entry = next(e for e in plan(program, Policy((Rule(activated=True),))).rewrites if e.conv.name == "b")
    line, kept = copy_activation_chain(program.subgraphs[""], entry), torch.tensor([5, 0, 3])
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(slice_chain(line, kept)(x[:, kept]), line(x)[:, kept])


def test_it_loses_no_more_than_the_linear_form_on_held_out_images():
    for make in (nets.Straight, nets.Residual, Functional):
        model, x = nets.settle(make()), nets.images(64, 16)
        errors = []
        for activated in (False, True):
            found = report(ghostify(model, activated=activated, calibration=x.split(16)))
            errors.append({line.name: line.holdout_error for line in found.layers if line.skip_reason is None})
        first = next(iter(errors[0]))
        assert errors[1][first] <= errors[0][first]


class Rectified(nn.Module):
    """Half of `conv`'s maps are the rectified others, which no linear operation on these gives."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        nn.init.dirac_(self.conv.weight)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.relu(self.norm(self.conv(torch.cat((x, x.relu()), 1)))))


class Sloped(Rectified):
    """The same with slopes that differ between the channels."""

    def __init__(self):
        super().__init__()
        self.relu = nn.PReLU(8)
        with torch.no_grad():
            self.relu.weight.copy_(torch.tensor([0.1, 0.3, 0.5, 0.7] * 2))

    def forward(self, x):
        x = self.stem(x)
        return self.last(self.relu(self.norm(self.conv(torch.cat((x, F.prelu(x, self.relu.weight[:4])), 1)))))


def test_ghosts_read_through_the_slopes_of_their_own_channels():
    torch.manual_seed(0)
    model, test = Sloped().eval(), [nets.images(16, 16, seed=3)]
    gm = ghostify(model, targets="conv", activated=True, calibration=nets.images(64, 16).split(16))
    assert chosen(gm)
    assert relative_error(predict(gm, test), predict(model, test)) < 1e-6
    small = deploy(gm, test[0])
    torch.testing.assert_close(predict(small, test), predict(gm, test), rtol=1e-4, atol=1e-5)


def activated_ghost():
    torch.manual_seed(0)
    model = Rectified().eval()
    return ghostify(model, activated=True, calibration=nets.images(64, 16).split(16)), model


def test_maps_that_are_the_others_activated_are_recovered():
    _, model = activated_ghost()
    test = [nets.images(16, 16, seed=3)]
    linear = ghostify(model, targets="conv", calibration=nets.images(64, 16).split(16))
    only = ghostify(model, targets="conv", activated=True, calibration=nets.images(64, 16).split(16))
    reference = predict(model, test)
    assert relative_error(predict(linear, test), reference) > 1e-3
    assert relative_error(predict(only, test), reference) < 1e-6


def chosen(gm):
    return [m for m in gm.modules() if isinstance(m, GhostModule) and m.activation is not None]


def test_the_module_computes_what_the_papers_does():
    gm, _ = activated_ghost()
    ghost = chosen(gm)[0]
    x = torch.randn(2, ghost.primary_conv.in_channels, 9, 9)
    intrinsic = ghost.primary_conv(x)
    maps = torch.cat((intrinsic, ghost.cheap_operation(ghost.activation(intrinsic))), 1)
    expected = maps if ghost.order is None else maps[:, ghost.order]
    torch.testing.assert_close(ghost(x), expected)


def test_ghosts_read_what_the_consumer_sees():
    gm, _ = activated_ghost()
    seen = {}

    def keep(name):
        return lambda *call: seen.update({name: call[-1]})

    gm.conv.activation.register_forward_hook(keep("read"))
    gm.relu.register_forward_hook(keep("behind"))
    predict(gm, [nets.images(4, 16)])
    order = torch.arange(8) if gm.conv.order is None else gm.conv.order
    torch.testing.assert_close(seen["read"], seen["behind"][:, torch.argsort(order)[:4]])


def test_it_survives_saving_training_and_reconstruction(tmp_path):
    gm, model = activated_ghost()
    assert chosen(gm)
    assert any(line.activated for line in report(gm).layers)
    again = load(save(gm, tmp_path / "out"))
    x = nets.images(4, 16)
    assert torch.equal(predict(again, [x]), predict(gm, [x]))
    gm.train()
    gm(x).sum().backward()
    assert all(p.grad is not None for p in gm.parameters())
    batches = nets.images(64, 16).split(16)
    rebuilt = ghostify(model, activated=True, calibration=batches, reconstruct=True)
    test = [nets.images(16, 16, seed=5)]
    reference = predict(model, test)
    assert relative_error(predict(rebuilt, test), reference) <= relative_error(predict(gm.eval(), test), reference)


def test_wider_ghosts_stay_linear():
    policy = Policy((Rule(activated=True, cheap="pointwise"),))
    assert all(e.activation is None for e in plan(trace(nets.settle(nets.Straight())), policy).rewrites)


def test_activated_must_be_a_boolean():
    with pytest.raises(GhostifyError, match="activated 'yes': is not a boolean"):
        Rule(activated="yes")


def test_narrowed_takes_the_channels_and_the_shift():
    model = nets.settle(nets.Straight())
    program = trace(model)
    entry = plan(program, Policy((Rule(activated=True),))).rewrites[0]
    channels, shift = torch.tensor([3, 0]), torch.arange(16.0)
    program.module.get_submodule(entry.norm).running_mean.sub_(shift)
    line = slice_chain(copy_activation_chain(program.module, entry), channels)
    maps = torch.randn(2, 16, 5, 5)
    whole = model.a[2](model.a[1](maps + shift[:, None, None]))
    torch.testing.assert_close(line(maps[:, channels]), whole[:, channels])
    assert line[0].num_features == 2
