"""Kills of processes that write: the old or the new result is there, whole, and nothing of the user's is lost.

    python -m tests.kill_writers --count 200 --seed 0 [--output FILE] [--commands save,convert,export,finetune]

Real processes save, convert, export and fine-tune a tiny network, with an old result in place and files of the user
beside it. Each is killed by SIGKILL or SIGTERM: at a random time of its run, or at a random one of its accesses to
files (audit events), which are dense where it writes. Then the old or the new result has to load bit-equal, the user's
files have to be byte-equal, a second run has to succeed, and no temporary file may be left. Exits with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ghostify import GhostifyError, export, ghostify, load, save
from ghostify.cli import commands
from ghostify.fitting import lockstep
from ghostify.fitting.activation_store import ActivationStore
from tests import nets

NET, SIZE = "tests.nets:Straight", "3,12,12"
MINE = ("notes.txt", "more/notes.txt")
OUTCOMES = ("old", "new", "lost")
KILLS = (signal.SIGKILL, signal.SIGTERM)
EXPORTED = "model.pt2"


@dataclass(frozen=True)
class Writer:
    """A command that writes into a folder `out` that an earlier run has filled.

    `prepare` makes the old result in an empty folder, `write` the new one, and `read` returns the result's values.
    """

    prepare: Callable[[Path], None]
    write: Callable[[Path, bool], None]
    read: Callable[[Path], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Kill:
    """A signal after a number of seconds, or at an access to a file, counted from 1."""

    number: signal.Signals
    seconds: float | None = None
    access: int | None = None


@dataclass(frozen=True)
class Trial:
    """What became of one kill."""

    command: str
    moment: str
    signal: str
    outcome: str
    problems: tuple[str, ...]


def model_of(seed: int) -> torch.fx.GraphModule:
    torch.manual_seed(seed)
    return ghostify(nets.settle(nets.Straight(), seed), example_inputs=nets.images(1))


def read_model(folder: Path) -> Mapping[str, Tensor]:
    return load(folder / "out").state_dict()


def read_export(folder: Path) -> Mapping[str, Tensor]:
    with torch.no_grad():
        return {"output": torch.export.load(folder / "out" / EXPORTED).module()(nets.images(2))}


def run_main(folder: Path, *words: str) -> None:
    os.chdir(folder)
    sys.argv = ["ghostify", *words]
    commands.main()


def overwriting(overwrite: bool) -> list[str]:
    return ["--overwrite"] if overwrite else []


def write_data(folder: Path) -> None:
    torch.manual_seed(0)
    model, images = nets.settle(nets.Straight()), nets.images(24)
    save_file(model.state_dict(), folder / "w.safetensors")
    save_file({"images": images, "labels": model(images).argmax(1)}, folder / "data.safetensors")


def prepare_convert(folder: Path) -> None:
    write_data(folder)
    save(model_of(1), folder / "out")


def convert(folder: Path, overwrite: bool) -> None:
    lockstep.ActivationStore = lambda _: ActivationStore(0)  # type: ignore[attr-defined]
    given = ("--input-size", SIZE, "--checkpoint", "w.safetensors", "--calibration", "data.safetensors")
    run_main(folder, "convert", NET, *given, "--output", "out", *overwriting(overwrite))


def prepare_export(folder: Path) -> None:
    save(model_of(1), folder / "out")
    export(model_of(1), folder / "out", format="pt2", example_inputs=nets.images(1))


def export_again(folder: Path, overwrite: bool) -> None:
    export(model_of(2), folder / "out", format="pt2", example_inputs=nets.images(1), overwrite=overwrite)


def prepare_finetune(folder: Path) -> None:
    write_data(folder)
    channels, height, width = map(int, SIZE.split(","))
    source = {"name": NET, "arguments": {}, "input_size": [channels, height, width]}
    save(model_of(0), folder / "converted", source=source)
    save(model_of(1), folder / "out", source=source)


def finetune(folder: Path, overwrite: bool) -> None:
    given = ("--data", "data.safetensors", "--original", "w.safetensors", "--batch", "8", "--epochs", "4")
    more = ("--allow", NET, "--set", "save_every=1", "--output", "out", *overwriting(overwrite))
    run_main(folder, "finetune", "converted", *given, *more)


WRITERS = {
    "save": Writer(
        lambda folder: save(model_of(1), folder / "out") and None,
        lambda folder, overwrite: save(model_of(2), folder / "out", overwrite=overwrite) and None,
        read_model,
    ),
    "convert": Writer(prepare_convert, convert, read_model),
    "export": Writer(prepare_export, export_again, read_export),
    "finetune": Writer(prepare_finetune, finetune, read_model),
}


class Children:
    """Processes forked from this one, which has imported everything; none of them outlives its call."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def run(self, work: Callable[[], None], temporary: Path, kill: Kill | None = None, place: str = "") -> int:
        """The exit code of a process that does the work, negative where a signal ended it."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks in a process with threads
            child = os.fork()
        if not child:
            self._work(work, temporary, kill, place)
        if kill is not None and kill.seconds is not None:
            time.sleep(kill.seconds)
            os.kill(child, kill.number)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _work(self, work: Callable[[], None], temporary: Path, kill: Kill | None, place: str) -> None:
        code = 1
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            temporary.mkdir(exist_ok=True)
            tempfile.tempdir = str(temporary)
            torch.set_num_threads(1)
            if place:
                sys.addaudithook(AccessCounter(place, kill, temporary.with_suffix(".count")))
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)


class AccessCounter:
    """An audit hook that counts the accesses to files below a place, and sends the signal at one of them.

    The count is kept in a file that is as long as the number of accesses.
    """

    def __init__(self, place: str, kill: Kill | None, count: Path) -> None:
        self.place, self.kill, self.accesses = place, kill, 0
        self.count = os.open(count, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, _event: str, arguments: tuple[object, ...]) -> None:
        if not any(isinstance(a, str | bytes | Path) and self.place in os.fsdecode(a) for a in arguments):
            return
        self.accesses += 1
        os.ftruncate(self.count, self.accesses)
        if self.kill is not None and self.kill.access == self.accesses:
            os.kill(os.getpid(), self.kill.number)


class Place:
    """The folders of one command: what it starts from, the values before and after, and the length of its run."""

    def __init__(self, command: str, root: Path) -> None:
        self.command, self.writer, self.root = command, WRITERS[command], root / command
        self.root.mkdir()
        self.start, self.trial, self.temporary = self.root / "start", self.root / "trial", self.root / "tmp"
        self.children = Children(self.root / "log")
        self.start.mkdir()
        self._must_succeed(lambda: self.writer.prepare(self.start))
        for name in MINE:
            (self.start / name).parent.mkdir(exist_ok=True)
            (self.start / name).write_text(f"mine: {name}")
        self.old = self.writer.read(self.start)
        self.reset(False)
        self._must_succeed(self.write(False))  # what only the first run of a process does is not timed
        self.reset(False)
        started = time.monotonic()
        self._must_succeed(self.write(False), str(self.trial))
        self.seconds = time.monotonic() - started
        self.accesses = self.temporary.with_suffix(".count").stat().st_size
        self.new = self.writer.read(self.trial)
        assert not is_equal(self.old, self.new)

    def _must_succeed(self, work: Callable[[], None], place: str = "") -> None:
        if self.children.run(work, self.temporary, place=place):
            raise GhostifyError(f"{self.command}: fails without a kill: {self.children.log.read_text()}")

    def reset(self, with_own_files_only: bool) -> None:
        """Begin again, with files of the user within `out` as well, or only beside it."""
        for folder in (self.trial, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.start, self.trial)
        if not with_own_files_only:
            for name in MINE:
                (self.trial / "out" / name).parent.mkdir(exist_ok=True)
                (self.trial / "out" / name).write_text(f"mine: out/{name}")

    def write(self, with_own_files_only: bool) -> Callable[[], None]:
        return lambda: self.writer.write(self.trial, not with_own_files_only)

    def try_kill(self, kill: Kill, with_own_files_only: bool) -> Trial:
        """One kill, and what is there afterwards."""
        self.reset(with_own_files_only)
        mine = {p: p.read_bytes() for p in self.trial.rglob("*") if p.name == "notes.txt"}
        self.children.run(self.write(with_own_files_only), self.temporary, kill, str(self.trial))
        outcome, problems = self._outcome(), []
        problems += [f"{p} was changed" for p, text in mine.items() if not p.is_file() or p.read_bytes() != text]
        problems += [f"{p} is left" for p in self.temporary.glob("ghostify-*")]
        code = self.children.run(self.write(with_own_files_only), self.temporary)
        if code:
            problems.append(f"the second run fails: {self.children.log.read_text().strip()[-300:]}")
        elif not is_equal(self.writer.read(self.trial), self.new):
            problems.append("the second run has another result")
        problems += [f"{p} is left" for p in self.trial.rglob(".*") if "ghostify" in p.name]
        problems += [f"{p} was changed by the second run" for p, text in mine.items() if p.read_bytes() != text]
        moment = "time" if kill.access is None else "access"
        return Trial(self.command, moment, kill.number.name, outcome, tuple(problems))

    def _outcome(self) -> str:
        try:
            values = self.writer.read(self.trial)
        except (GhostifyError, OSError, RuntimeError) as error:
            print(f"{self.command}: {error}", file=sys.stderr)
            return "lost"
        return "old" if is_equal(values, self.old) else "new" if is_equal(values, self.new) else "lost"


def is_equal(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    return values.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in values.items())


def random_kill(place: Place, draw: random.Random, accesses_only: bool = False) -> Kill:
    """A kill at a random moment of the run, by either signal."""
    number = draw.choice(KILLS)
    if accesses_only or draw.random() < 0.7:
        return Kill(number, access=draw.randint(1, place.accesses))
    return Kill(number, seconds=draw.uniform(0, place.seconds))


def run_trials(names: list[str], count: int, seed: int, root: Path, accesses_only: bool = False) -> list[Trial]:
    """Trials of these commands in turn, each with files of the user within the folder or only beside it."""
    draw, trials = random.Random(seed), []
    places = [Place(name, root) for name in names]
    for k in range(count):
        place = places[k % len(places)]
        trials.append(place.try_kill(random_kill(place, draw, accesses_only), bool(draw.randrange(2))))
        print(f"{k + 1}/{count} {trials[-1]}", file=sys.stderr)
    return trials


def table(trials: list[Trial]) -> str:
    """Counts of the outcomes by command, moment and signal."""
    counts = Counter((t.command, t.moment, t.signal, t.outcome) for t in trials)
    lines = [f"{'command':10} {'moment':8} {'signal':8} " + " ".join(f"{o:>5}" for o in OUTCOMES)]
    rows = sorted({count[:3] for count in counts})
    lines += ["{:10} {:8} {:8} ".format(*row) + " ".join(f"{counts[(*row, o)]:5}" for o in OUTCOMES) for row in rows]
    return "\n".join(lines)


def is_failure(trial: Trial) -> bool:
    return trial.outcome == "lost" or bool(trial.problems)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", default=",".join(WRITERS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        trials = run_trials(arguments.commands.split(","), arguments.count, arguments.seed, Path(root))
    print(table(trials))
    failures = [trial for trial in trials if is_failure(trial)]
    for trial in failures:
        print(trial)
    if arguments.output:
        arguments.output.write_text(json.dumps([vars(trial) for trial in trials], indent=1) + "\n")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
