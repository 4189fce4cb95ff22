"""EasyOCR end to end with CRAFT as EasyOCR ships it, at half the multiply-accumulates, and planned for the runtime.

    python benchmarks/experiments/ocr.py

Pages of 640 x 640 (documents.py) go through Reader.detect - resizing, network, boxes - and through Reader.readtext,
which also recognises the text of every box. The recogniser is always the original. The detectors of one runtime are
interleaved page by page, all in inference form (`deploy`): eager PyTorch, ONNX Runtime, OpenVINO. The first row is
EasyOCR as it is shipped. Compared with the original detector's are the boxes of words that CRAFT finds (IoU 0.5), the
lines that EasyOCR groups them to (a gap one pixel wider splits a line), and the words that it then reads. The fit is
that of craft.py: 128 unlabelled pages with typefaces and photographs that no test page has. Results go to
benchmarks/results/ocr.json.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import easyocr
import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.craft import HALF, WEIGHTS, craft, has_few_outputs, matches
from benchmarks.lib.documents import calibration_pages, test_images
from benchmarks.lib.tables import Row, options, publish
from ghostify import ghostify
from ghostify.deployment.exporter import write_unchecked
from ghostify.deployment.inference_form import deploy
from ghostify.planning.cost import count_macs
from ghostify.runtimes.registry import RUNTIMES, load_runner
from ghostify.runtimes.tensors import ExportInputs, to_channels_last

PAGES, SIZE, SEED, TURNS = 12, 640, 0, 3
PLANNED = {"macs": 0.5, "latency": 0.55}
THRESHOLDS = {"text_threshold": 0.7, "link_threshold": 0.4, "low_text": 0.4}  # EasyOCR's own
FITTED = {"images": 128, "size": 256}


class Detector(nn.Module):
    """A detector as EasyOCR calls it: score maps, and None in place of the features."""

    def __init__(self, forward: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.maps = forward

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.maps(x), None


def load_detector(deployed: nn.Module, runtime: str, x: Tensor, folder: Path) -> Detector:
    if RUNTIMES[runtime].is_in_process:
        return Detector(lambda image: deployed(to_channels_last(image))[0])
    folder.mkdir()
    file = write_unchecked(deployed, ExportInputs((x,), {}), folder, RUNTIMES[runtime])
    run = load_runner(file, torch.get_num_threads(), runtime=runtime, exclusive=False)
    return Detector(lambda image: run(image)[0])


def words(reader: Any, page: np.ndarray) -> list[np.ndarray]:
    """CRAFT's boxes of a page, before EasyOCR groups them."""
    options = {"canvas_size": SIZE, "mag_ratio": 1.0, "poly": False, "device": "cpu", **THRESHOLDS}
    (boxes,) = reader.get_textbox(reader.detector, page, **options)
    return [np.array(box, dtype=np.float32).reshape(4, 2) for box in boxes]


def corners(detected: Any) -> list[np.ndarray]:
    """EasyOCR's boxes of a page, upright (left, right, top, bottom) and free ones, as polygons."""
    upright, free = detected[0][0], detected[1][0]
    flat = [[[a, c], [b, c], [b, d], [a, d]] for a, b, c, d in upright]
    return [np.array(box, dtype=np.float32) for box in [*flat, *free]]


def measure_detectors(reader: Any, detectors: dict[str, nn.Module], pages: list[np.ndarray]) -> dict[str, Row]:
    """Milliseconds, boxes and texts of each detector, interleaved page by page."""
    kinds = ("detect", "read", "boxes", "lines", "texts")
    results: dict[str, Row] = {name: {kind: [] for kind in kinds} for name in detectors}
    for turn in range(TURNS + 1):
        for page in pages:
            for name, detector in detectors.items():
                reader.detector, result = detector, results[name]
                started = time.perf_counter()
                boxes = reader.detect(page, canvas_size=SIZE)
                middle = time.perf_counter()
                texts = reader.recognize(page, boxes[0][0], boxes[1][0]) if turn <= 1 else None
                ended = time.perf_counter()
                if not turn:
                    result["boxes"].append(words(reader, page))
                    result["lines"].append(corners(boxes))
                    result["texts"].append([word for _, text, _ in texts or [] for word in text.split()])
                    continue
                result["detect"].append(1000 * (middle - started))
                if texts is not None:
                    result["read"].append(1000 * (ended - started))
    return results


def f1(found: list[Any], expected: list[Any], common: Callable[[Any, Any], int]) -> float:
    hits = sum(common(a, b) for a, b in zip(found, expected, strict=True))
    return 200 * hits / max(1, sum(map(len, found)) + sum(map(len, expected)))


def rows() -> Iterator[Row]:
    pages = test_images(PAGES, SIZE, SEED)
    batches = calibration_pages(FITTED["images"], FITTED["size"], SEED).split(8)
    model, x = craft(), torch.rand(1, 3, SIZE, SIZE)
    settings = {"cheap": "auto", "ignore": has_few_outputs, "calibration": batches, "seed": SEED}
    half = ghostify(model, budget=HALF, example_inputs=x, **settings)
    folder = str(WEIGHTS.parent)
    reader = easyocr.Reader(["en"], gpu=False, model_storage_directory=folder, download_enabled=False, verbose=False)
    reference = measure_detectors(reader, {"as it comes": reader.detector}, pages)["as it comes"]
    yield _row("eager, as it comes", 1.0, reference, reference, reference)
    for runtime in (name for name, r in RUNTIMES.items() if not r.compiles_slowly):
        models = {"original": model, "half the MACs": half}
        if not RUNTIMES[runtime].is_in_process:
            planned = ghostify(model, budget=PLANNED, runtime=runtime, example_inputs=x, **settings)
            models["half the MACs, 0.55 of the time"] = planned
        with tempfile.TemporaryDirectory() as temporary_folder:
            detectors = {
                name: load_detector(deploy(m, x), runtime, x, Path(temporary_folder) / str(k))
                for k, (name, m) in enumerate(models.items())
            }
            results = measure_detectors(reader, detectors, pages)
        for name, result in results.items():
            share = count_macs(models[name], x) / count_macs(model, x)
            yield _row(f"{runtime}, {name}", share, result, results["original"], reference)


def _row(how: str, share: float, result: Row, original: Row, reference: Row) -> Row:
    medians = {key: statistics.median(result[key]) for key in ("detect", "read")}
    times = {f"{key}_times": statistics.median(original[key]) / medians[key] for key in medians}
    return {
        "how": how,
        "share": share,
        **{f"{key}_ms": ms for key, ms in medians.items()},
        **times,
        "box_f1": f1(result["boxes"], reference["boxes"], matches),
        "line_f1": f1(result["lines"], reference["lines"], matches),
        "word_f1": f1(result["texts"], reference["texts"], lambda a, b: (Counter(a) & Counter(b)).total()),
    }


def main() -> None:
    options(__doc__).parse_args()
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    publish("ocr", rows(), threads=threads, pages=PAGES, size=SIZE, seed=SEED, calibration=FITTED)


if __name__ == "__main__":
    main()
