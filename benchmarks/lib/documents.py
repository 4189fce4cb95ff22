"""Pages with text, drawn by seed: photographs with signs and captions, letters, tables, receipts and posters.

Calibration and test pages share no typefaces and no photographs. Text keeps its height in pixels whatever the size of
a page, so that small calibration pages represent large test pages.

    python -m benchmarks.lib.documents FOLDER     writes a few pages of each kind there
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from easyocr.imgproc import normalizeMeanVariance
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from benchmarks.lib.photographs import CALIBRATION, SCANS, TEST, photographs, random_crop

FONTS = Path(os.environ.get("GHOSTIFY_FONTS", "/usr/share/fonts"))
CALIBRATION_FONTS = {
    "fonts-dejavu-core": ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "DejaVuSerif-Bold"),
    "fonts-freefont-ttf": ("FreeMonoBold", "FreeSans", "FreeSansBoldOblique", "FreeSerif", "FreeSerifItalic"),
    "fonts-lato": ("Lato-Black", "Lato-Italic", "Lato-Light", "Lato-Regular"),
    "fonts-liberation": ("LiberationMono-Regular", "LiberationSans-Bold", "LiberationSans-Regular")
    + ("LiberationSansNarrow-Regular", "LiberationSerif-Bold", "LiberationSerif-Regular"),
}
TEST_FONTS = {
    "fonts-comic-neue": ("ComicNeue-Bold", "ComicNeue-Regular"),
    "fonts-inconsolata": ("Inconsolata",),
    "fonts-linuxlibertine": ("LinBiolinum_R", "LinLibertine_R", "LinLibertine_RB", "LinLibertine_RI"),
    "fonts-open-sans": ("OpenSans-Bold", "OpenSans-CondBold", "OpenSans-Italic", "OpenSans-Regular"),
    "fonts-roboto-unhinted": ("Roboto-Black", "Roboto-Light", "Roboto-Regular", "RobotoCondensed-Regular"),
}
TEXT = """
the of and to in is that it was for on are with as his they at be this from have or by one had not but what all were
when we there can an your which their said if do will each about how up out them then she many some so these would
other into has more her two like him see time could no make than first been its who now people my made over did down
only way find use may water long little very after words called just where most know Open Closed Entrance Exit Parking
Office Station Market Street Avenue Hotel Coffee Bakery Bread Butter Milk Cheese Apple Orange Total Subtotal Cash
Change Invoice Receipt Number Date Amount Price Quantity Description Customer Address Telephone Thank You Welcome Sale
Today Monday Tuesday Friday Sunday January March August October Library Museum Garden River Bridge Mountain Island
Harbour Government Department University Research Journal Volume Chapter Introduction Results Discussion Conclusion
Appendix Figure Table Section Page Notice Warning Danger Private Property Keep Left Right North South East West
Platform Ticket Information Reception Emergency Hospital School Theatre Cinema Restaurant Kitchen Menu Soup Salad
Chicken Rice Pepper experience structure language measurement temperature agreement considerable responsible
international environment quality network convolution calibration channel ghost module jumping quick brown fox lazy
dog zebra quartz sphinx
"""
WORDS = TEXT.split()
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Supply:
    """Typefaces and photographs for pages."""

    fonts: tuple[Path, ...]
    pictures: tuple[Image.Image, ...]


def calibration_pages(count: int, size: int, seed: int) -> Tensor:
    """Pages (count x 3 x size x size) as EasyOCR normalises them; `seed` draws the pages, from a separate stream."""
    return _tensor(_pages(_calibration_supply(), count, size, (0, seed)))


def test_pages(count: int, size: int, seed: int) -> Tensor:
    """Pages with typefaces and photographs that are on no calibration page."""
    return _tensor(_pages(_test_supply(), count, size, (1, seed)))


def test_images(count: int, size: int, seed: int) -> list[np.ndarray]:
    """The same pages as images (size x size x 3, 0 to 255)."""
    return [np.array(page) for page in _pages(_test_supply(), count, size, (1, seed))]


@cache
def _calibration_supply() -> Supply:
    return Supply(_fonts(CALIBRATION_FONTS), tuple(photographs(CALIBRATION)))


@cache
def _test_supply() -> Supply:
    return Supply(_fonts(TEST_FONTS), tuple(photographs(TEST + SCANS)))


def _fonts(packages: dict[str, tuple[str, ...]]) -> tuple[Path, ...]:
    installed = {f.stem: f for f in sorted(FONTS.rglob("*.[ot]tf"))}
    missing = [package for package, names in packages.items() if not installed.keys() >= set(names)]
    if missing:
        sys.exit(f"Typefaces are not on this machine: apt-get install {' '.join(missing)}")
    return tuple(installed[name] for names in packages.values() for name in names)


def _pages(supply: Supply, count: int, size: int, stream: tuple[int, int]) -> list[Image.Image]:
    return [
        _photographed(KINDS[k % len(KINDS)](supply, size, draw), draw)
        for k, draw in enumerate(np.random.default_rng((*stream, k)) for k in range(count))
    ]


def _tensor(pages: list[Image.Image]) -> Tensor:
    return (
        torch.from_numpy(np.stack([normalizeMeanVariance(np.array(p)) for p in pages])).permute(0, 3, 1, 2).contiguous()
    )


def _photograph(supply: Supply, size: int, draw: np.random.Generator) -> Image.Image:
    """A photograph with words on it, slanted or not, with or without a plate."""
    page = random_crop(_one_of(supply.pictures, draw), size, draw)
    for _ in range(int(draw.integers(4, 10))):
        font = _font(supply, draw, 12, size / 8)
        ink, plate = _inks(draw)
        label = Image.new("RGBA", _extent(text := _phrase(draw, 1, 4), font), (*plate, 255 * (draw.random() < 0.4)))
        ImageDraw.Draw(label).text((4, 4), text, font=font, fill=(*ink, 255))
        label = label.rotate(draw.normal(0, 8), Image.Resampling.BICUBIC, expand=True)
        page.paste(label, _corner(label.size, size, draw), label)
    return page


def _letter(supply: Supply, size: int, draw: np.random.Generator) -> Image.Image:
    """A heading over one to three columns of text."""
    page, ink = _paper(size, draw)
    pen, margin = ImageDraw.Draw(page), size // 24
    heading = _font(supply, draw, 18, 34)
    pen.text((margin, margin), _phrase(draw, 1, 4), font=heading, fill=ink)
    columns, font = int(draw.integers(1, 4)), _font(supply, draw, 10, 18)
    width, leading = (size - margin) // columns, font.size * draw.uniform(1.2, 1.7)
    for column in range(columns):
        left, y = margin + column * width, margin + 1.6 * heading.size
        while y < size - leading:
            if draw.random() > 0.1:
                pen.text((left, y), _line(font, width - margin, draw), font=font, fill=ink)
            y += leading
    return page


def _table(supply: Supply, size: int, draw: np.random.Generator) -> Image.Image:
    """Ruled cells with a word or a number in each."""
    page, ink = _paper(size, draw)
    pen, font = ImageDraw.Draw(page), _font(supply, draw, 11, 20)
    height, columns = int(font.size * draw.uniform(1.6, 2.4)), int(draw.integers(2, 5))
    width, ruled = (size - 20) // columns, draw.random() < 0.7
    for top in range(10, size - height, height):
        for column in range(columns):
            left = 10 + column * width
            if ruled:
                pen.rectangle((left, top, left + width, top + height), outline=ink)
            text = _line(font, width - 8, draw, _figure if column else _word, most=2)
            pen.text((left + 4, top + height // 5), text, font=font, fill=ink)
    return page


def _receipt(supply: Supply, size: int, draw: np.random.Generator) -> Image.Image:
    """A strip of paper on a photograph: articles to the left, prices to the right."""
    page = random_crop(_one_of(supply.pictures, draw), size, draw)
    width = int(size * draw.uniform(0.5, 0.8))
    strip, ink = _paper(size, draw)
    strip = strip.crop((0, 0, width, size))
    pen, font = ImageDraw.Draw(strip), _font(supply, draw, 11, 20)
    pen.text((width // 5, 8), _phrase(draw, 1, 2), font=_font(supply, draw, 18, 30), fill=ink)
    y = 48.0
    while y < size - font.size:
        price = _figure(draw)
        pen.text((8, y), _line(font, 0.55 * width, draw), font=font, fill=ink)
        pen.text((width - 8 - font.getlength(price), y), price, font=font, fill=ink)
        y += font.size * 1.4
    page.paste(strip, (int(draw.integers(size - width + 1)), 0))
    return page


def _poster(supply: Supply, size: int, draw: np.random.Generator) -> Image.Image:
    """A few large words, each line in its own typeface."""
    ink, ground = _inks(draw)
    page = _shaded(ground, size, draw)
    pen, y = ImageDraw.Draw(page), draw.uniform(0, size / 6)
    while y < size * 0.9:
        font = _font(supply, draw, 14, size / 5)
        text = _line(font, size * 0.95, draw, most=4)
        pen.text(((size - font.getlength(text)) * draw.random(), y), text, font=font, fill=ink)
        y += font.size * draw.uniform(1.2, 2.2)
    return page


KINDS: tuple[Callable[[Supply, int, np.random.Generator], Image.Image], ...] = (
    _photograph,
    _letter,
    _table,
    _receipt,
    _poster,
    _photograph,
)


def _photographed(page: Image.Image, draw: np.random.Generator) -> Image.Image:
    """As from a camera: slightly rotated, blurred, noisy, JPEG."""
    page = page.rotate(draw.normal(0, 2), Image.Resampling.BICUBIC, fillcolor=page.getpixel((0, 0)))
    if draw.random() < 0.5:
        page = page.filter(ImageFilter.GaussianBlur(draw.uniform(0.2, 1.1)))
    grain = draw.normal(0, draw.uniform(0, 10), (*page.size, 3))
    page = Image.fromarray((np.array(page) + grain).clip(0, 255).astype(np.uint8))
    stored = io.BytesIO()
    page.save(stored, "JPEG", quality=int(draw.integers(40, 96)))
    return Image.open(stored).convert("RGB")


def _paper(size: int, draw: np.random.Generator) -> tuple[Image.Image, Colour]:
    """A tinted sheet and a dark ink for it."""
    ground = tuple(int(v) for v in draw.integers(205, 256) - draw.integers(0, 25, 3))
    ink = tuple(int(v) for v in draw.integers(0, 90, 3))
    return _shaded(ground, size, draw), ink


def _shaded(ground: Colour, size: int, draw: np.random.Generator) -> Image.Image:
    """One colour with a gradient of light."""
    slope = np.linspace(-1, 1, size)
    light = draw.uniform(0, 30) * slope[:, None] * draw.choice([-1, 1]) + draw.uniform(0, 30) * slope
    return Image.fromarray((np.array(ground) + light[:, :, None]).clip(0, 255).astype(np.uint8))


def _inks(draw: np.random.Generator) -> tuple[Colour, Colour]:
    """Two colours with enough contrast, in either order."""
    dark, light = draw.integers(0, 120, 3), draw.integers(150, 256, 3)
    pair = [tuple(int(v) for v in colour) for colour in (dark, light)]
    first = int(draw.integers(2))
    return pair[first], pair[1 - first]


def _font(supply: Supply, draw: np.random.Generator, low: float, high: float) -> ImageFont.FreeTypeFont:
    """A random typeface; small sizes are as frequent as large ones, on a logarithmic scale."""
    size = round(float(np.exp(draw.uniform(np.log(low), np.log(high)))))
    return ImageFont.truetype(_one_of(supply.fonts, draw), size, layout_engine=ImageFont.Layout.BASIC)


def _extent(text: str, font: ImageFont.FreeTypeFont) -> tuple[int, int]:
    box = font.getbbox(text)
    return int(box[2]) + 8, int(box[3]) + 8


def _corner(extent: tuple[int, int], size: int, draw: np.random.Generator) -> tuple[int, int]:
    x, y = (int(draw.integers(max(1, size - side))) for side in extent)
    return x, y


def _line(
    font: ImageFont.FreeTypeFont,
    width: float,
    draw: np.random.Generator,
    word: Callable[[np.random.Generator], str] | None = None,
    most: int = 30,
) -> str:
    """As many words as go into `width`, but no more than `most`."""
    text = ""
    for _ in range(most):
        longer = f"{text} {(word or _text)(draw)}".strip()
        if font.getlength(longer) > width:
            break
        text = longer
    return text


def _phrase(draw: np.random.Generator, least: int, most: int) -> str:
    return " ".join(_text(draw) for _ in range(int(draw.integers(least, most + 1))))


def _text(draw: np.random.Generator) -> str:
    return _figure(draw) if draw.random() < 0.12 else _word(draw)


def _word(draw: np.random.Generator) -> str:
    word = _one_of(WORDS, draw)
    case = draw.random()
    return word.upper() if case < 0.15 else word.capitalize() if case < 0.35 else word


def _figure(draw: np.random.Generator) -> str:
    """A price, a date, a time or a number."""
    a, b, c = (int(v) for v in draw.integers(1, (28, 12, 10000)))
    return _one_of((f"${c / 100:.2f}", f"{a}.{b:02}.20{a:02}", f"{b}:{a + 10}", str(c), f"{a}%"), draw)


def _one_of(values: Sequence[Any], draw: np.random.Generator) -> Any:
    return values[int(draw.integers(len(values)))]


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, supply in (("calibration", _calibration_supply()), ("test", _test_supply())):
        for k, page in enumerate(_pages(supply, 12, 384, (name == "test", 0))):
            page.save(folder / f"{name}-{k}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
