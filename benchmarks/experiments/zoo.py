"""Conversion of every architecture of timm and torchvision with at least two dense convolutions.

    python benchmarks/experiments/zoo.py                 resume, and repeat failures
    python benchmarks/experiments/zoo.py --only resnet --fresh
    python benchmarks/experiments/zoo.py --sample        one architecture of each family
    python benchmarks/experiments/zoo.py --table         write docs/zoo.md from the result file, run nothing

Each architecture has random weights and the smallest input that it accepts. Recorded are: how it traces; its dense
convolutions, and which of them are rewritten at ratio 2 or skipped and why; whether each is in the plan exactly once;
whether an empty plan is bit-equal, shapes are kept, a saved and loaded model is bit-equal, and every parameter gets a
gradient; seconds. The first architecture of each family is fitted without images. In the others the first filters are
kept and the cheap kernels are random, since none of this depends on them. Each runs in its own process with a time
limit. Results go to benchmarks/results/zoo.json, one architecture in a line, so that a run can be resumed.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, fx, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.tables import RESULTS, ROOT, Row, options
from ghostify import Policy, Rule, fit, load, plan, rewrite, save, trace
from ghostify.fitting.initialization import untrained_weights
from ghostify.graph.inputs import tensor_leaves
from ghostify.io.checkpoint import versions
from ghostify.planning.cost import count_macs
from ghostify.skip_reasons import kind_of
from ghostify.summary import attach_report, build_report

FILE, COMMAND = RESULTS / "zoo.json", "python benchmarks/experiments/zoo.py"
SIZES = (64, 96, 128, 160, 224, 256, 288, 320, 384, 448, 512)
LARGE = 400  # from here on, one image
DENSE = 2
FEW = "too few dense convolutions"
DONE = ("good", FEW)
DEFAULTS: Row = {
    "unlisted": [],
    "empty_equal": True,
    "parts": 1,
    "class": "GraphModule",
    "shapes_equal": True,
    "macs_as_planned": True,
    "no_gradient": [],
    "reload_equal": True,
    "outcome": "good",
}


def names() -> list[str]:
    """Every architecture of both libraries."""
    return [f"timm:{n}" for n in timm.list_models()] + [f"torchvision:{n}" for n in torchvision.models.list_models()]


def build(name: str) -> nn.Module:
    kind, _, name = name.partition(":")
    torch.manual_seed(0)
    if kind == "timm":
        return timm.create_model(name).eval()
    parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
    none = {key: None for key in ("weights", "weights_backbone") if key in parameters}
    return torchvision.models.get_model(name, **none).eval()


def dense(model: nn.Module) -> list[str]:
    """Paths of the dense convolutions."""
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == 1]


def smallest_input(model: nn.Module, name: str) -> tuple[Tensor, ...]:
    """The arguments of one forward, of the smallest size that works."""
    cfg = getattr(model, "default_cfg", None) or {}
    given = cfg.get("input_size", (3, 224, 224))
    required = sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in _parameters(model)) or 1
    video = name.startswith("torchvision:") and any(isinstance(m, nn.Conv3d) for m in model.modules())
    for size in sorted({*SIZES, given[-1]}):
        if cfg.get("fixed_input_size") and size != given[-1]:
            continue
        x = torch.randn(2 if size < LARGE else 1, given[0], *((8,) if video else ()), size, size)
        x = (x,) * required
        try:
            with torch.no_grad():
                model(*x)
        except Exception:
            if size == max(*SIZES, given[-1]):
                raise
        else:
            return x
    raise AssertionError(name)


def _parameters(model: nn.Module) -> Iterable[inspect.Parameter]:
    return inspect.signature(model.forward).parameters.values()


def examine(name: str, fitted: bool) -> Row:
    """One row of the table."""
    started = time.perf_counter()
    with contextlib.suppress(Exception), torch.device("meta"):
        if (count := len(dense(build(name)))) < DENSE:
            return {"name": name, "dense": count, "outcome": FEW}
    model = build(name)
    expected = dense(model)
    row: Row = {"name": name, "dense": len(expected)}
    if len(expected) < DENSE:
        return {**row, "outcome": FEW}
    x = smallest_input(model, name)
    row["input"] = list(x[0].shape)
    program = trace(model, x)
    counts = Counter(c.name for c in program.convolutions)
    row["unlisted"] = [n for n in expected if counts[n] != 1]
    before = leaves(model, x)
    del model
    row["empty_equal"] = same(before, leaves(rewrite(program, plan(program, Policy((Rule(ratio=1),))), {}), x))
    ghost_plan = plan(program)
    weights = fit(program, ghost_plan).weights if fitted else untrained_weights(program, ghost_plan)
    converted = attach_report(rewrite(program, ghost_plan, weights), build_report(ghost_plan))
    skipped = Counter(kind_of(item.reason) for item in ghost_plan.skips)
    row |= {
        "rewritten": len(ghost_plan.rewrites),
        "skipped": dict(skipped),
        "parts": len(program.subgraphs),
    }
    row["class"] = "GraphModule" if isinstance(converted, fx.GraphModule) else type(converted).__name__
    is_graph = isinstance(program.module, fx.GraphModule)
    del program, weights
    row["shapes_equal"] = shapes(before, is_graph) == shapes(leaves(converted, x), is_graph)
    row["macs"] = [ghost_plan.macs_before, count_macs(converted, x)]
    row["macs_as_planned"] = row["macs"][1] == ghost_plan.macs_after
    row["no_gradient"] = without_gradient(converted, x)
    with tempfile.TemporaryDirectory() as folder:
        reloaded = load(save(converted, Path(folder) / "out"))
        row["reload_equal"] = same(leaves(converted, x), leaves(reloaded, x))
    good = row["empty_equal"] and row["shapes_equal"] and row["reload_equal"] and not row["unlisted"]
    return {**row, "outcome": "good" if good else "bad", "seconds": round(time.perf_counter() - started, 1)}


def shapes(outputs: list[Tensor], is_graph: bool) -> list[torch.Size]:
    """The shapes; without the number of boxes for a detector, which keeps its class."""
    return [v.shape if is_graph else v.shape[1:] for v in outputs]


def leaves(model: nn.Module, x: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return tensor_leaves(model.eval()(*x))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def target(side: int) -> dict[str, Tensor]:
    """One object in an image, as a detector's target."""
    box, place = torch.tensor([[side / 8, side / 8, side / 2, side / 2]]), torch.tensor([side / 4, side / 4, 1.0])
    shape = torch.zeros(1, side, side, dtype=torch.uint8)
    shape[:, side // 8 : side // 2, side // 8 : side // 2] = 1
    return {"boxes": box, "labels": torch.tensor([1]), "masks": shape, "keypoints": place.expand(1, 17, 3)}


def without_gradient(model: nn.Module, x: tuple[Tensor, ...]) -> list[str]:
    """Parameters of ghost modules without a gradient; of a detector's training losses, since it detaches boxes."""
    named = [(n, p) for n, p in model.named_parameters() if "primary_conv" in n or "cheap_op" in n]
    required = [(n, p) for n, p in named if p.requires_grad]
    model.requires_grad_(False)
    for _, parameter in required:
        parameter.requires_grad_()
    if "targets" in inspect.signature(model.forward).parameters:
        side = min(x[0].shape[-2:])
        outputs_or_losses: Any = model.train()(list(x[0]), [target(side) for _ in x[0]])
    else:
        outputs_or_losses = model.eval()(*x)
    outputs = [v for v in tensor_leaves(outputs_or_losses) if v.requires_grad]
    sum(v.double().sum() for v in outputs).backward()
    missing = [n for n, p in required if p.grad is None]
    model.zero_grad()
    return missing


def send_row(name: str, fitted: bool, out: Connection) -> None:
    """Send the row or the error; runs in its own process."""
    warnings.simplefilter("ignore")
    try:
        out.send(examine(name, fitted))
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        out.send({"name": name, "outcome": f"{type(error).__name__} at {where}: {str(error)[:300]}"})


def run_all(selected: list[str], first: set[str], processes: int, minutes: float, limit: float) -> Iterator[Row]:
    """The rows as they come, from forks of this process that end with their architecture."""
    context, started = get_context("fork"), time.perf_counter()
    waiting, running = list(reversed(selected)), {}
    while running or waiting:
        if time.perf_counter() - started > 60 * minutes:
            waiting.clear()
        while waiting and len(running) < processes:
            name, (receive, send) = waiting.pop(), context.Pipe(duplex=False)
            process = context.Process(target=send_row, args=(name, name in first, send))
            process.start()
            send.close()
            running[name] = process, receive, time.perf_counter()
        for name, (process, receive, since) in list(running.items()):
            late = time.perf_counter() - since > limit
            if not (receive.poll(0.2) or late):
                continue
            try:
                row = {"name": name, "outcome": f"took more than {limit:g} s"} if late else receive.recv()
            except EOFError:
                process.join()
                row = {"name": name, "outcome": f"crashed with exit code {process.exitcode}"}
            process.kill()
            process.join()
            del running[name]
            yield row


def sample(all_names: list[str]) -> list[str]:
    """The first of each family, by the module that defines it."""
    families: dict[str, str] = {}
    for name in all_names:
        kind, _, bare = name.partition(":")
        builder = timm.model_entrypoint(bare) if kind == "timm" else torchvision.models.get_model_builder(bare)
        families.setdefault(f"{kind}:{builder.__module__}", name)
    return list(families.values())


def load_rows() -> dict[str, Row]:
    """The rows of the result file by architecture; omitted values are those of `DEFAULTS`."""
    rows = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    return {r["name"]: {**DEFAULTS, **r} if "rewritten" in r else r for r in rows}


def save_rows(rows: Iterable[Row]) -> None:
    """Write the result file: one row in a line, without values that equal `DEFAULTS`."""
    lines = (json.dumps({k: v for k, v in r.items() if k not in DEFAULTS or v != DEFAULTS[k]}) for r in rows)
    head = json.dumps({"command": COMMAND, "versions": versions(), "defaults": DEFAULTS})
    FILE.write_text(head[:-1] + ',\n"rows": [\n' + ",\n".join(lines) + "\n]}\n")


COLUMNS: dict[str, Callable[[list[Row]], Any]] = {
    "architectures": len,
    "good": lambda rows: sum(r["outcome"] == "good" for r in rows),
    "whole in one graph": lambda rows: sum(r["parts"] == 1 and r["class"] == "GraphModule" for r in rows),
    "one graph around others": lambda rows: sum(r["parts"] > 1 and r["class"] == "GraphModule" for r in rows),
    "own class around graphs": lambda rows: sum(r["class"] != "GraphModule" for r in rows),
    "dense convolutions": lambda rows: sum(r["dense"] for r in rows),
    "not in the plan": lambda rows: sum(len(r["unlisted"]) for r in rows),
    "rewritten": lambda rows: sum(r["rewritten"] for r in rows),
    "empty plan bit-equal": lambda rows: sum(r["empty_equal"] for r in rows),
    "reload bit-equal": lambda rows: sum(r["reload_equal"] for r in rows),
    "shapes equal": lambda rows: sum(r["shapes_equal"] for r in rows),
    "MACs as planned": lambda rows: sum(r["macs_as_planned"] for r in rows),
    "ghost parameters without gradient": lambda rows: sum(len(r["no_gradient"]) for r in rows),
    "seconds, median": lambda rows: statistics.median(r["seconds"] for r in rows),
}


def write_table(rows: list[Row]) -> None:
    """docs/zoo.md: the totals of both libraries, and a row for every architecture."""
    required = [r for r in rows if r["outcome"] != FEW]
    measured = [r for r in required if "reload_equal" in r]
    by_library = {kind: [r for r in measured if r["name"].startswith(f"{kind}:")] for kind in ("timm", "torchvision")}
    lines = [
        "# Every architecture of timm and torchvision",
        "",
        EXPLAINED,
        "",
        "| | timm | torchvision |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {' | '.join(f'{of(r):,}' for r in by_library.values())} |" for name, of in COLUMNS.items()]
    lines += ["", "Convolutions that ratio 2 does not rewrite, by reason:", ""]
    reasons: Counter[str] = Counter()
    for row in measured:
        reasons.update(row["skipped"])
    lines += ["| reason | convolutions |", "|---|---|", *(f"| {k} | {v:,} |" for k, v in reasons.most_common())]
    lines += ["", "Not good:", ""] if len(measured) < len(required) else []
    lines += [f"- `{r['name']}`: {r['outcome']}" for r in required if r["outcome"] != "good"]
    lines += ["", "| architecture | input | dense | rewritten | class | seconds |", "|---|---|---|---|---|---|"]
    for r in measured:
        shape = " x ".join(map(str, r["input"]))
        cells = (f"`{r['name']}`", shape, r["dense"], r["rewritten"], r["class"], r["seconds"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (ROOT / "docs/zoo.md").write_text("\n".join(lines) + "\n")


EXPLAINED = """\
Written by `python benchmarks/experiments/zoo.py --table` from `benchmarks/results/zoo.json`. The command without
`--table` measures it: every architecture with at least two dense convolutions, with random weights and the smallest
input that it accepts. An architecture is good if each of its dense convolutions is in the plan exactly once, an empty
plan and a saved and loaded model are bit-equal, and shapes are kept. Where MACs are not as planned, a detector looks at
other boxes than before."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", default="", help="architectures with this in their names")
    parser.add_argument("--fresh", action="store_true", help="discard earlier results")
    parser.add_argument("--again", action="store_true", help="repeat good architectures, too")
    parser.add_argument("--sample", action="store_true", help="one architecture of each family")
    parser.add_argument("--table", action="store_true", help="write docs/zoo.md, and run nothing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--limit", type=float, default=600, help="seconds for one architecture")
    parser.add_argument("--minutes", type=float, default=1e9, help="start none after so many minutes")
    arguments = parser.parse_args()
    results = {} if arguments.fresh else load_rows()
    if arguments.table:
        write_table(list(results.values()))
        return
    selected = [n for n in names() if arguments.only in n]
    first = set(sample(names()))
    selected = [n for n in selected if n in first] if arguments.sample else selected
    waiting = [n for n in selected if arguments.again or results.get(n, {}).get("outcome") not in DONE]
    waiting.sort(key=results.__contains__)  # earlier failures come last
    RESULTS.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    for row in run_all(waiting, first, arguments.processes, arguments.minutes, arguments.limit):
        name = row["name"]
        results[name] = row
        print(
            f"{len(results)} {name}: {row['outcome']} {row.get('rewritten', '')} of {row.get('dense', '')}", flush=True
        )
        save_rows(results.values())
    print(Counter(row["outcome"].split(":")[0] for row in results.values()))


if __name__ == "__main__":
    main()
