"""Code and commands in new processes, forked from one that has imported the package."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess

import tests.timm_models  # noqa: F401 - a network for the processes

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["ghostify.cli.commands", "tests.command"])
TIMEOUT_SECONDS = 300
COMMAND = "from ghostify.cli.commands import main; main()"
SCRIPT = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"


def run_command(*arguments: object, cwd: Path) -> CompletedProcess[str]:
    """Output and exit code of `ghostify ARGUMENTS` in a folder."""
    return run_code(COMMAND, *arguments, cwd=cwd)


def run_code(
    code: str, *arguments: object, cwd: Path, environment: Mapping[str, str] | None = None
) -> CompletedProcess:
    """Output and exit code of `python -c CODE ARGUMENTS` in a folder; seconds faster than in a new interpreter."""
    words = [str(word) for word in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = FORKS.Process(target=_main, args=(code, words, cwd, out, err, {**os.environ, **(environment or {})}))
        process.start()
        process.join(TIMEOUT_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        return CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def run_pair(code: str, *arguments: object, cwd: Path) -> list[CompletedProcess]:
    """`run_code` in two processes of one group, with the environment that torchrun gives them."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def run_rank(rank: str) -> CompletedProcess:
        return run_code(code, *arguments, cwd=cwd, environment={**group, "RANK": rank, "LOCAL_RANK": rank})

    with ThreadPoolExecutor() as threads:
        return list(threads.map(run_rank, "01"))


def free_port() -> int:
    """A port of this machine that no process uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _main(code: str, words: list[str], cwd: Path, out: Path, err: Path, environment: dict[str, str]) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["ghostify", *words]
    exec(code, {"__name__": "__main__"})
