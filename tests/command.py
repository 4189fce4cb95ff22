"""The `ghostify` command in a new process, forked from a server process that has imported the program."""

from __future__ import annotations

import os
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from subprocess import CompletedProcess

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["ghostify.cli.commands"])
TIMEOUT_S = 300


def run_command(*arguments: object, cwd: Path) -> CompletedProcess[str]:
    """The output and exit code of `ghostify ARGUMENTS` in a folder; seconds faster than a new interpreter."""
    texts = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = FORKS.Process(target=_main, args=(texts, cwd, out, err, dict(os.environ)))
        process.start()
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
        return CompletedProcess(texts, process.exitcode, out.read_text(), err.read_text())


def _main(texts: list[str], cwd: Path, out: Path, err: Path, environment: dict[str, str]) -> None:
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    from ghostify.cli.commands import main

    sys.argv = ["ghostify", *texts]
    main()
