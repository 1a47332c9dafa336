"""Image files of every mode and orientation become the same 8-bit RGB images."""

import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image, ImageOps, PngImagePlugin

from ocvtp.cli import main
from ocvtp.data.masks import read_mask
from ocvtp.data.question_sets import ImageQuestion, QuestionSet
from ocvtp.data.resize import resize_folder
from ocvtp.hosts import loading
from ocvtp.images import (
    IMAGE_ERRORS,
    limit_pixels,
    open_image,
    read_image,
    read_jpeg_on,
    to_rgb,
)

GREYS = np.array([[0, 51, 128], [200, 254, 255]])


def save(image, folder, kind="png", **options):
    path = folder / f"image.{kind}"
    image.save(path, **options)
    return path


def grey(values, kind):
    return Image.fromarray(np.asarray(values, kind))


SIXTEEN = GREYS * 257
DEEP = {
    "I;16 png": (grey(SIXTEEN, np.uint16), "png"),
    "I;16 tiff": (grey(SIXTEEN, np.uint16), "tiff"),
    "I;16B tiff": (grey(SIXTEEN, ">u2"), "tiff"),
    "I pgm": (grey(SIXTEEN, np.int32), "pgm"),
    "I tiff of 16 bits": (grey(SIXTEEN, np.int32), "tiff"),
    "I tiff of 8 bits": (grey(GREYS, np.int32), "tiff"),
    "F tiff to 1": (grey(GREYS / 255, np.float32), "tiff"),
    "F tiff to 255": (grey(GREYS, np.float32), "tiff"),
    "F tiff to 65535": (grey(SIXTEEN, np.float32), "tiff"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_greys_are_scaled(name, tmp_path):
    image, kind = DEEP[name]
    path = save(image, tmp_path, kind)
    with Image.open(path) as stored:
        assert stored.mode == name.split(" ")[0]
    opened = open_image(path)
    assert opened.mode == "RGB"
    expected = np.repeat(GREYS[:, :, None], 3, axis=2)
    np.testing.assert_array_equal(np.asarray(opened), expected)


def test_every_level_of_sixteen_bits_goes_to_the_nearest_of_eight(tmp_path):
    levels = np.arange(65536).reshape(256, 256)
    opened = np.asarray(open_image(save(grey(levels, np.uint16), tmp_path)))
    np.testing.assert_array_equal(opened[..., 0], (levels + 128) // 257)


def test_a_dark_image_of_sixteen_bits_stays_dark(tmp_path):
    opened = open_image(save(grey(GREYS, np.uint16), tmp_path))
    assert np.asarray(opened).max() == 1


@pytest.mark.parametrize("levels", [[[0, 70000]], [[-1, 5]], [[0.5, float("nan")]]])
def test_grey_levels_of_no_known_range_are_refused(levels, tmp_path):
    kind = np.float32 if np.isnan(levels).any() else np.int32
    path = save(grey(levels, kind), tmp_path, "tiff")
    with pytest.raises(ValueError, match=r"image .*\.tiff cannot be read .*grey levels run from"):
        open_image(path)


COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8)


def palette(transparency):
    image = Image.fromarray(COLOURS).quantize(4)
    image.info["transparency"] = transparency
    return image


def with_alpha(mode):
    image = Image.fromarray(COLOURS).convert(mode)
    image.putalpha(Image.fromarray(np.array([[0, 128], [255, 255]], np.uint8)))
    return image


FLAT = np.repeat(np.asarray(Image.fromarray(COLOURS).convert("L"))[:, :, None], 3, axis=2)
OTHERS = {
    "RGBA": (with_alpha("RGBA"), "png", COLOURS),
    "LA": (with_alpha("LA"), "png", FLAT),
    "P": (palette(b"\x00\x80"), "png", COLOURS),
    "P, one colour": (palette(1), "png", COLOURS),
    "CMYK": (Image.fromarray(COLOURS).convert("CMYK"), "tiff", COLOURS),
    "1": (Image.fromarray(np.array([[True, False]])), "png", [[[255] * 3, [0] * 3]]),
    "L": (Image.fromarray(COLOURS).convert("L"), "png", FLAT),
    "RGB": (Image.fromarray(COLOURS), "png", COLOURS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_modes(name, tmp_path):
    image, kind, expected = OTHERS[name]
    path = save(image, tmp_path, kind)
    with Image.open(path) as stored:
        assert stored.mode == name.split(",")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(np.asarray(open_image(path)), expected)
        np.testing.assert_array_equal(np.asarray(to_rgb(image)), expected)


def test_sixteen_bits_with_transparency(tmp_path):
    path = save(grey(SIXTEEN, np.uint16), tmp_path, transparency=0)
    np.testing.assert_array_equal(np.asarray(open_image(path))[..., 0], GREYS)


def tagged(number, folder, kind):
    exif = Image.Exif()
    exif[0x0112] = number
    pixels = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
    options = {"quality": 100, "subsampling": 0} if kind == "jpg" else {}
    return save(Image.fromarray(pixels), folder, kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["jpg", "png"])
@pytest.mark.parametrize("number", range(10))
def test_orientations_are_applied_once(number, kind, tmp_path):
    path = tagged(number, tmp_path, kind)
    with Image.open(path) as stored:
        raw, upright = np.asarray(stored.convert("RGB")), ImageOps.exif_transpose(stored)
    opened = open_image(path)
    np.testing.assert_array_equal(np.asarray(opened), np.asarray(upright))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(opened)), np.asarray(upright))
    stored = read_image(path, upright=False)
    np.testing.assert_array_equal(np.asarray(stored), raw)
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(stored)), raw)


def test_sixteen_bits_on_their_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(grey(SIXTEEN, np.uint16), tmp_path, exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(path))[..., 0], np.rot90(GREYS, -1))


def test_what_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    for name in ("a.png", "absent.png", "."):
        with pytest.raises(ValueError, match=r"image .* cannot be read \(.+\); pass a JPEG or PNG"):
            open_image(tmp_path / name)
    assert loading.open_image is open_image


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes in folders")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png cannot be read \(it is a pipe or a device"):
        open_image(tmp_path / "x.png")


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="the system names no descriptors")
def test_a_pipe_that_a_shell_gives_is_read(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.png")
    read, write = os.pipe()
    try:
        os.write(write, (tmp_path / "a.png").read_bytes())
        os.close(write)
        assert open_image(f"/dev/fd/{read}").size == (3, 2)
    finally:
        os.close(read)
    with pytest.raises(ValueError, match="it is a pipe or a device; save what it gives as a file"):
        open_image("/dev/null")


@pytest.mark.parametrize("size", [1, 2, 50])
def test_resizing_scales_levels_too(tmp_path, size):
    (tmp_path / "a").mkdir()
    save(grey(np.full((4, 6), 128 * 257), np.uint16), tmp_path / "a")
    assert resize_folder(tmp_path / "a", tmp_path / "b", size).written == 1
    opened = np.asarray(open_image(tmp_path / "b/image.jpg"))
    assert opened.shape[0] == min(size, 4)
    assert np.abs(opened.astype(int) - 128).max() <= 1


def claims(path, width, height):
    """A PNG of one pixel that says it has more."""
    Image.new("L", (1, 1)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


@pytest.fixture
def most_pixels():
    yield limit_pixels
    limit_pixels()


BOMBS = [(13_000, 13_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1), (1, 2**26 + 1)]


@pytest.mark.parametrize("size", BOMBS)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(size, tmp_path):
    claims(tmp_path / "bomb.png", *size)
    message = r"image .*bomb.png cannot be read \(it has .*pixels"
    with pytest.raises(ValueError, match=message):
        open_image(tmp_path / "bomb.png")
    report = resize_folder(tmp_path, tmp_path.with_name("small"), 8)
    assert (report.written, report.failed) == (0, 1)
    assert report.failures[0].startswith("bomb.png: it has ")
    with pytest.raises(ValueError, match="bomb.png.* cannot be used: it has .* pixels"):
        QuestionSet(tmp_path, [ImageQuestion("a", "bomb.png", "What?", "That.")])[0]


@pytest.mark.parametrize("size", [(1, 257), (600, 2)])
def test_a_line_of_pixels_is_refused(size, tmp_path):
    Image.new("RGB", size).save(tmp_path / "line.png")
    with pytest.raises(ValueError, match="line.png.*at most 256 times as long as wide"):
        open_image(tmp_path / "line.png")
    Image.new("RGB", (512, 2)).save(tmp_path / "panorama.png")
    assert open_image(tmp_path / "panorama.png").size == (512, 2)


def test_the_limit_of_pixels_is_a_setting(tmp_path, most_pixels):
    path = save(Image.new("RGB", (30, 20)), tmp_path)
    most_pixels(599)
    with pytest.raises(ValueError, match="it has 30 x 20 pixels, and up to 599 are read"):
        open_image(path)
    most_pixels(600)
    assert open_image(path).size == (30, 20)
    with pytest.raises(ValueError, match="up to 0 pixels is none"):
        most_pixels(0)


def test_the_limit_of_pixels_is_a_flag(tmp_path, most_pixels, capsys):
    source = tmp_path / "source"
    source.mkdir()
    save(Image.new("RGB", (30, 20)), source)
    words = ["resize", str(source), str(tmp_path / "out"), "--size", "8"]
    assert main(["--max-pixels", "599", *words]) == 1
    assert "it has 30 x 20 pixels" in capsys.readouterr().out
    assert main(["--max-pixels=600", *words]) == 0
    assert main(["--max-pixels", "many", *words]) == 2
    assert "--max-pixels 'many'; pass a whole number" in capsys.readouterr().err


def test_masks_of_too_many_pixels_are_refused():
    code = {"size": [10**5, 10**5], "counts": [10**10]}
    for segmentation in (code, [[0, 0, 1, 0, 1, 1]]):
        with pytest.raises(ValueError, match="it has 100000 x 100000 pixels"):
            read_mask(segmentation, 10**5, 10**5)


def test_what_a_reader_raises_on_a_damaged_file_is_one_error(tmp_path, monkeypatch):
    path = save(Image.new("RGB", (3, 2)), tmp_path)

    def broken(self):
        raise struct.error("unpack requires 4 bytes")

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", broken)
    with pytest.raises(ValueError, match=r"it is damaged \(error: unpack requires 4 bytes\)"):
        open_image(path)


def test_no_program_is_started_to_read_an_image(tmp_path, monkeypatch):
    path = save(Image.new("RGB", (3, 2)), tmp_path, "eps")
    path = path.rename(tmp_path / "image.jpg")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    with pytest.raises(ValueError, match="it is of the format EPS; save it as JPEG or PNG"):
        open_image(path)


# ---------------------------------------------------------------- decoded by a device

DEVICES = [("cpu", 1, 0.01), pytest.param("cuda", 48, 1.5, marks=pytest.mark.gpu)]
"""With the most levels of 255 that one differs by, and that all do on average."""


def photograph(kind):
    """Soft colours and a hard edge; sides that a JPEG's blocks do not divide."""
    y, x = np.mgrid[0:37, 0:51]
    pixels = np.stack([5 * x, 6 * y, 127 + 100 * np.sin((x + y) / 9)], 2).clip(0, 255)
    pixels[10:20, 30:45] = (250, 30, 30)
    return Image.fromarray(pixels.astype(np.uint8)).convert(kind)


@pytest.mark.parametrize(("device", "most", "mean"), DEVICES)
@pytest.mark.parametrize("kind", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_a_device_decodes_as_pillow_does(tmp_path, device, most, mean, kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = save(photograph(kind), tmp_path, "jpeg", quality=92, exif=exif)
    for upright in (True, False):
        found, wanted = read_jpeg_on(device, path, upright), read_image(path, upright)
        assert (found.mode, found.size, found.info) == ("RGB", wanted.size, {})
        off = np.abs(np.asarray(found, np.int16) - np.asarray(wanted, np.int16))
        assert off.max() <= most
        assert off.mean() <= mean


@pytest.mark.parametrize(("kind", "suffix"), [("CMYK", "jpeg"), ("RGB", "png"), ("P", "png")])
def test_other_files_are_pillows(tmp_path, kind, suffix):
    path = save(photograph("RGB").convert(kind), tmp_path, suffix)
    found = np.asarray(read_jpeg_on("cpu", path, True))
    np.testing.assert_array_equal(found, np.asarray(read_image(path, True)))


def test_a_damaged_jpeg_is_an_error_of_images(tmp_path):
    path = save(photograph("RGB"), tmp_path, "jpeg")
    content = path.read_bytes()
    for damaged in (content[:400], content[:2], b""):
        path.write_bytes(damaged)
        with pytest.raises(IMAGE_ERRORS):
            read_jpeg_on("cpu", path, True)
