"""The report page in a browser."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from ghostify import GhostifyError, Policy, Rule, frontier, ghostify, report, trace, write_report
from ghostify.summary import attach_report
from tests import nets

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TITLE = "<Net> & co"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    model, x = nets.settle(nets.Straight(16)), nets.images(16)
    converted = ghostify(model, 2, example_inputs=x[:1], calibration=x.split(8))
    curve = [p.to_dict() for p in frontier(trace(model, x[:1]), Policy((Rule(cheap="auto"),)), points=3)]
    file = tmp_path_factory.mktemp("page") / "deep" / "r.html"
    labels = model(x).argmax(1)
    return write_report(
        converted,
        file,
        original=model,
        example_inputs=x[:1],
        images=x.split(8),
        labels=labels,
        curve=curve,
        title=TITLE,
    )


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(params=[400, 1600])
def opened(request, browser, page_file):
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    messages, urls = [], []
    page.on("console", lambda message: messages.append(message.text))
    page.on("pageerror", lambda error: messages.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("#chart-frontier svg")
    yield page
    assert messages == []
    assert [url for url in urls if not url.startswith("data:")] == [page_file.as_uri()]
    page.close()


def test_the_page_is_complete_and_fits_the_window(opened):
    assert opened.title() == f"{TITLE} - ghostify"
    assert opened.locator("svg").count() == 3
    assert opened.locator("#table tbody tr").count() == 3
    assert opened.locator(".maps img").count() > 8
    assert opened.locator("text=top-1 on 16 images").count() == 1
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert opened.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
    sizes = opened.evaluate(
        "[...document.querySelectorAll('.chart')].map(c => [c.clientWidth, c.querySelector('svg').clientWidth])"
    )
    assert all(svg <= container for container, svg in sizes)


def test_the_page_is_accessible(opened):
    assert Axe().run(opened).response["violations"] == []


def heading(page, text):
    return page.locator("#table thead button").filter(has_text=re.compile(f"^{text}$"))


def test_columns_sort_by_mouse_and_keyboard(opened):
    names = lambda: opened.locator("#table tbody tr th").all_inner_texts()  # noqa: E731
    original_order = names()
    assert original_order == ["stem.0", "a.0", "b.0"]
    heading(opened, "layer").click()
    assert names() == ["a.0", "b.0", "stem.0"]
    macs = heading(opened, "MACs before")
    macs.focus()
    opened.keyboard.press("Enter")
    cells = opened.locator("#table tbody tr td:nth-child(9)")
    counts = [float(cell.get_attribute("data-value")) for cell in cells.all()]
    assert counts == sorted(counts, reverse=True)
    assert opened.locator("#table th[aria-sort=descending]").inner_text().startswith("MACs before")
    opened.keyboard.press("Space")
    assert [float(cell.get_attribute("data-value")) for cell in cells.all()] == sorted(counts)
    heading(opened, "#").click()
    assert names() == original_order


def test_a_page_needs_nothing_but_the_report(tmp_path):
    converted = ghostify(nets.settle(nets.Straight()), 2)
    text = write_report(converted, tmp_path / "r.html").read_text()
    assert "By each layer's own relative error" in text
    assert "--calibration DIR" in text
    assert "latency in ms" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_a_model_with_several_outputs_is_shown_without_comparison(tmp_path):
    class Two(nets.Straight):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits.sum()

    model, x = nets.settle(Two()), nets.images(4)
    converted = ghostify(model, 2, example_inputs=x[:1], calibration=[x])
    text = write_report(converted, tmp_path / "r.html", original=model, images=[x], runtime=None).read_text()
    assert "agreement" not in text
    assert "ghost map, channel" in text


def test_notes_and_lost_attributes_are_on_the_page(tmp_path):
    converted = ghostify(nets.settle(nets.Straight()), 2)
    notes = ("no channel group can be pruned; channels of a.0: <reason>",)
    attach_report(converted, replace(report(converted), notes=notes, missing_attributes=("forward_features",)))
    text = write_report(converted, tmp_path / "r.html").read_text()
    assert "<li>no channel group can be pruned; channels of a.0: &lt;reason&gt;</li>" in text
    assert "this model lacks: forward_features" in text


def test_the_outcome_of_each_block_is_summed_up(tmp_path):
    model, x = nets.settle(nets.Straight()), nets.images(16)
    converted = ghostify(model, 2, example_inputs=x[:1], calibration=x.split(8), reconstruct=True)
    blocks = report(converted).reconstruction.blocks
    text = write_report(converted, tmp_path / "r.html").read_text()
    assert f"{sum(b.steps > 0 for b in blocks)} of {len(blocks)} blocks were reconstructed" in text


def test_layers_that_cannot_be_shown_are_named(tmp_path):
    model, x = nets.settle(nets.Straight()), nets.images(4)
    converted = ghostify(model, 2, example_inputs=x[:1])
    file = tmp_path / "r.html"
    with pytest.raises(GhostifyError, match="Pass original and images"):
        write_report(converted, file, layers=["a.0"])
    with pytest.raises(GhostifyError, match=r"nothing: is not a convolution of the report. Choose from stem\.0"):
        write_report(converted, file, original=model, images=[x], layers=["nothing"], runtime=None)
    with pytest.raises(GhostifyError, match="has no report"):
        write_report(torch.nn.Conv2d(1, 1, 1), file)
    assert not file.exists()


def tall(width):
    return nets.settle(nets.Straight(width))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"original": tall(4)}, r"original: the weight of stem\.0 is 4x3x3x3, in the report 8x3x3x3"),
        ({"original": nets.settle(nets.Residual())}, r"original: has no layer a\.0"),
        ({"labels": torch.zeros(3).long()}, "labels: are 3 for 4 images"),
        ({"labels": torch.full((4,), 99)}, "labels: class 99 is not one of the model's 5 classes"),
        ({"labels": torch.zeros(4).long(), "images": []}, "labels: are compared with what both models predict"),
        ({"images": [nets.images(4)[:, :1]]}, "images: Straight does not run on batch 0"),
        ({"curve": [{"error": 0.1}]}, r"curve\[0\]: has no shares of costs"),
        ({"curve": [{"shares": {"macs": "a"}, "error": 0.1}]}, r"curve\[0\] macs 'a': is not a number"),
        ({"example_inputs": "a"}, "example_inputs: the model does not run on them"),
    ],
)
def test_what_a_report_cannot_compare_is_refused_and_no_page_written(changes, message, tmp_path):
    model = tall(8)
    given = {"original": model, "images": [nets.images(4)], "runtime": None, **changes}
    with pytest.raises(GhostifyError, match=message):
        write_report(ghostify(model), tmp_path / "r.html", **given)
    assert not list(tmp_path.iterdir())
