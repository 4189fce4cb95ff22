"""The end of the command: an exit code, and one line on standard error where it is not 0."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
import typer

from ghostify.errors import GhostifyError
from ghostify.text import one_line
from ghostify.user_warnings import GhostifyWarning

MISTAKE, INTERRUPTED, CLOSED_PIPE = 2, 130, 141  # the latter two as of a process that a signal ended
UsageError: Any = typer.BadParameter.__base__  # of the click that this typer contains or depends on
PARSER_WORDS = re.compile(r"Input should be (.*?)(, unable to parse .*)?$")  # of values that are no numbers
OUT_OF_MEMORY = ("not enough memory", "allocate memory")  # in what PyTorch raises as a RuntimeError on the CPU


def print_notice(text: str) -> None:
    """Print one line on standard error."""
    print(f"ghostify: {one_line(text)}", file=sys.stderr)


def run(app: Callable[..., Any]) -> int:
    """Run a typer app and return its exit code.

    A mistake of the user, or of the machine that it runs on, is printed as one line. Other exceptions are mistakes of
    this package and are raised. Warnings of this package are printed as lines, those of other packages are not.
    """
    _accept_any_text()
    try:
        with _cleaning_up_when_terminated(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("default", GhostifyWarning)
            warnings.showwarning = lambda message, *_, **__: print_notice(str(message))
            code = app(standalone_mode=False) or 0
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the interpreter flushes and closes it
        return CLOSED_PIPE
    except (GhostifyError, UsageError, OSError, MemoryError, RuntimeError) as error:
        text = _describe(error)
        if text is None:
            raise
        print_notice(text)
        return MISTAKE
    if code == INTERRUPTED:
        print_notice("interrupted.")
    return int(code)


@contextlib.contextmanager
def _cleaning_up_when_terminated() -> Iterator[None]:
    """On the first SIGTERM, leave all contexts, which removes temporary files, before the process ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _end(number: int, _frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise SystemExit(128 + number)


def _describe(error: Exception) -> str | None:
    """An error in words; None for one that is neither the user's nor the machine's."""
    if isinstance(error, GhostifyError):
        return str(error)
    if isinstance(error, UsageError):
        command = "ghostify" if error.ctx is None else error.ctx.command_path
        message = PARSER_WORDS.sub(r"it should be \1", error.format_message().rstrip("."))
        return f"{message}. See {command} --help."
    if isinstance(error, OSError):
        place = "" if error.filename is None else f"{error.filename}: "
        return f"{place}{error.strerror or error}. Check the path, its rights and the free space."
    is_out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_out_of_memory or any(words in str(error) for words in OUT_OF_MEMORY):
        return (
            f"not enough memory ({one_line(str(error), 200)}). Use smaller images, fewer of them, or a smaller batch."
        )
    return None


def _accept_any_text() -> None:
    """Print characters that the terminal's encoding lacks as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
