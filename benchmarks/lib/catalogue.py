"""Title and columns of every result's table; docs/results.md consists of these tables."""

from __future__ import annotations

import statistics

from benchmarks.lib.bars import real
from benchmarks.lib.cells import Columns, Row, by_kernel_size, label, number, spread

LIMITS = (("macs", 0.5), ("macs", 0.25), ("latency", 0.6))  # of compare.py
EPOCHS, SCHEDULE = (0, 0.25, 0.6, 1, 4), 6  # of initialisation.py


def comparison(rows: list[Row]) -> str:
    """Means and standard deviations over the seeds of compare.py, by method and limit."""
    lines = ["| method | limit | MACs % | ms % | not trained | one epoch |", "|---|---|---|---|---|---|"]
    keys = dict.fromkeys((r["method"], tuple(r["limit"])) for r in rows if "method" in r)
    for method, limit in sorted(keys, key=lambda key: LIMITS.index(key[1])):
        matching = [r for r in rows if r.get("method") == method and tuple(r["limit"]) == limit]
        measured = ([r[key] for r in matching if r[key] is not None] for key in ("macs", "latency"))
        costs = (f"{100 * statistics.mean(values):.0f}" if values else "" for values in measured)
        scores = [spread(r[key] for r in matching) for key in ("score", "taught")]
        cells = [label(method), f"{limit[0]} {limit[1]:g}", *costs, *scores]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def initialisations(rows: list[Row]) -> str:
    """Means and standard deviations over the seeds of initialisation.py, by initialisation and length of training."""
    lengths = (*EPOCHS, SCHEDULE)
    heads = " | ".join(f"{e:g} epochs" for e in lengths)
    lines = [f"| initialisation | {heads} | learning rates |", "|---" * (len(lengths) + 2) + "|"]
    for start in dict.fromkeys(r["start"] for r in rows if "start" in r):
        matching = [r for r in rows if r.get("start") == start]
        cells = [spread(r["top1"] for r in matching if r["epochs"] == epochs) for epochs in lengths]
        rates = dict.fromkeys(r["rate"] for r in matching if r["epochs"])
        lines.append(f"| {start} | " + " | ".join([*cells, ", ".join(f"{rate:g}" for rate in rates)]) + " |")
    return "\n".join(lines)


ACCURACY = {
    "top-1 %": number("top1", 2),
    "M MACs": number("macs", 1, 1e-6),
    "images": number("images", 0),
}
LATENCY = {"MACs %": number("macs", 0, 100), "ms": number("ms", 1), "speedup": number("times", 2)}
BUDGETS = {
    "budget": lambda r: "infeasible: unchanged" if r["budget"] is None else f"{r['budget']:g}",
    "MACs %": lambda r: f"{100 * r['macs'][1] / r['macs'][0]:.0f}",
    "ms": lambda r: f"{r['ms'][0]:.1f}",
    "after": lambda r: f"{r['ms'][1]:.1f}",
    "speedup": lambda r: f"{r['ms'][0] / r['ms'][1]:.2f}",
}
CATALOGUE: dict[str, tuple[str, Columns]] = {
    "accuracy": ("Accuracy without training: ResNet-20 on Fashion-MNIST", ACCURACY),
    "accuracy-vgg16": ("Accuracy without training: VGG-16-BN on Fashion-MNIST", ACCURACY),
    "craft": (
        "CRAFT, compared with its own boxes",
        {
            "MACs %": number("share", 1, 100),
            "box F1 %": number("f1", 1),
            "error of the score maps": number("error", 4),
        },
    ),
    "ocr": (
        "EasyOCR with CRAFT, end to end",
        {
            "MACs %": number("share", 0, 100),
            "detect ms": number("detect_ms", 0),
            "speedup": number("detect_times", 2),
            "read ms": number("read_ms", 0),
            "speedup ": number("read_times", 2),
            "box F1 %": number("box_f1", 1),
            "lines F1 %": number("line_f1", 1),
            "words read, F1 %": number("word_f1", 1),
        },
    ),
    "latency": ("Latency: batch 1, 2 threads", LATENCY),
    "latency-planned": ("Latency: planned for the runtime", LATENCY),
    "latency-one-thread": ("Latency: batch 1, 1 thread", LATENCY),
    "latency-batch8": ("Latency: batch 8, 2 threads", LATENCY),
    "latency-batch32": ("Latency: batch 32, 2 threads", LATENCY),
    "gpu": ("Latency on an H100: batch 32, CUDA graphs", {**LATENCY, "ms": number("ms", 2)}),
    "budgets-eager": ("Every torchvision classifier under a latency budget, eager PyTorch", BUDGETS),
    "roofline": (
        "Lower bound of the latency on this machine",
        {"ms": number("total", 2), "largest possible speedup": number("times", 2)},
    ),
    "memory": (
        "Memory of a training step",
        {
            "peak MB": lambda r: f"{r['bytes']['Total'] / 1e6:.0f}",
            "activations MB": lambda r: f"{r['bytes'].get('Activation', 0) / 1e6:.0f}",
            "of the original %": number("share", 0, 100),
        },
    ),
    "initialisation": ("Effect of the initialisation: top-1 % after fine-tuning", initialisations),
    "compare-resnet20": ("Comparison: ResNet-20 on Fashion-MNIST, top-1 %", comparison),
    "compare-resnet20-2": ("Comparison: another training of ResNet-20, by milliseconds", comparison),
    "compare-resnet56-2": ("Comparison: ResNet-56 on Fashion-MNIST, top-1 %", comparison),
    "compare-resnet56": ("Comparison: another training of ResNet-56, fewer seeds", comparison),
    "compare-vgg16": ("Comparison: VGG-16-BN on Fashion-MNIST, top-1 %", comparison),
    "compare-vgg16-2": ("Comparison: another training of VGG-16-BN, by milliseconds", comparison),
    "compare-mobilenet-2": ("Comparison: MobileNetV2 of half width on Fashion-MNIST, top-1 %", comparison),
    "compare-mobilenet": ("Comparison: another training of MobileNetV2, fewer seeds", comparison),
    "compare-craft": ("Comparison: CRAFT, box F1 %", comparison),
    "reconstruct": (
        "Gradient steps after the fit",
        {
            "top-1 %": number("top1", 2),
            "same top-1 as the original %": number("agreement", 2),
            "error of the outputs": number("error", 4),
        },
    ),
    "effort": (
        "Time and memory of a fit: ResNet-50 at 224 x 224",
        {"seconds": number("fit", 0), "two forward passes, s": number("forward", 0, 2), "peak MB": number("peak", 0)},
    ),
    "ablation": (
        "Ablation of the steps of the fit",
        {
            "error of the layers": number("layer", 4),
            "error of the logits": number("error", 4),
            "top-1 %": number("top1", 2),
        },
    ),
    "lite0": (
        "EfficientNet-Lite0 on photographs, without training",
        {
            "MACs %": number("share", 0, 100),
            "same top-1 as the original %": number("agreement", 0),
            "images": number("images", 0),
        },
    ),
    "real": ("Real networks: how far they keep their answers", real),
    "redundancy": (
        "How redundant feature maps are: each predicted from another by one d x d kernel, relative error",
        {
            "maps": number("maps", 0),
            "median over maps of the best, d = 1 / 3 / 5 / 7": by_kernel_size("best_error_median", "{:.2f}"),
            "maps below 0.1": by_kernel_size("maps_with_small_error", "{:.0f}"),
            "half of them ghosts, median": number("ghost_error_median", 2),
        },
    ),
    "paper": (
        "Parameters and MACs as the paper counts them",
        {
            "M parameters": number("params", 2),
            "M MACs": number("macs", 0),
            "the paper's": lambda r: " / ".join("" if v is None else f"{v:g}" for v in r["paper"]),
            "convention": lambda r: r["convention"],
        },
    ),
}
