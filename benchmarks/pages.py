"""Write docs/results.md from the committed result files.

python benchmarks/pages.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from compare import summary as compared
from initialisation import summary as started
from pareto import PICTURES
from tables import RESULTS, Row

PAGE = Path(__file__).parent.parent / "docs/results.md"
HEAD = """# Results

Written by `python benchmarks/pages.py` from the files in `benchmarks/results/`. Each table names the command that
measured it; data, seeds, images and training are told at the head of each script. Times are ratios of runs that took
turns, on one machine of two cores but for the GPU's. Of the comparisons' rows without milliseconds, most of
seeds 1 and 2 and some of MobileNetV2's seed 0 were distilled on a GPU; in the files -2 by torch 2.11.
"""


def table(rows: list[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    head = ["", *columns]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join([row["how"], *(cell(row) for cell in columns.values())]) + " |" for row in rows]
    return "\n".join(lines)


def number(key: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else f"{scale * row[key]:.{digits}f}"


def by_size(key: str, form: str) -> Callable[[Row], str]:
    """Cells of what differs by the size of the kernel."""
    return lambda row: " / ".join(form.format(row[key][d]) for d in ("1", "3", "5", "7"))


ACCURACY = {"top-1 %": number("top1", 2), "M MACs": number("macs", 1, 1e-6), "images": number("images", 0)}
LATENCY = {"MACs %": number("macs", 0, 100), "ms": number("ms", 1), "times as fast": number("times", 2)}
BUDGETS = {
    "budget": lambda r: "out of reach: left as it is" if r["budget"] is None else f"{r['budget']:g}",
    "MACs %": lambda r: f"{100 * r['macs'][1] / r['macs'][0]:.0f}",
    "ms": lambda r: f"{r['ms'][0]:.1f}",
    "after": lambda r: f"{r['ms'][1]:.1f}",
    "times as fast": lambda r: f"{r['ms'][0] / r['ms'][1]:.2f}",
}
SECTIONS: dict[str, tuple[str, dict[str, Callable[[Row], str]] | Callable[[list[Row]], str]]] = {
    "accuracy": ("Accuracy without training: ResNet-20 on Fashion-MNIST", ACCURACY),
    "accuracy-vgg16": ("Accuracy without training: VGG-16-BN on Fashion-MNIST", ACCURACY),
    "craft": (
        "CRAFT against itself",
        {"MACs %": number("share", 1, 100), "box F1 %": number("f1", 1), "error of the maps": number("error", 4)},
    ),
    "ocr": (
        "EasyOCR with CRAFT, end to end",
        {
            "MACs %": number("share", 0, 100),
            "detect ms": number("detect_ms", 0),
            "times as fast": number("detect_times", 2),
            "read ms": number("read_ms", 0),
            "times as fast ": number("read_times", 2),
            "box F1 %": number("box_f1", 1),
            "lines F1 %": number("line_f1", 1),
            "words read, F1 %": number("word_f1", 1),
        },
    ),
    "latency": ("Milliseconds: batch 1, 2 threads", LATENCY),
    "latency-planned": ("Milliseconds: planned for the runtime", LATENCY),
    "latency-one-thread": ("Milliseconds: batch 1, 1 thread", LATENCY),
    "latency-batch8": ("Milliseconds: batch 8, 2 threads", LATENCY),
    "latency-batch32": ("Milliseconds: batch 32, 2 threads", LATENCY),
    "gpu": ("Milliseconds on an H100: batch 32, CUDA graphs", {**LATENCY, "ms": number("ms", 2)}),
    "budgets-eager": ("Every torchvision classifier under a latency budget, eager PyTorch", BUDGETS),
    "roofline": (
        "The least milliseconds that this machine allows",
        {"together": number("total", 2), "times as fast at best": number("times", 2)},
    ),
    "memory": (
        "Memory of a training step",
        {"peak MB": lambda r: f"{r['bytes']['Total'] / 1e6:.0f}", "of the original %": number("share", 0, 100)},
    ),
    "initialisation": ("What a start is worth: top-1 % after fine-tuning", started),
    "compare-resnet20": ("Beside other methods: ResNet-20 on Fashion-MNIST, top-1 %", compared),
    "compare-resnet20-2": ("Beside other methods: another training of ResNet-20, by milliseconds", compared),
    "compare-resnet56-2": ("Beside other methods: ResNet-56 on Fashion-MNIST, top-1 %", compared),
    "compare-resnet56": ("Beside other methods: another training of ResNet-56, fewer draws", compared),
    "compare-vgg16": ("Beside other methods: VGG-16-BN on Fashion-MNIST, top-1 %", compared),
    "compare-vgg16-2": ("Beside other methods: another training of VGG-16-BN, by milliseconds", compared),
    "compare-mobilenet-2": ("Beside other methods: MobileNetV2 of half width on Fashion-MNIST, top-1 %", compared),
    "compare-mobilenet": ("Beside other methods: another training of MobileNetV2, fewer draws", compared),
    "compare-craft": ("Beside other methods: CRAFT, box F1 %", compared),
    "reconstruct": (
        "Gradient steps after the fit",
        {"top-1 %": number("top1", 2), "outputs' error": number("error", 4)},
    ),
    "effort": (
        "Effort of a fit: ResNet-50 at 224 x 224",
        {"seconds": number("fit", 0), "two forward passes, s": number("forward", 0, 2), "peak MB": number("peak", 0)},
    ),
    "ablation": (
        "What each step of the fit is worth",
        {"top-1 %": number("top1", 2), "logit error": number("error", 4)},
    ),
    "lite0": (
        "EfficientNet-Lite0 on photographs, without training",
        {"MACs %": number("share", 0, 100), "same answers %": number("agreement", 0), "images": number("images", 0)},
    ),
    "redundancy": (
        "How redundant feature maps are: each made of another by one d x d kernel, error relative to its variance",
        {
            "maps": number("maps", 0),
            "median of each one's best, d = 1 / 3 / 5 / 7": by_size("best relative, median", "{:.2f}"),
            "maps below 0.1": by_size("best relative below 0.1", "{:.0f}"),
            "half of them ghosts, median": number("ghosts relative, median", 2),
        },
    ),
    "paper": (
        "The paper's counts",
        {
            "M parameters": number("params", 2),
            "M MACs": number("macs", 0),
            "the paper's": lambda r: " / ".join("" if v is None else f"{v:g}" for v in r["paper"]),
            "convention": lambda r: r["convention"],
        },
    ),
}


def sections() -> Iterator[str]:
    for name, (title, columns) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if not file.exists():
            continue
        found = json.loads(file.read_text())
        rows = found["rows"]
        shown = table(rows, columns) if isinstance(columns, dict) else columns(rows)
        picture = PICTURES / f"{name}.svg"
        drawn = f"![{title}]({picture.relative_to(PAGE.parent)})\n" if picture.exists() else ""
        yield "\n".join(filter(None, [f"## {title}\n\n`{found['command']}`\n\n{shown}\n", drawn]))


def page() -> str:
    return "\n".join([HEAD, *sections()])


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
