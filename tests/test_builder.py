"""The report's page, looked at in a real browser."""

import re
import shutil

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from ghostify import GhostifyError, Policy, Rule, frontier, ghostify, trace, write_report
from tests import nets

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
TITLE = "<Net> & co"
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    model, x = nets.settle(nets.Straight(16)), nets.images(16)
    made = ghostify(model, 2, example_inputs=x[:1], calibration=x.split(8))
    curve = [p.to_dict() for p in frontier(trace(model, x[:1]), Policy((Rule(cheap="auto"),)), points=3)]
    file = tmp_path_factory.mktemp("page") / "deep" / "r.html"
    labels = model(x).argmax(1)
    return write_report(
        made,
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
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


@pytest.fixture(params=[400, 1600])
def opened(request, browser, page_file):
    page = browser.new_page(viewport={"width": request.param, "height": 900})
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda wish: asked.append(wish.url))
    page.goto(page_file.as_uri())
    page.wait_for_selector("#chart-frontier svg")
    yield page
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page_file.as_uri()]
    page.close()


def test_everything_is_there_and_fits(opened):
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
    assert all(own <= given for given, own in sizes)


def test_no_rule_of_accessibility_is_broken(opened):
    assert Axe().run(opened).response["violations"] == []


def heading(page, text):
    return page.locator("#table thead button").filter(has_text=re.compile(f"^{text}$"))


def test_columns_sort_by_mouse_and_keyboard(opened):
    names = lambda: opened.locator("#table tbody tr th").all_inner_texts()  # noqa: E731
    given = names()
    assert given == ["stem.0", "a.0", "b.0"]
    heading(opened, "layer").click()
    assert names() == ["a.0", "b.0", "stem.0"]
    macs = heading(opened, "MACs before")
    macs.focus()
    opened.keyboard.press("Enter")
    cells = opened.locator("#table tbody tr td:nth-child(9)")
    found = [float(cell.get_attribute("data-value")) for cell in cells.all()]
    assert found == sorted(found, reverse=True)
    assert opened.locator("#table th[aria-sort=descending]").inner_text().startswith("MACs before")
    opened.keyboard.press("Space")
    assert [float(cell.get_attribute("data-value")) for cell in cells.all()] == sorted(found)
    heading(opened, "#").click()
    assert names() == given


def test_a_page_needs_nothing_but_the_report(tmp_path):
    made = ghostify(nets.settle(nets.Straight()), 2)
    text = write_report(made, tmp_path / "r.html").read_text()
    assert "how much the outputs feel of" in text
    assert "--calibration DIR" in text
    assert "ms, deployed" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_a_model_of_several_outputs_is_shown_without_a_verdict(tmp_path):
    class Two(nets.Straight):
        def forward(self, x):
            made = super().forward(x)
            return made, made.sum()

    model, x = nets.settle(Two()), nets.images(4)
    made = ghostify(model, 2, example_inputs=x[:1], calibration=[x])
    text = write_report(made, tmp_path / "r.html", original=model, images=[x], runtime=None).read_text()
    assert "same answers" not in text
    assert "ghost map, channel" in text


def test_what_cannot_be_shown_is_named(tmp_path):
    model, x = nets.settle(nets.Straight()), nets.images(4)
    made = ghostify(model, 2, example_inputs=x[:1])
    file = tmp_path / "r.html"
    with pytest.raises(GhostifyError, match="layers are shown on images"):
        write_report(made, file, layers=["a.0"])
    with pytest.raises(GhostifyError, match=r"nothing: is no convolution of the report: it has stem\.0"):
        write_report(made, file, original=model, images=[x], layers=["nothing"], runtime=None)
    with pytest.raises(GhostifyError, match="carries no report"):
        write_report(torch.nn.Conv2d(1, 1, 1), file)
    assert not file.exists()
