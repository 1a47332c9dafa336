"""Image files as 8-bit RGB images: the one place that opens them.

A camera stores what its sensor saw, and an EXIF tag that says how to turn it. Images come back
turned, as everything that shows photographs turns them, unless something is read with them that
refers to the pixels as they are stored: COCO's masks do. Nothing of the tag is left on the result,
so that no one turns it again.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

IMAGE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
"""What Pillow raises on a file that is missing, truncated or no image."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BITS = 65535
_RANGES = {"I": (255, _SIXTEEN_BITS), "F": (1, 255, _SIXTEEN_BITS)}
"""White in images of 32 bits, which do not say; meant is the least that no pixel exceeds."""


def open_image(path: str | Path) -> Image.Image:
    """An image file in 8-bit RGB, turned as its EXIF orientation says.

    Raises:
        ValueError: if it is missing or no image.
    """
    try:
        return read_image(path, upright=True)
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
    with Image.open(path) as image:
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
    return read_image(BytesIO(data), upright=True)


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

    with Image.open(path) as image:  # reads the header alone
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
