"""Changes to a saved folder's files: their kind, the bytes of the tensors, the text of the description."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fuzz_values import CODE

TENSORS, DESCRIPTION = "model.safetensors", "ghostify.json"


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


def _misname(file: Path) -> None:
    file.rename(file.with_name("x\n"))


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
    "unreadable name": _misname,
}


def change_file(file: Path, rng: random.Random) -> str:
    """Put something else in place of a file; returns what."""
    way = rng.choice(tuple(FILE_CHANGES))
    FILE_CHANGES[way](file)
    return way
