"""Hostile values for the fields of a saved folder's description.

What would run as code has `CODE` in it, and names have `NAME`, so that the watch recognises them (see `fuzz_watch`).
"""

from __future__ import annotations

import random
from typing import Any

CODE, NAME = "canarycode", "canaryname"
CALL = f"__import__('os').mkdir('{CODE}') or {CODE}()"
TEXTS = (
    "", " ", "x", "0", "None", "True", "self", "class", "lambda", "import", "print", "forward", "training", "_modules",
    "__class__", "__init__", "__dict__", "__reduce__", "__call__", "_parameters", "_forward_hooks", "a.b", ".", "..",
    "../x", "*args", "**kwargs", "*", "/etc/passwd", "../../etc/passwd", "~", "C:\\x", "file:///etc/passwd", "x\ny",
    "x\\\ny", "x\0y", "\x1b[31mred", "\u202eabc", "\ud800", "[bold]x[/bold]", "{x}", "%s%n", "x" * 100_000, "self.x",
    "act.__init__.__globals__", "__init__.__globals__", "forward.__func__.__globals__", "weight.__class__",
    "weight.data", "T", "\uff53elf", "\u017felf", "\u0430ct", NAME, f"{NAME}.{NAME}", f"{NAME}:{NAME}", f"torch:{NAME}",
    f"ghostify.{NAME}:{NAME}", f"__{NAME}__", f"{NAME} ", f"{NAME}\u200b", CALL, f"x={CALL}", f"x: {CALL}",
    f"inplace=bool({CALL}), more", f"x):\n    {CALL}\n#", f"x; {CALL}", f"'+{CALL}+'", f'"""+{CALL}+"""',
    f"x\n    {CODE}()", f"x, y={CALL}", f"self.{CODE}()", f"act({CALL})", f"act[{CALL}]", f"x\\\n={CALL}",
    f"x\r{CALL}", f"x\x0c={CALL}", f"x\u2028{CALL}", f"x # {CODE}", f"*{CODE}, x=0", f"lambda: {CALL}", f"{{{CALL}}}",
)  # fmt: skip
IMPORTS = (
    "os:system", "os:mkdir", "posix:system", "posix:mkdir", "subprocess:Popen", "subprocess:run", "builtins:exec",
    "builtins:eval", "builtins:__import__", "builtins:open", "builtins:getattr", "builtins:setattr", "builtins:type",
    "builtins:vars", "builtins:compile", "builtins:print", "builtins:input", "importlib:import_module", "pickle:loads",
    "shutil:rmtree", "torch:load", "torch:save", "torch:from_file", "torch:os.system", "torch:os.mkdir",
    "torch:_VF.from_file", "torch:_C._VariableFunctions.from_file", "torch.functional:torch.load",
    "torch.functional:torch.os.mkdir", "torch.hub:load", "torch.hub:download_url_to_file", "torch.serialization:load",
    "torch.ops:load_library", "torch._ops:ops.load_library", "torch.utils.cpp_extension:load", "torch:compile",
    "torch:set_num_threads", "torch:manual_seed", "torch:set_default_dtype", "torch.nn.functional:torch.os.mkdir",
    "torch.jit:load", "torch.fx:symbolic_trace", "torch.fx.graph_module:_exec_with_source",
    "torch.fx.graph_module:_forward_from_src", "torch.nn.modules.module:Module.apply",
    "torch.nn.modules.module:Module.load_state_dict", "torch.nn.modules.lazy:LazyModuleMixin",
    "torch.nn.modules.container:ModuleList", "torch.nn.modules.module:Module", "torch.distributed:init_process_group",
    "torch.multiprocessing:spawn", "torch.utils.model_zoo:load_url", "torch.autograd.function:Function",
    "torch:Tensor", "torch:Tensor.apply_", "torch:Tensor.numpy", "torch:Size", "timm.models._helpers:os.mkdir",
    "timm.models._helpers:load_state_dict", "timm.models._hub:load_state_dict_from_hf",
    "timm.utils.summary:update_summary", "timm.utils.checkpoint_saver:CheckpointSaver", "timm.models:create_model",
    "timm.models._builder:build_model_with_cfg", "timm.layers.config:set_scriptable", "timm.data.loader:create_loader",
    "torchvision.models._api:importlib.import_module", "torchvision.models._api:load_state_dict_from_url",
    "torchvision.io:read_file", "torchvision.io:write_file", "torchvision.models:get_model", "torchvision.ops:nms",
    "torchvision.datasets.utils:download_url", "torchvision.extension:_load_library", "torchvision.transforms:Lambda",
    "ghostify.__main__:main", "ghostify.cli.commands:main", "ghostify.io.checkpoint:load",
    "ghostify.io.checkpoint:save", "ghostify.io.atomic:write_text_atomic", "ghostify.imports:import_object",
    "ghostify.modules.ghost:GhostModule", "ghostify.api:ghostify", "ghostify.graph.methods:TracedModule",
    "ghostify.summary:report", "math:prod", "_operator:call", "_operator:attrgetter", "_operator:methodcaller",
    "_operator:itemgetter", "_operator:setitem", "_operator:mul", "_operator:pow", "operator:add", "functools:reduce",
    "functools:partial", "ctypes:CDLL", "socket:socket", "antigravity:x", "this:x", "code:interact", "pdb:set_trace",
    "site:main", "tests.nets:Straight", "numpy:load", "numpy:fromfile", "turtle:x",
)  # fmt: skip
METHODS = (
    "apply_", "map_", "numpy", "data_ptr", "share_memory_", "storage", "untyped_storage", "tofile", "register_hook",
    "requires_grad_", "backward", "module_load", "__reduce_ex__", "__init_subclass__", "format", "format_map",
    "encode", "set_", "resize_", "to", "type", "pin_memory", "cuda", "new_tensor", "tolist", "append", "pop", "view",
    "is_shared", "new", "names", "dim", "size", "data", "grad_fn", "join", "index_put_", "to_sparse",
    "__getattribute__", NAME,
)  # fmt: skip
SOURCES = (
    None, 3, [], {}, "timm:test_resnet", {"name": "timm:resnet18"}, {"name": "os:mkdir", "arguments": {"path": CODE}},
    {"name": "timm:test_resnet", "arguments": {"pretrained": True}},
    {"name": "timm:test_resnet", "arguments": {"checkpoint_path": "/etc/passwd"}},
    {"name": "timm:test_resnet", "arguments": {"pretrained_cfg": {"url": "file:///etc/passwd"}, "pretrained": True}},
    {"name": "timm:test_resnet", "arguments": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}, "pretrained": True}},
    {"name": "timm:test_resnet", "arguments": {"act_layer": CALL}},
    {"name": "timm:test_resnet", "arguments": {"num_classes": 10**12}}, {"name": "timm:hf_hub:a/b", "arguments": {}},
    {"name": "timm:local-dir:/etc", "arguments": {}},
    {"name": "torchvision:resnet18", "arguments": {"weights": "DEFAULT"}},
    {"name": "torchvision:resnet18", "arguments": {"weights_backbone": "DEFAULT"}},
    {"name": "torchvision:raft_small", "arguments": {}}, {"name": "torch:hub.load", "arguments": {"source": "local"}},
    {"name": f"{NAME}:{NAME}", "arguments": {}}, {"name": "ghostify.__main__:main", "arguments": {}},
    {"name": "timm:test_resnet", "arguments": {}, "input_size": [10**6, 10**6, 10**6]},
    {"name": "timm:test_resnet", "arguments": {}, "input_size": "3x32x32"},
)  # fmt: skip
PLAIN_VALUES = (
    None, True, False, 0, 1, 2, -1, 7, 10**6, 2**31, -(2**63), 0.5, 1e30, [1, 1], [2, 3, 4], [-1, 0], [10**6, 10**6],
    {"tuple": [1, 2]}, {"size": [2, 2]}, {"slice": [None, None, 2]}, {"ellipsis": True}, {"dtype": "float64"},
    {"dtype": "int8"}, {"dtype": "complex64"}, {"dtype": "quint8"}, {"device": "cpu"}, {"device": "meta"},
    {"float": "nan"}, {"memory_format": "channels_last"}, "mean", "same", "reflect", "constant", "bilinear", "none",
    "sum", CODE,
)  # fmt: skip
KEYWORDS = (
    "dim", "size", "weight", "bias", "stride", "padding", "groups", "output_size", "scale_factor", "mode", "dtype",
    "out", "inplace", "training", "p", "kernel_size", "keepdim", "dims", "repeats", "device", "eps", "message",
)  # fmt: skip


def nested(levels: int) -> Any:
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def tagged(rng: random.Random) -> dict[str, Any]:
    """A hostile value of a kind that the description encodes by its name."""
    name, text = rng.choice(IMPORTS), rng.choice(TEXTS)
    return rng.choice(
        (
            {"function": name},
            {"class": name},
            {"object": [name, {}]},
            {"object": [name, {text: text}]},
            {"node": text},
            {"partial": [name, [text], {"dict": []}]},
            {"partial": [name, [], {"dict": [[text, text]]}]},
            {"tensor": text},
            {"enum": [name, text]},
            {"enum": ["torch.nn.modules.module:Module", "__init__"]},
            {"device": text},
            {"device": "cuda:99"},
            {"device": "meta"},
            {"dtype": text},
            {"dtype": "Tensor"},
            {"memory_format": text},
            {"float": text},
            {"float": "nan"},
            {"size": [text]},
            {"size": [-1, 10**12]},
            {"tuple": nested(40)},
            {"set": [[]]},
            {"dict": [[text, text]]},
            {"dict": [[[], []]]},
            {"dict": {}},
            {"ordered": [[text]]},
            {"slice": [1]},
            {"slice": [1, 2, text]},
            {"ellipsis": text},
            {text: text},
            {},
            {"node": "x", "tensor": "y"},
            {"frozenset": [{"dict": []}]},
            {"size": 3},
        )
    )


def hostile_value(rng: random.Random, old: Any) -> Any:
    """A value in place of `old`: of another type, hostile text, or nearly the same."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(
            (None, True, False, 0, 1, -1, 2**31, 2**63, 10**50, 1.5, -0.0, 1e308, float("nan"), float("-inf"))
        )
    if kind == 1:
        return rng.choice(
            ([], {}, [None], nested(20), nested(90), nested(150), [0] * 10_000, {"x": old}, [old], [old, old])
        )
    if kind == 2:
        return tagged(rng)
    if kind == 3:
        return rng.choice(IMPORTS)
    if kind == 4:
        return rng.choice(METHODS)
    if kind == 5 or old is None or isinstance(old, list | dict):
        return rng.choice(TEXTS)
    if isinstance(old, bool):
        return rng.choice((not old, int(old), str(old), [old]))
    if isinstance(old, int | float):
        return rng.choice((-old, old + 1, old - 1, old * 10**6, old / 7, str(old), [old], float(old)))
    return rng.choice(
        (
            old[:-1],
            old[1:],
            old.upper(),
            f"{old}\n",
            f" {old}",
            old.replace("a", "\u0430"),
            f"{old}.{NAME}",
            f"{old}={CALL}",
            f"{old}.__class__",
            old.replace(".", ":", 1),
            f"{old}({CALL})",
            f"{old}:os.system",
            old * 2,
            f"../{old}",
            old.swapcase(),
        )
    )
