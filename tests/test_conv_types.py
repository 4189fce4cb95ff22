import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import nn
from torch.nn.utils import parametrizations

from ghostify import Policy, Rule, fit, ghostify, load, plan, report, rewrite, save, trace
from ghostify.evaluation.metrics import predict, relative_error
from ghostify.graph.conv_types import to_standard_conv
from ghostify.graph.op_queries import is_standard_conv
from tests import nets


class Doubled(nn.Conv2d):
    """An unknown class that is not one convolution."""

    def forward(self, x):
        return 2 * super().forward(x)


class Attentive(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight * x.mean(), self.bias)


class Mirrored(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.flip(3))


class Scaled(nn.Conv2d):
    """An unknown class that is a convolution with another weight."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.gain, self.bias)


MAKERS = {
    "same": lambda *a, **o: Conv2dSame(*a, **o),
    "standardised": lambda *a, **o: StdConv2d(*a, **o),
    "standardised, same": lambda *a, **o: StdConv2dSame(*a, **o),
    "scaled": lambda *a, **o: ScaledStdConv2d(*a, **o),
    "scaled, same": lambda *a, **o: ScaledStdConv2dSame(*a, **o),
    "weight norm": lambda *a, **o: parametrizations.weight_norm(nn.Conv2d(*a, **o)),
    "spectral norm": lambda *a, **o: parametrizations.spectral_norm(nn.Conv2d(*a, **o)),
    "unknown": lambda *a, **o: Scaled(*a, **o),
}


@pytest.mark.parametrize("name", MAKERS)
@given(kernel=st.integers(1, 4), stride=st.integers(1, 3), bias=st.booleans(), size=st.sampled_from([7, 9, 12, 15]))
@example(kernel=2, stride=3, bias=False, size=7)
@settings(max_examples=10, deadline=None)
def test_the_standard_convolution_computes_the_same_at_every_size(name, kernel, stride, bias, size):
    torch.manual_seed(kernel)
    conv = MAKERS[name](3, 5, kernel, stride=stride, bias=bias).eval()
    standard = to_standard_conv(conv)
    assert is_standard_conv(standard)
    x = torch.randn(2, 3, size, size + 1)
    torch.testing.assert_close(standard(x), conv(x))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Doubled, "its forward is not one convolution"),
        (Attentive, "its weight depends on its input"),
        (Mirrored, "it transforms its input"),
    ],
)
def test_a_class_without_standard_equivalent_is_skipped_by_name(make, reason):
    skipped = plan(trace(nn.Sequential(nn.Conv2d(3, 8, 3), make(8, 8, 3)).eval())).skips[-1]
    assert make.__name__ in skipped.reason
    assert reason in skipped.reason


def network(name):
    make = MAKERS[name]
    torch.manual_seed(2)
    net = nn.Sequential(make(3, 8, 3), nn.ReLU(), make(8, 12, 3, stride=2), nn.ReLU(), make(12, 8, 3, bias=False))
    return net.eval()


@pytest.mark.parametrize("name", MAKERS)
def test_every_class_is_converted(name):
    model, x = network(name), nets.images(32, 17)
    before = predict(model, [x])
    unchanged = ghostify(model, 1, example_inputs=x)
    assert torch.equal(predict(unchanged, [x]), before)
    program = trace(model, x)
    policy = Policy((Rule(cheap="pointwise", ratio=1.5),))
    conversion_plan = plan(program, policy)
    assert len(conversion_plan.rewrites) == 2
    converted = rewrite(program, conversion_plan, fit(program, conversion_plan, x.split(8)).weights)
    assert relative_error(predict(converted, [x]), before) < 0.5
    larger = nets.images(2, 24)
    assert predict(converted, [larger]).shape == predict(model, [larger]).shape
    assert torch.equal(predict(model, [x]), before)


@pytest.mark.parametrize("name", [k for k in MAKERS if "norm" not in k and k != "unknown"])
def test_known_classes_survive_saving(name, tmp_path):
    converted = ghostify(network(name), cheap="pointwise")
    x = nets.images(2, 17)
    assert report(converted).rewritten == 2
    assert torch.equal(predict(load(save(converted, tmp_path / "out")), [x]), predict(converted, [x]))
