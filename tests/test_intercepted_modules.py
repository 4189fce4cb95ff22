import threading
from typing import ClassVar

import torch
from torch import nn

from ghostify.graph.intercepted_modules import intercepted


class Recorder:
    def __init__(self):
        self.calls, self.attributes, self.modes = [], [], []

    def intercept_call(self, module, call, args, kwargs):
        self.calls.append(module)
        return call(*args, **kwargs)

    def intercept_attribute(self, value):
        self.attributes.append(value)
        return value

    def intercept_mode(self, module):
        self.modes.append(module)
        return module.__dict__["training"]


class Registered(nn.Module):
    subclasses: ClassVar = []

    def __init_subclass__(cls, *, name):
        Registered.subclasses.append(name)

    def __setattr__(self, name, value):
        assert name != "__class__"
        super().__setattr__(name, value)


class Doubling(Registered, name="doubling"):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def __call__(self, *args):
        return 2 * super().__call__(*args)

    def forward(self, x):
        return x * self.weight if not self.training else x


def test_calls_and_reads_of_one_models_modules_only_are_intercepted():
    model, other, recorder = nn.Sequential(Doubling()), Doubling(), Recorder()
    own_call, own_class = nn.Module.__call__, type(model[0])
    with intercepted(model, recorder):
        assert model(torch.ones(1)) == 2
        assert (type(model[0]).__name__, isinstance(model[0], Doubling)) == ("Doubling", True)
        thread = threading.Thread(target=other, args=(torch.ones(1),))
        thread.start()
        thread.join()
        assert nn.Module.__call__ is own_call
        assert model.eval()(torch.ones(1)) == 2
    assert recorder.calls == [model, model[0]] * 2
    assert recorder.attributes == [model[0].weight]
    assert set(recorder.modes) == {model[0]}
    assert type(model[0]) is own_class
    assert Registered.subclasses == ["doubling"]


def test_a_class_is_restored_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    try:
        with intercepted(model, Recorder()):
            model(torch.ones(3))
    except RuntimeError:
        pass
    assert [type(m) for m in model.modules()] == [nn.Sequential, nn.Linear]
