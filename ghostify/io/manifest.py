"""The files of a folder that ghostify wrote, known by their digests; all others are the user's."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ghostify.errors import GhostifyError
from ghostify.files import read_json
from ghostify.text import one_line

MANIFEST, FORMAT_VERSION = "ghostify-files.json", 1
TENSORS, DESCRIPTION = "model.safetensors", "ghostify.json"
STAGING_INSIDE, PARTIAL, COMPLETE = ".ghostify-staging", "partial", "complete"
STAGED_INSIDE = tuple(f"{STAGING_INSIDE}/{name}/" for name in (PARTIAL, COMPLETE))
RECENT_NS = 2_000_000_000
MAX_DEPTH = 100  # of folders in folders


def own_files(folder: Path) -> dict[str, str]:
    """Digests of the files that ghostify wrote and that are unchanged since, by their path in the folder.

    A folder without a manifest, of an earlier version, holds a saved model where its description is intact.
    """
    recorded = _recorded_digests(folder)
    if recorded is None:
        recorded = _digests_of_saved_model(folder)
    return {name: digest for name, digest in recorded.items() if _is_unchanged(folder, name, digest)}


def changed_files(folder: Path) -> Iterator[str]:
    """Paths of the files in the manifest that are missing or were changed; none without a manifest."""
    unchanged = own_files(folder)
    return (name for name in _recorded_digests(folder) or () if name not in unchanged)


def own_names(folder: Path) -> set[str]:
    """The paths of these files, and of the manifest where there is one."""
    return {*own_files(folder), *([] if _recorded_digests(folder) is None else [MANIFEST])}


def foreign_entries(folder: Path) -> Iterator[str]:
    """Paths of all other files, links and empty folders, sorted; those of folders end in a slash."""
    names = own_names(folder)
    return (name for name in entries(folder) if name not in names and not _is_staged(name))


def _is_staged(name: str) -> bool:
    """Whether a write that stages within the folder fills and removes this."""
    return name == f"{STAGING_INSIDE}/" or name.startswith(STAGED_INSIDE)


def entries(folder: Path, prefix: str = "") -> Iterator[str]:
    """Paths of the files, links and empty folders below a folder, sorted; those of folders end in a slash.

    Raises `GhostifyError` for folders that are nested without end.
    """
    if not folder.is_dir():
        return
    if prefix.count("/") > MAX_DEPTH:
        raise GhostifyError(f"{one_line(str(folder))}: is more than {MAX_DEPTH} levels deep. Name another folder.")
    with os.scandir(folder) as listing:
        found_entries = sorted(listing, key=lambda entry: entry.name)
    for entry in found_entries:
        if entry.is_dir(follow_symlinks=False):
            is_empty = True
            for name in entries(Path(entry.path), f"{prefix}{entry.name}/"):
                is_empty = False
                yield name
            if is_empty:
                yield f"{prefix}{entry.name}/"
        else:
            yield f"{prefix}{entry.name}"


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """Record the files of a folder that ghostify wrote."""
    content = {"format": FORMAT_VERSION, "files": dict(sorted(digests.items()))}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def file_digest(file: Path) -> str:
    """SHA-256 of a file that may be larger than the memory."""
    facts = file.stat()
    if time.time_ns() - max(facts.st_mtime_ns, facts.st_ctime_ns) < RECENT_NS:
        return _compute_digest(file)  # times are too coarse to notice the next change
    return _digest_at(file, (facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns))


@lru_cache(maxsize=256)
def _digest_at(file: Path, _facts: tuple[int, ...]) -> str:
    """The digest of a file with these facts, computed once."""
    return _compute_digest(file)


def _compute_digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def content_digest(content: dict[str, Any]) -> str:
    """SHA-256 of the content as compact JSON with sorted keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _recorded_digests(folder: Path) -> dict[str, str] | None:
    """The content of the manifest; None without one, or where it is not one of this format."""
    content = _read_object(folder / MANIFEST)
    files = None if content is None or content.get("format") != FORMAT_VERSION else content.get("files")
    return files if isinstance(files, dict) else None


def _digests_of_saved_model(folder: Path) -> dict[str, str]:
    """The digests that an intact description states, for itself and for its tensors."""
    content = _read_object(folder / DESCRIPTION)
    if content is None or content.pop("digest", None) != content_digest(content):
        return {}
    return {DESCRIPTION: file_digest(folder / DESCRIPTION), TENSORS: str(content.get("tensors"))}


def _read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object in a regular file; None if there is none."""
    if file.is_symlink() or not file.is_file():
        return None
    try:
        content = read_json(file)
    except GhostifyError:
        return None
    return content if isinstance(content, dict) else None


def _is_unchanged(folder: Path, name: str, digest: str) -> bool:
    """Whether a regular file of that name, below the folder itself, has the digest."""
    path = PurePosixPath(name)
    file = folder / path
    is_inside = "\0" not in name and not path.is_absolute() and ".." not in path.parts
    is_real = is_inside and os.path.realpath(file) == os.path.join(os.path.realpath(folder), path)
    return is_real and file.is_file() and file_digest(file) == digest
