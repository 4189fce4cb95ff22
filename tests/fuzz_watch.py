"""A watch over the interpreter: what code that reads a stranger's folder must not do, by Python's audit events."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import torch

import ghostify
from tests.fuzz_values import CODE

ROOTS = {sys.prefix, sys.base_prefix, *(str(Path(p.__file__).parents[1]) for p in (torch, ghostify))}
LIBRARY = tuple(sorted({os.path.realpath(root) for root in ROOTS}))  # opened lazily, and for reading only
SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/usr/share/zoneinfo")
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NEVER = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "pty.", "socket.",
    "urllib.", "http.", "ftplib.", "smtplib.", "imaplib.", "poplib.", "telnetlib.", "webbrowser.", "pickle.", "ctypes.",
    "code.__new__", "builtins.input", "sys.setprofile", "sys.settrace", "cpython.", "signal.pthread_kill", "os.kill",
)  # fmt: skip
ON_PATHS = (
    "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.chown", "os.link", "os.symlink", "os.truncate",
    "os.utime", "shutil.", "tempfile.", "os.setxattr", "os.removexattr", "glob.", "os.chdir",
)  # fmt: skip
PERMITTED_FOR_SAVING = ("ctypes.",)  # the exchange of two folders in one step


class ForbiddenError(BaseException):
    """Ends what the watch does not permit; no handler of errors takes it for one."""


class Watch:
    """Records forbidden events, and stops them, while it is on. It stays in the interpreter for good."""

    def __init__(self) -> None:
        self.is_on, self.is_off = False, False
        self.events: list[str] = []
        self.readable: tuple[str, ...] = ()
        self.writable: tuple[str, ...] = ()
        self.permitted: tuple[str, ...] = ()
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def over(self, *, readable: Path, writable: Path | None = None) -> Iterator[None]:
        """The watch on, with a folder that may be read, and, to save, one that may be written to."""
        self.readable = (os.path.realpath(readable),)
        self.writable = () if writable is None else (os.path.realpath(writable),)
        self.permitted = () if writable is None else PERMITTED_FOR_SAVING
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """No watch, also where `over` says so."""
        self.is_off = True
        try:
            yield
        finally:
            self.is_off = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or self.is_off:
            return
        self.is_on = False  # what the hook does itself
        try:
            problem = self._problem(event, arguments)
        finally:
            self.is_on = True
        if problem is not None:
            self.events.append(problem[:500])
            raise ForbiddenError(problem[:500])

    def _problem(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        """Why an event is forbidden, or None."""
        if event == "open":
            return self._opening(*arguments)
        if event == "compile":
            return foreign_code(arguments[0])
        if event == "exec":
            return _foreign_names(arguments[0])
        if event == "import":
            return f"import of {arguments[0]}"
        if event.startswith(NEVER) and not event.startswith(self.permitted or ("\0",)):
            return f"{event}{arguments!r}"
        if event.startswith(ON_PATHS):
            paths = [os.fspath(a) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            outside = [p for p in paths if not _is_within(p, self.writable)]
            return f"{event}{arguments!r}" if outside else None
        return None

    def _opening(self, path: Any, mode: Any, flags: Any) -> str | None:
        if isinstance(path, int) or path is None:
            return None
        is_writing = bool((flags or 0) & WRITE) or (isinstance(mode, str) and bool(set(mode) & set("wax+")))
        real = os.path.realpath(os.fsdecode(path))
        if _is_within(real, self.writable) or (not is_writing and _is_within(real, (*self.readable, *LIBRARY))):
            return None
        if not is_writing and real.startswith(SYSTEM):
            return None
        return f"open of {path!r} with mode {mode!r}"


def _is_within(path: str | bytes, folders: tuple[str, ...]) -> bool:
    real = os.path.realpath(os.fsdecode(path))
    return any(real == folder or real.startswith(f"{folder}{os.sep}") for folder in folders)


def foreign_code(source: Any) -> str | None:
    """Where Python source has `CODE` as a name or in a comment, not within a text or a longer name; None where not."""
    text = source.decode(errors="replace") if isinstance(source, bytes | bytearray) else source
    if not isinstance(text, str) or CODE not in text:
        return None
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        return f"compile of text of the folder: {error}"
    is_foreign = any(t.string == CODE or (t.type == tokenize.COMMENT and CODE in t.string) for t in tokens)
    return f"compile of text of the folder: {text[:300]!r}" if is_foreign else None


def _foreign_names(code: Any) -> str | None:
    """That a code object, or one within it, has the name `CODE`; None where none has."""
    if not isinstance(code, CodeType):
        return None
    if CODE in (*code.co_names, *code.co_varnames):
        return "exec of code of the folder"
    return next((found for found in map(_foreign_names, code.co_consts) if found is not None), None)
