"""Changes to a saved folder: of every field of its description, of its tensors, and of its files."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ghostify.graph.allowed_ops import listed_names
from tests.fuzz_files import DESCRIPTION, TENSORS, change_bytes, change_file, change_json_text, read_header, with_header
from tests.fuzz_samples import Sample
from tests.fuzz_values import (
    CODE,
    IMPORTS,
    KEYWORDS,
    METHODS,
    NAME,
    PLAIN_VALUES,
    SOURCES,
    TEXTS,
    hostile_value,
    tagged,
)

Place = tuple[Any, ...]
FREE_KEYS = ("modules", "parameters", "buffers", "aliases", "kwargs", "__metadata__")  # whose keys are names


@dataclass
class Case:
    """A folder to be: its description, and the bytes of its tensors, None as long as they are the sample's."""

    sample: Sample
    content: dict[str, Any]
    data: bytes | None = None

    def stored(self) -> bytes:
        """The sample's tensors."""
        return (self.sample.folder / TENSORS).read_bytes()


@cache
def _fields(text: str) -> dict[Place, tuple[Place, ...]]:
    """The paths of all values in JSON data, grouped by field: the path with `*` for names and numbers."""
    fields: dict[Place, list[Place]] = defaultdict(list)
    pending: list[tuple[Place, Place, Any]] = [((), (), json.loads(text))]
    while pending:
        path, field, value = pending.pop()
        fields[field].append(path)
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            is_free = isinstance(key, int) or (field and field[-1] in FREE_KEYS)
            pending.append(((*path, key), (*field, "*" if is_free else key), inner))
    del fields[()]
    return {field: tuple(paths) for field, paths in fields.items()}


def _at(content: Any, path: Place) -> Any:
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
        owner = None
    if not isinstance(owner, dict | list):
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


def add_node(case: Case, rng: random.Random) -> None:
    """Insert a node with hostile names into a graph; half of the time a node after it reads it."""
    modules = case.content["model"]["modules"]
    nodes = rng.choice([item["nodes"] for item in modules.values() if "nodes" in item])
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
    _insert(nodes, position, rng.choice((NAME, *TEXTS)), op, target, values[: rng.randrange(4)], kwargs, rng)


def call_listed(case: Case, rng: random.Random) -> None:
    """Insert a call of a function or method that a folder may name, with arguments that it may not expect."""
    listed = listed_names()
    nodes = rng.choice([item["nodes"] for item in case.content["model"]["modules"].values() if "nodes" in item])
    position = rng.randrange(1, len(nodes))
    values: list[Any] = [{"node": node["name"]} for node in nodes[:position]]
    values = rng.choices(values, k=3) + rng.sample(PLAIN_VALUES, 4)
    rng.shuffle(values)
    op = rng.choice(("call_function", "call_method"))
    target = rng.choice(sorted(listed.functions if op == "call_function" else listed.methods))
    args = [{"node": rng.choice(nodes[:position])["name"]}, *values[: rng.randrange(4)]]
    kwargs = {rng.choice(KEYWORDS): rng.choice(values)} if rng.random() < 0.3 else {}
    _insert(nodes, position, NAME, op, target, args, kwargs, rng)


def _insert(
    nodes: list[Any], position: int, name: str, op: str, target: Any, args: Any, kwargs: Any, rng: random.Random
) -> None:
    nodes.insert(position, {"name": name, "op": op, "target": target, "args": args, "kwargs": kwargs})
    reader = rng.choice(nodes[position + 1 :])
    if rng.random() < 0.7 and reader["op"] != "placeholder":
        reader["args"] = [{"node": name}, *reader["args"][1:]]


def change_class(case: Case, rng: random.Random) -> None:
    """Give a module another class that a folder may name, or attributes that its class does not expect."""
    listed = listed_names()
    items = [item for item in case.content["model"]["modules"].values() if "class" in item and "attributes" in item]
    item = rng.choice(items)
    if rng.random() < 0.5:
        item["class"] = rng.choice(sorted(listed.modules))
    for _ in range(rng.randrange(3)):
        function = rng.choice(sorted(listed.functions | listed.modules | listed.objects))
        value = rng.choice(
            (
                {"function": function},
                {"class": function},
                {"partial": [function, [3], {"dict": []}]},
                {"object": [function, {"x": 1}]},
                hostile_value(rng, 3),
                *PLAIN_VALUES,
            )
        )
        known = [*item["attributes"], "_conv_forward", "activation", "act", "extra_repr", "register_forward_hook", NAME]
        item["attributes"][rng.choice((*known, *TEXTS))] = value


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


def _field(case: Case, rng: random.Random) -> str:
    return change_field(case.content, case.sample.text, rng)


def _several_fields(case: Case, rng: random.Random) -> None:
    for _ in range(rng.randrange(2, 6)):
        change_field(case.content, case.sample.text, rng)


def _source(case: Case, rng: random.Random) -> None:
    case.content["source"] = copy.deepcopy(rng.choice(SOURCES))


def _header(case: Case, rng: random.Random) -> str:
    header, rest = read_header(case.stored())
    way = change_field(header, json.dumps(header), rng)
    case.data = with_header(header, rest)
    return way


def _shape(case: Case, rng: random.Random) -> None:
    header, rest = read_header(case.stored())
    change_shape(case.content, header, rng)
    case.data = with_header(header, rest)


def _bytes(case: Case, rng: random.Random) -> None:
    case.data = change_bytes(case.stored(), rng)


CHANGES: dict[str, tuple[int, Callable[[Case, random.Random], str | None]]] = {
    "field": (40, _field),
    "fields": (12, _several_fields),
    "node": (8, add_node),
    "call": (12, call_listed),
    "class": (8, change_class),
    "source": (3, _source),
    "header": (5, _header),
    "shape": (3, _shape),
    "bytes": (3, _bytes),
    "json": (3, lambda *_: None),
    "file": (3, lambda *_: None),
}
"""Kinds of changes, how often each is made, and the function that makes it; the last two are made on the files."""


def write_case(sample: Sample, folder: Path, rng: random.Random) -> str:
    """Write a changed copy of a sample as `folder`; returns the kind of the change."""
    kind = rng.choices(tuple(CHANGES), [weight for weight, _ in CHANGES.values()])[0]
    case = Case(sample, sample.content())
    way = CHANGES[kind][1](case, rng) or ""
    is_sealed = rng.random() < 0.9
    folder.mkdir()
    if case.data is None:
        os.link(sample.folder / TENSORS, folder / TENSORS)
    else:
        (folder / TENSORS).write_bytes(case.data)
        if is_sealed:
            case.content["tensors"] = hashlib.sha256(case.data).hexdigest()
    digest = _digest(case.content) if is_sealed else json.loads(sample.text)["digest"]
    text = json.dumps({**case.content, "digest": digest})
    if kind == "json":
        text = change_json_text(text, rng)
    (folder / DESCRIPTION).write_text(text, encoding="utf-8", errors="surrogatepass")
    if kind == "file":
        way = change_file(folder / rng.choice((TENSORS, DESCRIPTION)), rng)
    return f"{kind}: {way}" if way else kind


def _digest(content: dict[str, Any]) -> str:
    """The digest that belongs to a description."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
