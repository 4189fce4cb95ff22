import threading

import pytest
import torch
from torch import fx, nn

from ghostify.graph.forward_graph import trace_graph
from ghostify.graph.symbolic_tracer import UntraceableError
from tests import nets


def test_a_forward_with_control_flow_has_no_graph():
    with pytest.raises(UntraceableError, match="control flow"):
        trace_graph(nets.Stubborn.Gate(3), set())


def test_a_submodule_that_does_not_trace_is_a_leaf():
    targets = [n.target for n in trace_graph(nets.Stubborn(), set()).nodes if n.op == "call_module"]
    assert "gate" in targets
    assert not any("gate." in str(t) for t in targets)


def test_named_optional_arguments_stay_inputs():
    class Scaled(nn.Module):
        def forward(self, x, scale=1.0):
            return x * scale

    guarded, free = ([n.name for n in trace_graph(Scaled(), names).nodes] for names in (set(), {"scale"}))
    assert "check_default_argument" in guarded
    assert "check_default_argument" not in free


def test_caches_that_a_forward_fills_hold_no_proxies_afterwards():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.inner, self.bias = nn.Conv2d(3, 4, 1), nets.Stubborn.Gate(4), nn.Parameter(torch.ones(4, 1))
            self.cache, self.inputs, self.last = {}, [], None

        def forward(self, x):
            if "bias" not in self.cache:
                self.cache["bias"] = self.bias[:, None]
            self.inputs.append(x)
            self.last = self.new = x
            return self.inner(self.conv(x) + self.cache["bias"]) + torch.ones(1)

    model, x = Caching().eval(), torch.rand(1, 3, 4, 4)
    graph = trace_graph(model, set())
    assert (model.cache, model.inputs, model.last) == ({}, [], None)
    assert not hasattr(model, "new")
    graph.lint()
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.register_buffer("seen", torch.zeros(1))
        self.count, self.last = 0, None


class Counting(Parts):
    def forward(self, x):
        self.seen += 1
        return self.a(x) * self.seen


class Averaging(Parts):
    def forward(self, x):
        self.seen = self.seen + x.mean()
        return self.a(x)


class Numbering(Parts):
    def forward(self, x):
        self.count += 1
        return self.a(x) * self.count


class Recurrent(Parts):
    def forward(self, x):
        y = self.a(x)
        y, self.last = (y if self.last is None else y + self.last), y
        return y


class Frozen(Parts):
    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class Decorated(Parts):
    @torch.no_grad()
    def forward(self, x):
        return self.a(x)


class Exact(Parts):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return self.a(x)


class Switching(Parts):
    def forward(self, x):
        with torch.set_grad_enabled(self.training):
            return self.a(x)


class Calling(Parts):
    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return self.a(x)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (Counting, "buffer 'seen'"),
        (Averaging, "seen"),
        (Numbering, "attribute 'count'"),
        (Recurrent, "attribute 'last' of the last call"),
        (Frozen, "gradient mode"),
        (Decorated, "gradient mode"),
        (Exact, "autocast"),
        (Switching, "gradient mode"),
        (Calling, "__call__"),
    ],
)
def test_a_forward_that_a_graph_would_change_is_not_traced(network, reason):
    model = network().eval()
    with pytest.raises(UntraceableError, match=reason):
        trace_graph(model, set())
    assert (model.seen.item(), model.count, model.last) == (0, 0, None)
    outer = nn.Sequential(network(), nn.Conv2d(4, 4, 1))
    if network is not Calling:  # whose own call is part of the outer graph
        assert [n.target for n in trace_graph(outer, set()).nodes if n.op == "call_module"] == ["0", "1"]


def test_a_buffer_that_is_written_from_inputs_is_written_by_the_graph():
    class Remembering(Parts):
        def forward(self, x):
            self.seen.copy_(x.mean().view(1))
            return self.a(x)

    model, x = Remembering(), nets.images(1)
    traced = fx.GraphModule(model, trace_graph(model, set()))
    assert model.seen == 0
    traced(x)
    assert torch.equal(traced.seen, x.mean().view(1))


def test_the_context_of_the_caller_does_not_matter():
    for context in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu")):
        with context:
            assert len(trace_graph(nets.Straight(), set()).nodes) > 3
            with pytest.raises(UntraceableError, match="gradient mode"):
                trace_graph(Frozen(), set())


def test_two_branches_that_only_read_different_values_are_the_same():
    class Caching(Parts):
        def __init__(self):
            super().__init__()
            self.cache = {}

        def forward(self, x):
            device = None if self.training else x.device
            if device not in self.cache:
                self.cache[device] = self.a(x)
            return self.cache[device]

    assert [n.target for n in trace_graph(Caching(), set()).nodes if n.op == "call_module"] == ["a"]


def test_threads_that_trace_or_run_do_not_disturb_each_other():
    running, errors = nets.settle(nets.Straight()), []
    x, stop = nets.images(1), threading.Event()
    expected = running(x)

    def run():
        while not stop.is_set():
            if not torch.equal(running(x), expected):
                errors.append("another output")

    def trace_some():
        for _ in range(5):
            errors.extend(n for n in trace_graph(nets.Straight(), set()).nodes if n.op == "get_attr")

    methods = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__", "__setattr__")}
    runner, tracers = threading.Thread(target=run), [threading.Thread(target=trace_some) for _ in range(2)]
    for thread in (runner, *tracers):
        thread.start()
    for thread in tracers:
        thread.join()
    stop.set()
    runner.join()
    assert errors == []
    assert {name: getattr(nn.Module, name) for name in methods} == methods
    assert "training" not in vars(nn.Module)
