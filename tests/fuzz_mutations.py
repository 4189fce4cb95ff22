"""Changes to a saved folder: of every field of its description, of its tensors, and of its files.

What would run as code has `CODE` in it, and names have `NAME`, so that the watch recognises them (see `fuzz_watch`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz_samples import Sample

CODE, NAME = "canarycode", "canaryname"
CALL = f"__import__('os').mkdir('{CODE}') or {CODE}()"
Path_ = tuple[Any, ...]

TEXTS = (
    "", " ", "x", "0", "None", "True", "self", "class", "lambda", "import", "print", "forward", "training", "_modules",
    "__class__", "__init__", "__dict__", "__reduce__", "__call__", "_parameters", "_forward_hooks", "a.b", ".", "..", "../x",
    "*args", "**kwargs", "*", "/etc/passwd", "../../etc/passwd", "~", "C:\\x", "file:///etc/passwd", "x\ny", "x\\\ny", "x\0y",
    "\x1b[31mred", "\u202eabc", "\ud800", "[bold]x[/bold]", "{x}", "%s%n", "x" * 100_000, "self.x", "act.__init__.__globals__",
    "__init__.__globals__", "forward.__func__.__globals__", "weight.__class__", "weight.data", "T", "ｓelf", "ſelf", "аct",
    NAME, f"{NAME}.{NAME}", f"{NAME}:{NAME}", f"torch:{NAME}", f"ghostify.{NAME}:{NAME}", f"__{NAME}__", f"{NAME} ", f"{NAME}​",
    CALL, f"x={CALL}", f"x: {CALL}", f"inplace=bool({CALL}), more", f"x):\n    {CALL}\n#", f"x; {CALL}", f"'+{CALL}+'",
    f'"""+{CALL}+"""', f"x\n    {CODE}()", f"x, y={CALL}", f"self.{CODE}()", f"act({CALL})", f"act[{CALL}]", f"x\\\n={CALL}",
    f"x\r{CALL}", f"x\x0c={CALL}", f"x\u2028{CALL}", f"x # {CODE}", f"*{CODE}, x=0", f"lambda: {CALL}", f"{{{CALL}}}",
)  # fmt: skip
IMPORTS = (
    "os:system", "os:mkdir", "posix:system", "posix:mkdir", "subprocess:Popen", "subprocess:run", "builtins:exec", "builtins:eval",
    "builtins:__import__", "builtins:open", "builtins:getattr", "builtins:setattr", "builtins:type", "builtins:vars",
    "builtins:compile", "builtins:print", "builtins:input", "importlib:import_module", "pickle:loads", "shutil:rmtree",
    "torch:load", "torch:save", "torch:from_file", "torch:os.system", "torch:os.mkdir", "torch:_VF.from_file",
    "torch:_C._VariableFunctions.from_file", "torch.functional:torch.load", "torch.functional:torch.os.mkdir",
    "torch.hub:load", "torch.hub:download_url_to_file", "torch.serialization:load", "torch.ops:load_library",
    "torch._ops:ops.load_library", "torch.utils.cpp_extension:load", "torch:compile", "torch:set_num_threads",
    "torch:manual_seed", "torch:set_default_dtype", "torch.nn.functional:torch.os.mkdir", "torch.jit:load",
    "torch.fx:symbolic_trace", "torch.fx.graph_module:_exec_with_source", "torch.fx.graph_module:_forward_from_src",
    "torch.nn.modules.module:Module.apply", "torch.nn.modules.module:Module.load_state_dict",
    "torch.nn.modules.lazy:LazyModuleMixin", "torch.nn.modules.container:ModuleList", "torch.nn.modules.module:Module",
    "torch.distributed:init_process_group", "torch.multiprocessing:spawn", "torch.utils.model_zoo:load_url",
    "torch.autograd.function:Function", "torch:Tensor", "torch:Tensor.apply_", "torch:Tensor.numpy", "torch:Size",
    "timm.models._helpers:os.mkdir", "timm.models._helpers:load_state_dict", "timm.models._hub:load_state_dict_from_hf",
    "timm.utils.summary:update_summary", "timm.utils.checkpoint_saver:CheckpointSaver", "timm.models:create_model",
    "timm.models._builder:build_model_with_cfg", "timm.layers.config:set_scriptable", "timm.data.loader:create_loader",
    "torchvision.models._api:importlib.import_module", "torchvision.models._api:load_state_dict_from_url",
    "torchvision.io:read_file", "torchvision.io:write_file", "torchvision.models:get_model", "torchvision.ops:nms",
    "torchvision.datasets.utils:download_url", "torchvision.extension:_load_library", "torchvision.transforms:Lambda",
    "ghostify.__main__:main", "ghostify.cli.commands:main", "ghostify.io.checkpoint:load", "ghostify.io.checkpoint:save",
    "ghostify.io.atomic:write_text_atomic", "ghostify.imports:import_object", "ghostify.modules.ghost:GhostModule",
    "ghostify.api:ghostify", "ghostify.graph.methods:TracedModule", "ghostify.summary:report", "math:prod", "_operator:call",
    "_operator:attrgetter", "_operator:methodcaller", "_operator:itemgetter", "_operator:setitem", "_operator:mul",
    "_operator:pow", "operator:add", "functools:reduce", "functools:partial", "ctypes:CDLL", "socket:socket", "antigravity:x",
    "this:x", "code:interact", "pdb:set_trace", "site:main", "tests.nets:Straight", "numpy:load", "numpy:fromfile", "turtle:x",
)  # fmt: skip
METHODS = (
    "apply_", "map_", "numpy", "data_ptr", "share_memory_", "storage", "untyped_storage", "tofile", "register_hook",
    "requires_grad_", "backward", "module_load", "__reduce_ex__", "__init_subclass__", "format", "format_map", "encode",
    "set_", "resize_", "to", "type", "pin_memory", "cuda", "new_tensor", "tolist", "append", "pop", "view", "is_shared",
    "new", "names", "dim", "size", "data", "grad_fn", "join", "index_put_", "to_sparse", "__getattribute__", NAME,
)  # fmt: skip
SOURCES = (
    None, 3, [], {}, "timm:test_resnet", {"name": "timm:resnet18"}, {"name": "os:mkdir", "arguments": {"path": CODE}},
    {"name": "timm:test_resnet", "arguments": {"pretrained": True}},
    {"name": "timm:test_resnet", "arguments": {"checkpoint_path": "/etc/passwd"}},
    {"name": "timm:test_resnet", "arguments": {"pretrained_cfg": {"url": "file:///etc/passwd"}, "pretrained": True}},
    {"name": "timm:test_resnet", "arguments": {"pretrained_cfg_overlay": {"file": "/etc/passwd"}, "pretrained": True}},
    {"name": "timm:test_resnet", "arguments": {"act_layer": CALL}},
    {"name": "timm:test_resnet", "arguments": {"num_classes": 10**12}},
    {"name": "timm:hf_hub:a/b", "arguments": {}}, {"name": "timm:local-dir:/etc", "arguments": {}},
    {"name": "torchvision:resnet18", "arguments": {"weights": "DEFAULT"}},
    {"name": "torchvision:resnet18", "arguments": {"weights_backbone": "DEFAULT"}},
    {"name": "torchvision:raft_small", "arguments": {}}, {"name": "torch:hub.load", "arguments": {"source": "local"}},
    {"name": f"{NAME}:{NAME}", "arguments": {}}, {"name": "ghostify.__main__:main", "arguments": {}},
    {"name": "timm:test_resnet", "arguments": {}, "input_size": [10**6, 10**6, 10**6]},
    {"name": "timm:test_resnet", "arguments": {}, "input_size": "3x32x32"},
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
            {"function": name}, {"class": name}, {"object": [name, {}]}, {"object": [name, {text: text}]}, {"node": text},
            {"partial": [name, [text], {"dict": []}]}, {"partial": [name, [], {"dict": [[text, text]]}]}, {"tensor": text},
            {"enum": [name, text]}, {"enum": ["torch.nn.modules.module:Module", "__init__"]}, {"device": text},
            {"device": "cuda:99"}, {"device": "meta"}, {"dtype": text}, {"dtype": "Tensor"}, {"memory_format": text},
            {"float": text}, {"float": "nan"}, {"size": [text]}, {"size": [-1, 10**12]}, {"tuple": nested(40)}, {"set": [[]]},
            {"dict": [[text, text]]}, {"dict": [[[], []]]}, {"dict": {}}, {"ordered": [[text]]}, {"slice": [1]}, {"slice": [1, 2, text]},
            {"ellipsis": text}, {text: text}, {}, {"node": "x", "tensor": "y"}, {"frozenset": [{"dict": []}]}, {"size": 3},
        )
    )  # fmt: skip


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
        (old[:-1], old[1:], old.upper(), f"{old}\n", f" {old}", old.replace("a", "а"), f"{old}.{NAME}", f"{old}={CALL}",
         f"{old}.__class__", old.replace(".", ":", 1), f"{old}({CALL})", f"{old}:os.system", old * 2, f"../{old}", old.swapcase())
    )  # fmt: skip


FREE_KEYS = ("modules", "parameters", "buffers", "aliases", "kwargs", "__metadata__")  # whose keys are names


@cache
def _fields(text: str) -> dict[Path_, tuple[Path_, ...]]:
    """The paths of all values in JSON data, grouped by field: the path with `*` for names and numbers."""
    fields: dict[Path_, list[Path_]] = defaultdict(list)
    pending: list[tuple[Path_, Path_, Any]] = [((), (), json.loads(text))]
    while pending:
        path, field, value = pending.pop()
        fields[field].append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            is_free = isinstance(key, int) or (field and field[-1] in FREE_KEYS)
            pending.append(((*path, key), (*field, "*" if is_free else key), inner))
    del fields[()]
    return {field: tuple(paths) for field, paths in fields.items()}


def _at(content: Any, path: Path_) -> Any:
    for key in path:
        content = content[key]
    return content


def change_field(content: Any, text: str, rng: random.Random) -> str:
    """Change one value of JSON data, whose text before any change is given, in one of seven ways; returns which."""
    fields = _fields(text)
    path = rng.choice(fields[rng.choice(tuple(fields))])
    try:
        owner, key = _at(content, path[:-1]), path[-1]
        old = owner[key]
    except (KeyError, IndexError, TypeError):
        return "nothing left"  # an earlier change of the same folder removed it
    way = rng.choice(("replace", "replace", "replace", "delete", "rename", "copy", "swap", "add"))
    if way == "replace":
        owner[key] = hostile_value(rng, old)
    elif way == "delete":
        del owner[key]
    elif way in ("rename", "copy") and isinstance(owner, dict):
        owner[rng.choice((*TEXTS, *IMPORTS, *owner))] = copy.deepcopy(old) if way == "copy" else owner.pop(key)
    elif way == "swap":
        other = rng.choice(fields[rng.choice(tuple(fields))])
        owner[key] = copy.deepcopy(_at(json.loads(text), other))
    elif isinstance(owner, list):
        owner.insert(
            rng.randrange(len(owner) + 1), copy.deepcopy(old) if rng.random() < 0.5 else hostile_value(rng, old)
        )
    else:
        owner[rng.choice(TEXTS)] = hostile_value(rng, old)
    return way


def add_node(content: dict[str, Any], rng: random.Random) -> None:
    """Insert a node into a graph; half of the time a node after it reads it."""
    modules = content["model"]["modules"]
    graphs = [item["nodes"] for item in modules.values() if "nodes" in item]
    nodes = rng.choice(graphs)
    position = rng.randrange(len(nodes))
    names = [node["name"] for node in nodes[:position]]
    op = rng.choice(
        ("call_function", "call_function", "call_method", "get_attr", "call_module", "placeholder", "output", NAME)
    )
    target = {"call_function": rng.choice(IMPORTS), "call_method": rng.choice(METHODS)}.get(
        op, rng.choice((*TEXTS, *modules, *(f"{name}.__init__.__globals__" for name in modules)))
    )
    values = [{"node": rng.choice(names)} if names else 0, CODE, True, 3, rng.choice(TEXTS), tagged(rng), [1, 2]]
    rng.shuffle(values)
    kwargs = {rng.choice(TEXTS): rng.choice(values)} if rng.random() < 0.4 else {}
    added = {
        "name": rng.choice((NAME, *TEXTS)),
        "op": op,
        "target": target,
        "args": values[: rng.randrange(4)],
        "kwargs": kwargs,
    }
    nodes.insert(position, added)
    if rng.random() < 0.5:
        rng.choice(nodes[position + 1 :])["args"] = [{"node": added["name"]}]


def change_shape(content: dict[str, Any], header: dict[str, Any], rng: random.Random) -> None:
    """Give a tensor another shape in the description and in the header alike."""
    name = rng.choice([key for key in header if key != "__metadata__"])
    sizes = header[name]["shape"]
    shape = rng.choice(([*sizes, 1], sizes[::-1], [1, *sizes], [0], [], [10**9], [2**62, 2**62]))
    header[name]["shape"] = shape
    path, _, leaf = name.rpartition(".")
    item = content["model"]["modules"].get(path, {})
    for kind in ("parameters", "buffers"):
        if item.get(kind, {}).get(leaf):
            item[kind][leaf]["shape"] = shape


def read_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file as JSON data, and the bytes after it."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, remove or add bytes, more often near the start."""
    position = min(int(rng.paretovariate(0.3)), len(data) - 1)
    noise = rng.randbytes(rng.choice((1, 8, 100)))
    return rng.choice(
        (
            data[:position] + noise + data[position + len(noise) :],
            data[:position],
            data[:position] + data[position + len(noise) :],
            data + noise,
            rng.choice((0, 7, 2**31, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:],
            b"",
            noise,
        )
    )


def change_json_text(text: str, rng: random.Random) -> str:
    """Break the rules of JSON, or use those that few writers use."""
    position = rng.randrange(len(text))
    brace = rng.choice([i for i, c in enumerate(text[:20_000]) if c == "{"])
    return rng.choice(
        (
            text[:position],
            text + rng.choice(("]", "x", text)),
            text[: brace + 1] + '"format": 2, "format": 1,' + text[brace + 1 :],
            "\ufeff" + text,
            "[" * rng.choice((10, 1_000, 1_000_000)) + text,
            text.replace("0", "NaN", 1),
            text.replace("0", "1e999", 1),
            text.replace("0", "1" * rng.choice((50, 5_000)), 1),
            text.replace('"a', '"\\ud800', 1),
            text.replace("true", "True", 1),
            text[:position] + chr(rng.randrange(1, 0x3000)) + text[position + 1 :],
            "{" + text.strip()[1:-1] + ', "x": ' + "[0,0]," * 10_000 + "0}",
            " " * 1_000_000 + text,
            "",
            "null",
        )
    )


def _remove(file: Path) -> None:
    file.unlink()


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _sparse(file: Path) -> None:
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content)  # the file may be one with that of the sample
    os.truncate(file, 2**40)


def _link(target: str) -> Callable[[Path], None]:
    def link(file: Path) -> None:
        file.unlink()
        file.symlink_to(target)

    return link


FILE_CHANGES: dict[str, Callable[[Path], None]] = {
    "missing": _remove,
    "pipe": _pipe,
    "folder": _folder,
    "sparse": _sparse,
    "device": _link("/dev/zero"),
    "link out": _link("/etc/passwd"),
    "link to nothing": _link(CODE),
    "link loop": _link("ghostify.json"),
    "unreadable name": lambda file: file.rename(file.with_name("x\n")),
}


def write_case(sample: Sample, folder: Path, rng: random.Random) -> str:
    """Write a changed copy of a sample as `folder`; returns the kind of the change."""
    folder.mkdir()
    tensors, description = folder / "model.safetensors", folder / "ghostify.json"
    kind = rng.choices(
        ("field", "fields", "node", "source", "header", "shape", "bytes", "json", "file"),
        (45, 15, 15, 4, 6, 3, 4, 4, 4),
    )[0]
    content, data, way = sample.content(), None, ""
    if kind == "field":
        way = change_field(content, sample.text, rng)
    elif kind == "fields":
        for _ in range(rng.randrange(2, 6)):
            change_field(content, sample.text, rng)
    elif kind == "node":
        add_node(content, rng)
    elif kind == "source":
        content["source"] = copy.deepcopy(rng.choice(SOURCES))
    elif kind in ("header", "shape"):
        header, rest = read_header((sample.folder / tensors.name).read_bytes())
        change_shape(content, header, rng) if kind == "shape" else change_field(header, json.dumps(header), rng)
        data = with_header(header, rest)
    elif kind == "bytes":
        data = change_bytes((sample.folder / tensors.name).read_bytes(), rng)
    is_sealed = rng.random() < 0.9
    if data is None:
        os.link(sample.folder / tensors.name, tensors)
    else:
        tensors.write_bytes(data)
        if is_sealed:
            content["tensors"] = hashlib.sha256(data).hexdigest()
    text = json.dumps(_sealed(content) if is_sealed else {**content, "digest": json.loads(sample.text)["digest"]})
    if kind == "json":
        text = change_json_text(text, rng)
    description.write_text(text, encoding="utf-8", errors="surrogatepass")
    if kind == "file":
        way = rng.choice(tuple(FILE_CHANGES))
        FILE_CHANGES[way](rng.choice((tensors, description)))
    return f"{kind}: {way}" if way else kind


def _sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the digest that belongs to it."""
    whole = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return {**content, "digest": hashlib.sha256(whole).hexdigest()}
