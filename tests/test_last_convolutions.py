import torch
from torch import nn

from ghostify import ghostify, report, trace
from ghostify.fitting.calibration import bind_calibration
from ghostify.fitting.last_convolutions import ConvOutput, followed_convolutions
from ghostify.fitting.sensitivity import last_sensitivity, prepare_calibration
from tests import nets


def call(name, before):
    zero = torch.zeros_like(before, requires_grad=True)
    return ConvOutput(name, before, zero, before + zero)


def test_convolutions_are_followed_through_other_operations():
    a = call("a", torch.ones(2))
    b, c = call("b", a.after.relu() * 2), call("c", a.after.exp())
    assert followed_convolutions([a, b, c]) == {"a"}
    again = call("a", b.after + c.after)
    assert followed_convolutions([a, b, c, again]) == {"a", "b", "c"}


class Detector(nn.Module):
    """Boxes of the positions whose score is above a threshold, which may be none."""

    def __init__(self, threshold):
        super().__init__()
        self.trunk, self.boxes, self.scores = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 8), (8, 4), (8, 1)))
        self.unused = nn.Conv2d(3, 3, 1)
        self.threshold = threshold

    def forward(self, x):
        y = torch.relu(self.trunk(x))
        scores = torch.sigmoid(self.scores(y)).flatten(1)
        boxes = self.boxes(y).flatten(2).transpose(1, 2)
        return {"boxes": boxes[scores > self.threshold], "scores": scores[scores > self.threshold]}


def test_a_detector_that_finds_nothing_is_fitted_to_its_last_convolutions():
    """The sensitivity is that of the network that ends with them, and the report says so."""
    torch.manual_seed(0)
    model, x = Detector(1.1).eval(), nets.images(16)
    program = trace(model)
    batches = bind_calibration(program.module, [x])
    sensitivity, last = last_sensitivity(program, batches, 0)
    assert last == ("scores", "boxes")
    layers = nn.ModuleDict({"trunk": model.trunk, "scores": model.scores, "boxes": model.boxes})

    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            y = torch.relu(self.layers["trunk"](x))
            return self.layers["scores"](y), self.layers["boxes"](y)

    wanted = prepare_calibration(trace(Ends().eval()), [x]).sensitivity
    torch.testing.assert_close(sensitivity["trunk"], wanted["layers.trunk"])
    (note,) = report(ghostify(model, calibration=[x])).notes
    assert note.endswith("by their effect on the outputs of the last convolutions (scores, boxes)")
    assert report(ghostify(Detector(0.5).eval(), calibration=[x])).notes == ()


def test_a_model_without_gradients_says_that_errors_count_by_layer():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            x = self.a(x)
            x = x.mul_(torch.sigmoid(x))
            return x.add_(self.b(x)).detach()

    (note,) = report(ghostify(InPlace().eval(), calibration=nets.images(4))).notes
    assert note.endswith("errors count relative to the variance of each layer's own outputs")
