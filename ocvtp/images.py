"""Image files as 8-bit RGB images: the one place that opens them.

A camera stores what its sensor saw, and an EXIF tag that says how to turn it. Images come back
turned, as everything that shows photographs turns them, unless something is read with them that
refers to the pixels as they are stored: COCO's masks do. Nothing of the tag is left on the result,
so that no one turns it again.

A file of a few bytes can say that it has any number of pixels. What has more than `most_pixels()`
is refused by its header.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises on a file that is missing, truncated or no image."""

_MOST_PIXELS = 2**26
_GIVEN = re.compile(r"/dev/(stdin|fd/\d+)")
"""Pipes that a shell gives: `... | ocvtp answer --image /dev/stdin`, `--image <(...)`."""
_LONGEST = 256
"""Times its width. Processors scale the shorter side to that of the tower, so that a line of pixels
in a file of a few bytes would take gigabytes."""
_limit = _MOST_PIXELS
_PROGRAMS = ("EPS",)
"""Formats for which Pillow starts another program."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_SIDE = (5, 6, 7, 8)
"""Orientations that exchange width and height."""
_SIXTEEN_BITS = 65535
_RANGES = {"I": (255, _SIXTEEN_BITS), "F": (1, 255, _SIXTEEN_BITS)}
"""White in images of 32 bits, which do not say; meant is the least that no pixel exceeds."""


def most_pixels() -> int:
    """How many pixels an image may have: 2^26, or what `limit_pixels` said."""
    return _limit


def limit_pixels(most: int = _MOST_PIXELS) -> None:
    """Set how many pixels an image may have, of this process and those that it forks.

    Args:
        most: pixels. Those of one image take up to 16 bytes each.

    Raises:
        ValueError: below 1.
    """
    global _limit
    if most < 1:
        raise ValueError(f"an image of up to {most} pixels is none; pass at least 1.")
    _limit = most
    Image.MAX_IMAGE_PIXELS = max(most, Image.MAX_IMAGE_PIXELS or 0)  # Pillow has a limit of its own


def check_pixels(width: int, height: int) -> None:
    """Refuse the size of an image that has too many pixels, or is next to a line.

    Raises:
        ValueError: if it has more than `most_pixels()`, or is more than 256 times as long as wide.
    """
    short, long = sorted((width, height))
    if long > _LONGEST * short > 0:
        raise ValueError(
            f"it has {width} x {height} pixels, and at most {_LONGEST} times as long as wide is"
            " read; cut it, or pad it"
        )
    if width * height > _limit:
        raise ValueError(
            f"it has {width} x {height} pixels, and up to {_limit} are read; make it smaller, or"
            " pass `ocvtp --max-pixels N COMMAND ...` (ocvtp.images.limit_pixels)"
        )


@contextmanager
def opened(path: str | Path | BytesIO) -> Iterator[Image.Image]:
    """An image file of which the header is read; the pixels are when they are asked for.

    Raises:
        IMAGE_ERRORS: if it is missing or no image, also from inside of the block.
        ValueError: if it is a pipe (but one that this process was given, e.g. /dev/stdin) or a
            device, has more than `most_pixels()`, or is of a format that Pillow starts another
            program for.
    """
    if not isinstance(path, BytesIO):
        _refuse_waiting(path)
    try:
        with Image.open(path) as image:
            check_pixels(*image.size)
            if image.format in _PROGRAMS:
                raise ValueError(f"it is of the format {image.format}; save it as JPEG or PNG")
            yield image
    except Image.DecompressionBombError as error:
        raise ValueError(f"it has more than {_limit} pixels ({error})") from error
    except IMAGE_ERRORS:
        raise
    except Exception as error:  # Pillow's readers raise anything on a damaged file
        raise ValueError(f"it is damaged ({type(error).__name__}: {error})") from error


def _refuse_waiting(path: str | Path) -> None:
    """Refuse what is there and no file: a pipe that nobody writes to would be waited for."""
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode) and _GIVEN.fullmatch(os.fspath(path)):
        return
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ValueError("it is a pipe or a device; save what it gives as a file")


def open_image(path: str | Path) -> Image.Image:
    """An image file in 8-bit RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: if it is missing or no image.
    """
    with _told(path):
        return read_image(path, upright=True)


def upright_size(path: str | Path) -> tuple[int, int]:
    """Width and height of what `open_image` gives; of most formats the header alone is read.

    Raises:
        ValueError: if it is missing or no image.
    """
    with _told(path), opened(path) as image:
        if image.format == "PNG":  # its orientation may come after its pixels
            image.load()
        width, height = image.size
        is_on_side = orientation_of(image) in _ON_SIDE
    return (height, width) if is_on_side else (width, height)


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """What goes wrong inside of the block is said of this file."""
    try:
        yield
    except IMAGE_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"image {path} cannot be read ({reason}); pass a JPEG or PNG.") from error


def read_image(path: str | Path | BytesIO, upright: bool) -> Image.Image:
    """An image file in 8-bit RGB.

    Args:
        path: of the file.
        upright: turn it as its EXIF orientation says, or leave the pixels as they are stored.

    Raises:
        IMAGE_ERRORS: if it is missing or no image.
    """
    with opened(path) as image:
        image.load()  # a PNG's orientation may come after its pixels
        turn = turn_of(image) if upright else None
        rgb = to_rgb(image)
    rgb.info = {}
    return rgb if turn is None else rgb.transpose(turn)


def decode_image(data: bytes) -> Image.Image:
    """What an image file holds, in 8-bit RGB and upright.

    Raises:
        IMAGE_ERRORS: if it is no image.
    """
    try:
        return read_image(BytesIO(data), upright=True)
    except UnidentifiedImageError as error:  # Pillow's own words name an object in memory
        raise ValueError("it is no image of a known format") from error


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """What a file of an image holds.

    Args:
        image: any.
        format: `JPEG`, `PNG`, ..., see `PIL.Image.Image.save`.
        options: of the format.
    """
    file = BytesIO()
    image.save(file, format=format, **options)
    return file.getvalue()


def read_jpeg_on(device: str, path: str | Path, upright: bool) -> Image.Image:
    """As `read_image`; a JPEG in colours or grey is decoded by a device.

    Levels of a GPU's decoder differ by some of 255 where colours change: each interpolates the
    colours, of which a JPEG keeps every second pixel, in its own way. Other files are Pillow's.

    Args:
        device: `cuda`, `cuda:1`, ...; `cpu` is torchvision's own decoder.
        path: of the file.
        upright: see `read_image`.

    Raises:
        IMAGE_ERRORS: if it is missing or no image.
    """
    from torchvision.io import ImageReadMode, decode_jpeg, read_file

    with opened(path) as image:  # reads the header alone
        is_plain, turn = image.format == "JPEG" and image.mode in ("RGB", "L"), turn_of(image)
    if not is_plain:
        return read_image(path, upright)
    try:
        pixels = decode_jpeg(read_file(str(path)), ImageReadMode.RGB, device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"it cannot be decoded on {device} ({reason})") from error
    rgb = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    return rgb.transpose(turn) if upright and turn is not None else rgb


def orientation_of(image: Image.Image) -> int:
    """EXIF's number of an opened image: 1 where it is upright."""
    number = image.getexif().get(ExifTags.Base.Orientation)
    return number if number in _TURNS else 1


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What turns an opened image upright; None where it is."""
    return _TURNS.get(orientation_of(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image in 8-bit RGB.

    Grey levels of 16 bits are scaled, white to white. So are those of 32 bits and floats; theirs is
    the least of the usual ranges (0 to 255, 0 to 65535; floats also 0 to 1) that holds them all.
    Transparency is dropped: what is seen is the colour under it.

    Raises:
        ValueError: if the grey levels are of no such range, or Pillow cannot convert the image.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # Pillow warns where a palette's transparency is dropped
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more bits, scaled to 0..255."""
    levels = np.asarray(image)
    least, most = levels.min(), levels.max()
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        white = _SIXTEEN_BITS  # these two have no more, whatever Pillow holds them in
    else:
        white = next((end for end in _RANGES[image.mode] if most <= end), 0)
    if not least >= 0 or not white:  # nan is neither
        raise ValueError(
            f"its grey levels run from {least} to {most}, which is no known range; "
            "save it with 8 or 16 bits"
        )
    scaled = (levels.astype(np.float32) * np.float32(255 / white)).round()
    return Image.fromarray(scaled.astype(np.uint8))
