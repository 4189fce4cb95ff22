import os

import numpy as np
import pytest
from PIL import Image

from ghostify import GhostifyError
from ghostify.data import image_files
from ghostify.data.image_files import decode_image, list_images

RAMP = np.linspace(0, 1, 64)[None].repeat(8, 0)
GREY = np.rint(RAMP * 255).astype(np.uint8)


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(folder):
    files, classes = list_images(folder)
    return [str(file.relative_to(folder)) for file in files], classes


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("x.png", np.rint(RAMP * 65535).astype(np.uint16)),
        ("x.tif", np.rint(RAMP * 65535).astype(np.uint16)),
        ("big-endian.tif", np.rint(RAMP * 65535).astype(">u2")),
        ("x.tiff", RAMP.astype(np.float32)),
        ("int.tif", np.rint(RAMP * 65535).astype(np.int32)),
    ],
    ids=str,
)
def test_deeper_images_are_scaled_to_what_they_are_in_8_bits(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    assert np.array_equal(np.asarray(decode_image(tmp_path / name, "L")), GREY)
    assert np.array_equal(np.asarray(decode_image(tmp_path / name, "RGB")), GREY[..., None].repeat(3, 2))


@pytest.mark.parametrize(
    "pixels",
    [RAMP.astype(np.float32) * 255, RAMP.astype(np.float32) - 1, np.full((4, 4), np.nan, np.float32),
     np.full((4, 4), 70_000, np.int32)],
    ids=["to 255", "negative", "NaN", "32 bit"],
)  # fmt: skip
def test_numbers_without_a_known_range_are_refused(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(GhostifyError, match=r"x\.tif: is not a readable image \(ValueError: values between"):
        decode_image(tmp_path / "x.tif", "RGB")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_are_converted_as_pillow_does(tmp_path, mode):
    original = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).convert(mode)
    name = {"CMYK": "x.tif", "YCbCr": "x.jpg"}.get(mode, "x.png")
    original.save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = image.convert("RGB")
    assert np.array_equal(np.asarray(decode_image(tmp_path / name, "RGB")), np.asarray(expected))


def test_a_palette_with_transparency_keeps_its_colours_and_the_orientation_is_not_read(tmp_path):
    palette = Image.fromarray(GREY).convert("RGB").quantize(8)
    palette.save(tmp_path / "x.png", transparency=bytes([0, 128, 255]))
    assert np.array_equal(np.asarray(decode_image(tmp_path / "x.png", "RGB")), np.asarray(palette.convert("RGB")))
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=exif)
    assert decode_image(tmp_path / "turned.png", "L").size == (64, 8)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_damaged_files_are_refused_in_one_line_whatever_is_wrong_with_them(tmp_path):
    rng, messages = np.random.default_rng(0), []
    for suffix in ("png", "jpg", "bmp", "tif", "webp"):
        file = tmp_path / f"x.{suffix}"
        Image.fromarray(GREY).convert("RGB").save(file)
        content = np.frombuffer(file.read_bytes(), np.uint8)
        for k in range(40):
            damaged = content[: rng.integers(len(content))].copy() if k % 2 else content.copy()
            if len(damaged):
                damaged[rng.integers(len(damaged), size=4)] = rng.integers(0, 256, 4)
            file.write_bytes(damaged.tobytes())
            try:
                assert decode_image(file, "RGB").mode == "RGB"
            except GhostifyError as error:
                messages.append(str(error))
    assert len(messages) > 50
    assert all(": is not a readable image (" in message for message in messages)


def test_pictures_of_more_pixels_than_memory_are_refused_by_their_header(tmp_path, monkeypatch):
    Image.fromarray(GREY).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(GhostifyError, match=r"x\.png: is not a readable image \(DecompressionBombError"):
        decode_image(tmp_path / "x.png", "RGB")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(GhostifyError, match=r"x\.png: is a pipe, device or socket"):
        decode_image(tmp_path / "x.png", "RGB")


def test_only_visible_image_files_are_listed_whatever_the_case_of_their_suffix(tmp_path):
    touch(tmp_path, "b/2.JPG", "b/more/1.png", "a/1.Jpeg", "a/._1.jpeg", "a/notes.txt", ".ipynb_checkpoints/a/1.png",
          "readme.md", "a/.cache/x.png")  # fmt: skip
    assert names_of(tmp_path) == (["a/1.Jpeg", "b/2.JPG", "b/more/1.png"], ["a", "b"])
    assert names_of(tmp_path / "b") == (["2.JPG", "more/1.png"], [])


def test_a_class_folder_without_images_is_refused(tmp_path):
    touch(tmp_path, "a/1.png", "c/1.png", "b/1.gif")
    with pytest.raises(GhostifyError, match=r"/b: holds no images\. Put images into every class folder"):
        list_images(tmp_path)
    touch(tmp_path, "1.png")  # no class folders: images lie beside them
    assert list_images(tmp_path)[1] == []


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, "store/a/1.png", "data/b/2.png")
    (tmp_path / "data" / "a").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "data" / "b" / "loop").symlink_to(tmp_path / "data")
    assert names_of(tmp_path / "data") == (["a/1.png", "b/2.png"], ["a", "b"])


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(image_files.os, "scandir", scandir)
    with pytest.raises(GhostifyError, match=rf"^{tmp_path}: cannot be read \(Permission denied\)"):
        list_images(tmp_path)


def test_folders_in_folders_without_end_are_refused(tmp_path):
    (tmp_path / ("d/" * (image_files.MAX_DEPTH + 1))).mkdir(parents=True)
    with pytest.raises(GhostifyError, match="more than 100 levels deep"):
        list_images(tmp_path)
