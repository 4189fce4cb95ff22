import copy
import io
import pickle

import pytest
import torch
from torch import nn

from ghostify import GhostifyError, deploy, ghostify, load, report, save
from ghostify.graph.inputs import tensor_leaves
from tests import nets
from tests.command import run_code


def converted(ratio=2, **options):
    model = nets.settle(nets.Methods())
    return model, ghostify(model, ratio, example_inputs=nets.images(2), **options)


def test_methods_of_an_empty_plan_are_the_originals():
    (model, same), x = converted(1), nets.images(3)
    features = model.forward_features(x)
    assert torch.equal(same.forward_features(x), features)
    assert torch.equal(same.forward_head(features), model(x))
    assert torch.equal(same.forward_head(features, pre_logits=True), model.forward_head(features, pre_logits=True))


def test_methods_run_the_ghost_modules_in_copies_and_after_loading_too(tmp_path):
    (_, ghosted), x = converted(targets="*"), nets.images(3)
    save(ghosted, tmp_path / "out")
    for module in (ghosted, copy.deepcopy(ghosted), load(tmp_path / "out")):
        assert torch.equal(module.forward_head(module.forward_features(x)), ghosted(x))


def test_a_permutation_is_not_pushed_beyond_the_end_of_a_method():
    class ConvHead(nets.Methods):
        def __init__(self):
            super().__init__()
            self.fc = nn.Conv2d(16, 5, 1)

        def forward_head(self, x):
            return self.fc(x).mean((2, 3))

    model, x = nets.settle(ConvHead()), nets.images(64)
    ghosted = ghostify(model, cheap="pointwise", calibration=[x])
    expected = model.forward_features(x)
    assert (ghosted.forward_features(x) - expected).square().sum() < 0.2 * expected.var() * expected.numel()
    assert torch.equal(ghosted.forward_head(ghosted.forward_features(x)), ghosted(x))


def test_the_classifier_can_be_read_and_reset():
    (_, ghosted), x = converted(), nets.images(2)
    assert ghosted.get_classifier() is ghosted.fc
    ghosted.reset_classifier(7)
    assert ghosted(x).shape == (2, 7)
    assert copy.deepcopy(ghosted).num_classes == 7
    assert ghosted.get_classifier().weight.requires_grad
    ghosted.reset_classifier(0)
    assert ghosted(x).shape == (2, 16)
    with pytest.raises(GhostifyError, match="class Identity cannot be recreated"):
        ghosted.reset_classifier(7)
    with pytest.raises(GhostifyError, match="pooling is fixed"):
        ghosted.reset_classifier(7, "max")


@pytest.mark.parametrize("case", ["twice", "more inputs", "other arguments", "a list"])
def test_methods_that_are_not_one_part_of_the_graph_are_missing(case):
    class Other(nets.Methods):
        def forward_features(self, x, times=1):
            return super().forward_features(x * times)

        def pair(self, x):
            return [x, self.shift]

        def inner(self, y):
            return y + self.shift

        def forward(self, x):
            if case == "other arguments":
                return self.forward_head(self.forward_features(x, times=2))
            if case == "twice":
                return self.forward_head(self.forward_features(x) + self.forward_features(x))
            if case == "a list":
                return self.forward_head(self.forward_features(self.pair(x)[0]))
            self.shift = x.mean()
            return self.forward_head(self.inner(self.forward_features(x)))

    model = nets.settle(Other())
    model.shift = 0
    ghosted, x = ghostify(model, 1), nets.images(2)
    assert torch.equal(ghosted(x), model(x))
    missing = {
        "twice": "forward_features",
        "more inputs": "inner",
        "other arguments": "forward_features",
        "a list": "pair",
    }
    assert not hasattr(ghosted, missing[case])
    assert hasattr(ghosted, "forward_head")


def test_a_model_without_methods_has_none():
    ghosted = ghostify(nets.settle(nets.Straight()))
    assert not hasattr(ghosted, "forward_features")
    assert not hasattr(ghosted, "get_classifier")
    assert all("forward_features" not in vars(cls) for cls in type(ghosted).__mro__)


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": through_torch_save,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("network", [nets.Methods, nets.Residual, nets.Stubborn, nets.Wild, nets.Shared])
def test_copies_answer_alike_and_keep_report_modes_and_methods(network, copied):
    x = nets.images(2)
    made = ghostify(nets.settle(network()), 2, targets="*", example_inputs=x).train()
    made.eval()
    for model in (made, deploy(made, x)):
        back = copied(model)
        assert all(map(torch.equal, tensor_leaves(back(x)), tensor_leaves(model(x))))
        assert report(back) == report(model)
        assert [m.training for m in back.train().modules()] == [True] * len(list(model.modules()))
        assert [p for p, _ in back.named_modules()] == [p for p, _ in model.named_modules()]
        assert len(list(back.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copies_keep_methods_and_attributes(copied):
    (_, made), x = converted(targets="*"), nets.images(2)
    made.note = "set later"
    back = copied(made)
    assert back.note == "set later"
    assert torch.equal(back.forward_features(x), made.forward_features(x))
    back.reset_classifier(3)
    assert back(x).shape == (2, 3)
    assert made(x).shape == (2, 5)


def test_a_pickle_is_read_in_a_fresh_process(tmp_path):
    x = nets.images(2)
    made = ghostify(nets.settle(nets.Stubborn()), 2, example_inputs=x)
    torch.save((made, deploy(made, x), x, made(x), deploy(made, x)(x)), tmp_path / "made.pt")
    code = (
        "import torch; made, deployed, x, y, z = torch.load('made.pt', weights_only=False);"
        "assert torch.equal(made(x), y) and torch.equal(deployed(x), z)"
    )
    done = run_code(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_method_goes_with_the_marks_that_it_was_made_of():
    (_, made), x = converted(), nets.images(2)
    assert not hasattr(deploy(made, x), "forward_features")
