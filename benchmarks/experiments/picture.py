"""Two pictures of the docs: the report of CRAFT at half its multiply-accumulates, opened in a headless browser.

    python benchmarks/experiments/picture.py

The conversion is that of craft.py (auto, half the MACs, 128 calibration pages of 256 x 256, seed 0); the maps are
those of its first test page. Writes docs/images/report.png (the top of the page) and docs/images/ghosts.png (the maps
of one layer). Needs Chromium: apt-get install chromium.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.lib.craft import HALF, craft, has_few_outputs
from benchmarks.lib.documents import calibration_pages, test_pages
from benchmarks.lib.tables import FIGURES, options
from ghostify import ghostify, write_report

LAYER = "basenet.slice1.7"
WIDTH, HEIGHT = 1200, 800


def write(file: Path) -> Path:
    """The report of the conversion."""
    model, batches = craft(), calibration_pages(128, 256, 0).split(8)
    example = batches[0][:1]
    converted = ghostify(
        model, cheap="auto", budget=HALF, ignore=has_few_outputs, example_inputs=example, calibration=batches
    )
    return write_report(
        converted, file, original=model, images=[test_pages(1, 512, 0)], layers=[LAYER], title="CRAFT at half the MACs"
    )


def screenshot(page: Page, file: Path) -> None:
    """Take both pictures of a report."""
    page.goto(file.as_uri())
    page.wait_for_selector("#chart-layers svg")
    page.screenshot(path=FIGURES / "report.png")
    page.locator("ul.maps").first.screenshot(path=FIGURES / "ghosts.png")


def main() -> None:
    options(__doc__).parse_args()
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("Chromium is not installed. Run apt-get install chromium.")
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        file = write(Path(folder) / "report.html")
        chromium = started.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        screenshot(chromium.new_page(viewport={"width": WIDTH, "height": HEIGHT}), file)
        chromium.close()


if __name__ == "__main__":
    main()
