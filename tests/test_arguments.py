import copy

import pytest
import torch
from torch import fx, nn

from ghostify import GhostifyError, deploy, ghostify, trace
from ghostify.arguments import a_device, a_function, a_number, call_function, public
from tests import nets


def damaged(path, value):
    """A model with one value of a tensor replaced."""
    model = nets.settle(nets.Straight())
    module, _, name = path.rpartition(".")
    getattr(model.get_submodule(module), name).data.flatten()[0] = value
    return model


@pytest.mark.parametrize("more", [{}, {"calibration": [nets.images()]}], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("path", ["a.0.weight", "fc.bias", "b.1.weight", "stem.1.running_var", "a.1.running_mean"])
def test_weights_that_are_not_finite_are_named(path, value, more):
    with pytest.raises(GhostifyError, match=rf"^{path}: holds NaN or infinity. Load other weights.$"):
        ghostify(damaged(path, value), **more)


def test_a_negative_variance_is_named():
    with pytest.raises(GhostifyError, match=r"^a\.1\.running_var: has negative values"):
        ghostify(damaged("a.1.running_var", -1.0))


def test_infinities_in_other_buffers_are_the_models_own():
    model = nets.settle(nets.Straight())
    model.register_buffer("mask", torch.full((2, 2), -float("inf")))
    assert trace(model).convolutions


@pytest.mark.parametrize("more", [{}, {"calibration": [nets.images()]}, {"example_inputs": nets.images()}], ids=str)
def test_a_model_without_data_is_refused(more):
    with pytest.raises(GhostifyError, match=r"model: its weights are not there: stem\.0\.weight is on the meta device"):
        ghostify(nets.Straight().to("meta"), **more)


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("timm:resnet18", "'timm:resnet18'"),
        (nets.Straight, "the class Straight"),
        (nets.Straight().state_dict(), "of class OrderedDict"),
        (None, "None"),
        (lambda x: x, "of class function"),
    ],
)
def test_what_is_not_a_model_is_shown(model, shown):
    with pytest.raises(GhostifyError, match=rf"^model: is {shown}, not a model\. Pass a torch\.nn\.Module"):
        ghostify(model)


@pytest.mark.parametrize("script", [torch.jit.script, lambda m: torch.jit.trace(m, nets.images())])
def test_a_scripted_model_is_refused(script):
    with pytest.warns() as _:
        scripted = script(nets.settle(nets.Straight()))
    with pytest.raises(GhostifyError, match=r"the model is compiled by torch\.jit"):
        ghostify(scripted)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_wrappers_are_left_out(wrap):
    model, x = nets.settle(nets.Straight()), nets.images()
    converted, expected = ghostify(wrap(model), example_inputs=x), ghostify(model, example_inputs=x)
    assert isinstance(converted, fx.GraphModule)
    assert torch.equal(converted(x), expected(x))


def test_results_can_be_converted_and_deployed_again():
    model, x = nets.settle(nets.Straight()), nets.images()
    converted = ghostify(model, calibration=[x])
    again = ghostify(converted, calibration=[x])
    deployed = deploy(converted, x)
    assert again(x).shape == deploy(deployed, x)(x).shape == ghostify(deployed, calibration=[x])(x).shape == (8, 5)


def test_arguments_are_checked_where_they_are_passed_only():
    @public(number=a_number(0, 1, below=True))
    def function(number=None):
        return number

    assert function() is None
    assert function(0) == 0
    with pytest.raises(GhostifyError, match="number 1: is not a number"):
        function(1)
    with pytest.raises(TypeError, match=r"function\(\): too many positional arguments"):
        function(0, 1)


def test_every_parameter_needs_a_check():
    with pytest.raises(AssertionError, match="lambda"):
        public(a=a_number())(lambda a, b: (a, b))


@pytest.mark.parametrize("function", [print, max, lambda *_: None, lambda _done, _total, _text="": None])
def test_functions_that_take_the_parameters_are_accepted(function):
    assert a_function("done", "total", "text")("on_progress", function) is function


@pytest.mark.parametrize("function", [lambda: None, lambda _a, _b, _c, _d: None, 5, nn.ReLU(), int])
def test_other_functions_are_refused(function):
    with pytest.raises(GhostifyError, match=r"^on_progress: .* Pass a function of \(done, total, text\)\.$"):
        a_function("done", "total", "text")("on_progress", function)


def test_the_failure_of_a_function_is_its_cause():
    with pytest.raises(GhostifyError, match=r"evaluate: the function failed \(KeyError: 'a'\)") as caught:
        call_function("evaluate", lambda: {}["a"])
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "meta", torch.device("meta"), 3, None, ""])
def test_devices_that_hold_no_data_are_refused(device):
    with pytest.raises(GhostifyError, match=r"device .*Use cpu") as caught:
        a_device("device", device)
    assert str(caught.value).isprintable()


def test_the_model_is_not_changed_by_its_checks():
    model = nets.settle(nets.Straight())
    before = copy.deepcopy(model.state_dict())
    trace(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
