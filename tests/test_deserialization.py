import copy
import json

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from ghostify import GhostifyError, trace
from ghostify.graph.deserialization import deserialize_module, names_to_allow
from ghostify.graph.serialization import serialize_module
from tests import nets


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "os:system"}, r"os:system: not in the list .*load\(\.\.\., allow=\['os:system'\]\)"),
        ({"target": "torch:load"}, "torch:load: not in the list"),
        ({"target": "torch:from_file"}, "torch:from_file: not in the list"),
        ({"target": "builtins:eval"}, "builtins:eval: not in the list"),
        ({"target": "torch.hub:load"}, "torch.hub:load: not in the list"),
        ({"target": "torch:os.system"}, "torch:os.system: not in the list"),
        ({"target": "torch.nn.modules.activation:ReLU"}, "ReLU: is not allowed here"),
        ({"target": "builtins:getattr", "args": [{"node": "x"}, "__class__"]}, "text '__class__' is not allowed here"),
        ({"target": "builtins:getattr", "args": [{"node": "x"}, "grad_fn"]}, "text 'grad_fn' is not allowed here"),
        ({"target": "builtins:getattr", "args": [{"node": "x"}]}, "reads an attribute that is not allowed"),
        ({"op": "call_method", "target": "__reduce__"}, "method '__reduce__': is not allowed"),
        ({"op": "call_method", "target": "numpy"}, "method 'numpy': is not allowed"),
        ({"op": "call_method", "target": "relu", "args": ["x"]}, "calls a method of what is not a node"),
        ({"args": [{"pickle": "gASV"}]}, "value of kind 'pickle': is not known"),
        ({"args": [{"node": "x"}, "/etc/passwd"]}, "text '/etc/passwd' is not allowed here"),
        ({"args": [{"node": "later"}]}, "refers to node 'later', which is not before it"),
        ({"kwargs": {"input=print(1), more": 1}}, "has a keyword that is not a name"),
        ({"kwargs": {"class": 1}}, "has a keyword that is not a name"),
        ({"target": "_operator:add", "args": [1]}, "does not fit what it calls"),
        ({"name": "x y"}, "its name is not a name"),
        ({"name": "x"}, "has two nodes of one name"),
        ({"op": "call"}, "is not an operation"),
        ({"op": "call_module", "target": "a.__class__"}, "is not a module that can be called"),
        ({"op": "call_module", "target": 'a.0"), print("'}, "is not a path in the model"),
        ({"op": "get_attr", "target": "a.0", "args": []}, "is not a parameter or buffer"),
        ({"op": "get_attr", "target": "a.0.__init__", "args": []}, "is not a parameter or buffer"),
        ({"args": deep(40)}, "is nested more than 32 deep"),
        ({"args": [10**30]}, "a number is too large"),
        ({"marks": [["recompile", "->"]]}, "is not allowed in a saved model"),
        ({"marks": [["pool", "self"]]}, "is not allowed in a saved model"),
    ],
)
def test_stored_data_cannot_call_or_read_what_is_not_allowed(change, message):
    data, tensors = serialize_module(fx.symbolic_trace(nets.settle(nets.Straight())))
    node = next(n for n in data["modules"][""]["nodes"] if n["op"] == "call_method")
    node.update({"op": "call_function", "target": "torch:flatten", "args": [{"node": "x"}], "kwargs": {}})
    node.update(change)
    with pytest.raises(GhostifyError, match=message):
        deserialize_module(data, tensors)


def test_a_leaf_must_be_a_listed_module_class():
    for name, message in (
        ("collections:OrderedDict", r"collections:OrderedDict: .*allow=\['collections:OrderedDict'\]"),
        ("torch:relu", "torch:relu: is not allowed here"),
        ("torch.nn.modules.conv:Missing", "not in the list"),
    ):
        data, tensors = serialize_module(fx.symbolic_trace(nets.settle(nets.Straight())))
        data["modules"]["a.0"]["class"] = name
        with pytest.raises(GhostifyError, match=message):
            deserialize_module(data, tensors)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
        self.register_buffer("scale", torch.tensor([2.0, 3.0]))

    def forward(self, x):
        return F.pad(self.a(x), [0, 1]) * self.scale.sum()


def described():
    data, tensors = serialize_module(fx.symbolic_trace(nets.settle(Scaled())))
    return json.loads(json.dumps(data)), {key: tensor.detach().clone() for key, tensor in tensors.items()}


def root(data):
    return data["modules"][""]


def facts(**changes):
    return {"requires_grad": True, "channels_last": False, **changes}


def test_modules_with_two_paths_stay_one():
    block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model = nn.Sequential(block, nn.ReLU(), block).eval()
    data, tensors = serialize_module(model)
    restored = deserialize_module(data, tensors)
    assert restored[0] is restored[2]
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(restored(x), model(x))
    for path in ("2.0", "2.1"):
        less = {**data, "modules": {key: item for key, item in data["modules"].items() if key != path}}
        with pytest.raises(GhostifyError, match="module '2': differs from '0', which it is the same as"):
            deserialize_module(less, tensors)


def test_a_traced_module_with_two_paths_stays_one():
    block = trace(nets.settle(nets.Straight())).module
    model = nn.ModuleDict(
        {"a": nn.ModuleDict({"b": block}), "c": fx.GraphModule(nn.ModuleDict({"b": block}), calls("b"))}
    )
    restored = deserialize_module(*serialize_module(model))
    assert restored["a"]["b"] is restored["c"].b
    x = nets.images(1)
    assert torch.equal(restored["c"](x), block(x))


def calls(path):
    """A graph that calls the module at a path."""
    graph = fx.Graph()
    graph.output(graph.call_module(path, (graph.placeholder("x"),)))
    return graph


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("aliases"), "the model's aliases: is missing"),
        (lambda d: d.update(aliases={"x": "nothing"}), "tensor 'x': is not another name of a stored tensor"),
        (lambda d: d.update(aliases={"x": 3}), "the model's aliases: are not paths"),
        (lambda d: d.update(modules=[]), "the model's modules: is missing or not an object"),
        (lambda d: d.update(modules={}), "has no outermost module"),
        (lambda d: d["modules"].update({"c.d": d["modules"]["a"]}), "'c.d': is not within a module before it"),
        (lambda d: d["modules"].update({"c": {"same": "a.0"}, "c.x": {"same": "a.1"}}), "'c': differs from 'a.0'"),
        (lambda d: d["modules"].update({"c": {"same": "c"}}), "'c': is the same as 'c', which is not a module before"),
        (lambda d: d["modules"].update({"c": {"same": ""}}), "'c': is the same as '', which is not a module before"),
        (lambda d: d["modules"].update({"c": {"same": "a"}}), "'c': differs from 'a'"),
        (lambda d: d["modules"]["a.0"].pop("class"), "has neither a class nor nodes"),
        (lambda d: d["modules"]["a.0"].update(training=1), "has no mode"),
        (lambda d: d["modules"]["a.0"]["parameters"].update({"a.b": None}), "'a.b' is not a name"),
        (lambda d: d["modules"]["a.0"]["parameters"].update({"_parameters": None}), "'_parameters' is not a name"),
        (
            lambda d: d["modules"]["a.0"]["parameters"].update(weight={}),
            "weight is not described by its shape, dtype and flags",
        ),
        (lambda d: d["modules"]["a.0"]["parameters"].update(stride=None), "has two values of one name"),
        (lambda d: d["modules"]["a.0"]["parameters"].update(more=facts()), "tensor a.0.more: is missing"),
        (lambda d: d["modules"]["a.0"]["parameters"].update(bias=facts(channels_last=True)), "has 1 dimensions"),
        (lambda d: root(d)["buffers"].update(a=None), "module 'a': has the name of another value"),
        (lambda d: d["modules"]["a.0"]["attributes"].update(forward=None), "attribute 'forward' is not allowed"),
        (lambda d: d["modules"]["a.0"]["attributes"].update(__class__=None), "attribute '__class__' is not allowed"),
        (lambda d: d["modules"]["a.0"]["attributes"].update(_modules={"dict": []}), "'_modules' is not allowed"),
        (lambda d: d["modules"]["a.0"]["attributes"].update({"a b": 1}), "attribute 'a b' is not allowed"),
        (
            lambda d: d["modules"]["a.0"]["attributes"].update(_conv_forward={"function": "torch:relu"}),
            "attribute '_conv_forward' is not allowed",
        ),
        (lambda d: root(d)["attributes"].update(recompile={"function": "torch:relu"}), "'recompile' is not allowed"),
        (lambda d: root(d).update(class_name="x y"), "has no valid class name"),
        (lambda d: root(d).update(nodes=[]), "has no nodes"),
        (lambda d: root(d)["nodes"].pop(), "does not end in one output"),
        (lambda d: root(d)["nodes"].append(root(d)["nodes"][-1]), "has two nodes of one name"),
        (lambda d: root(d)["nodes"][-1].update(args=[]), "does not end in one output"),
        (lambda d: root(d)["nodes"][0].update(target="self"), "its inputs are not those of a function"),
        (lambda d: root(d)["nodes"][0].update(target="x=print(1)"), "its inputs are not those of a function"),
        (lambda d: root(d)["nodes"][0].update(target="***x"), "its inputs are not those of a function"),
        (lambda d: root(d)["nodes"][0].update(target="lambda"), "its inputs are not those of a function"),
        (lambda d: root(d)["nodes"][0].update(target="*x", args=[1]), "its inputs are not those of a function"),
        (lambda d: root(d)["nodes"][0].update(args=["/etc/passwd"]), "text '/etc/passwd' is not allowed here"),
        (lambda d: root(d)["nodes"].insert(1, {**root(d)["nodes"][0], "name": "y"}), "duplicate parameter name"),
        (lambda d: root(d)["nodes"][1].update(args=[], kwargs={}), "does not fit what it calls"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(change, message):
    data, tensors = described()
    deserialize_module(copy.deepcopy(data), tensors)
    change(data)
    with pytest.raises(GhostifyError, match=message) as caught:
        deserialize_module(data, tensors)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "x", {}, {"modules": None}])
def test_what_is_not_a_description_is_refused(data):
    with pytest.raises(GhostifyError, match="is missing or not an object"):
        deserialize_module(data, {})


def test_a_parameter_of_whole_numbers_takes_no_gradient():
    data, tensors = described()
    tensors["a.0.bias"] = tensors["a.0.bias"].long()
    del data["modules"]["a.0"]["parameters"]["bias"]["dtype"]
    with pytest.raises(GhostifyError, match=r"tensor a\.0\.bias: has dtype int64, which takes no gradient"):
        deserialize_module(data, tensors)


def test_a_text_may_have_the_name_of_a_method():
    model = fx.symbolic_trace(nets.settle(Scaled()))
    model.get_submodule("a.0").type = "models.Conv"  # as detectors do
    data, tensors = serialize_module(model)
    assert deserialize_module(data, tensors).get_submodule("a.0").type == "models.Conv"


def test_a_method_that_an_instance_replaces_is_not_saved():
    model = fx.symbolic_trace(nets.settle(Scaled()))
    model.get_submodule("a.0").forward = F.relu
    with pytest.raises(GhostifyError, match=r"a\.0\.forward: replaces a method of its class, which cannot be saved"):
        serialize_module(model)


def test_the_names_that_need_permission_are_listed():
    assert names_to_allow(*described()) == []
    model = nn.Sequential(nets.Straight(), nets.Straight())
    assert names_to_allow(*serialize_module(model)) == ["tests.nets:Straight"]


POOL = "torchvision.models.detection.backbone_utils:BackboneWithFPN"  # its forward calls what `body` is


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"function": "builtins:getattr"}, "builtins:getattr: is not allowed here"),
        ({"partial": ["builtins:getattr", [{"function": "torch:relu"}], {"dict": []}]}, "getattr: is not allowed here"),
        ({"tuple": [{"class": "torch.nn.modules.container:ModuleDict"}]}, "ModuleDict: is not allowed here"),
        ({"class": "timm.models._features_fx:GraphExtractNet"}, "GraphExtractNet: is not allowed here"),
        ({"partial": ["torch.nn.modules.activation:ReLU", [], {"dict": []}]}, "ReLU: is not allowed here"),
    ],
)
def test_a_forward_cannot_be_given_what_reads_attributes_or_builds_modules(body, message):
    data, tensors = described()
    data["modules"]["a.1"] = {
        "class": POOL, "training": False, "parameters": {}, "buffers": {}, "attributes": {"body": body},
    }  # fmt: skip
    with pytest.raises(GhostifyError, match=message):
        deserialize_module(data, {key: value for key, value in tensors.items() if not key.startswith("a.1")})


@pytest.mark.parametrize(
    "call",
    [
        {"target": "builtins:max", "args": [[{"node": "x"}]], "kwargs": {"key": {"node": "x"}}},
        {
            "target": "torch.nn.functional:triplet_margin_with_distance_loss",
            "args": [{"node": "x"}] * 3,
            "kwargs": {"distance_function": {"node": "x"}},
        },
        {"op": "call_method", "target": "sort", "args": [{"node": "x"}], "kwargs": {"key": {"node": "x"}}},
    ],
)
def test_a_graph_passes_nothing_that_is_called(call):
    data, tensors = described()
    node = next(n for n in root(data)["nodes"] if n["op"] == "call_function")
    node.update(call)
    with pytest.raises(GhostifyError, match="passes what is called"):
        deserialize_module(data, tensors)


def test_a_path_that_source_cannot_quote_is_refused():
    data, tensors = described()
    inner = {"class": "torch.nn.modules.activation:ReLU", "training": False, "parameters": {}, "buffers": {}}
    for name in ('b"); print("', "b\\"):
        data["modules"] = {**data["modules"], f"a.{name}": inner}
        with pytest.raises(GhostifyError, match="is not within a module before it"):
            deserialize_module(data, tensors)
        del data["modules"][f"a.{name}"]


def test_a_tensor_is_copied_once_however_often_it_is_named():
    data, tensors = serialize_module(nn.Sequential(nn.BatchNorm2d(3)))
    data["modules"]["1"] = {
        "class": "torch.nn.modules.activation:ReLU", "training": False, "parameters": {},
        "buffers": {"b": facts(requires_grad=False), "c": facts(requires_grad=False)},
        "attributes": {"inplace": False, "more": [{"tensor": "0.running_mean"}, {"tensor": "0.running_mean"}]},
    }  # fmt: skip
    data["aliases"] = {"1.b": "0.running_mean", "1.c": "0.running_mean"}
    norm, layer = deserialize_module(data, tensors)
    assert layer.b is layer.c
    assert layer.b is norm.running_mean
    assert layer.more[0] is layer.more[1]
    assert layer.more[0] is not tensors["0.running_mean"]


@pytest.mark.parametrize("names", [["__getattribute__"], {"dict": [["compile", 1]]}, {"tuple": [[{"set": ["apply"]}]]}])
def test_a_forward_cannot_look_up_a_method_by_a_stored_name(names):
    data, tensors = described()
    data["modules"]["a.2"] = {
        "class": "timm.models.nasnet:NASNetALarge", "training": False, "parameters": {}, "buffers": {},
        "attributes": {"layer_names": names},
    }  # fmt: skip
    with pytest.raises(GhostifyError, match="attribute 'layer_names' names a method"):
        deserialize_module(data, tensors)
