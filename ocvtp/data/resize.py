"""Images brought to a size once, so that no epoch decodes full-size photographs again.

Also what the folders that this package writes share: one setting a folder.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from PIL import ExifTags, Image

from ocvtp.data.coco import find_images
from ocvtp.images import IMAGE_ERRORS, encoded, opened, orientation_of, to_rgb
from ocvtp.reporting.files import replacing, write_whole
from ocvtp.reporting.progress import tracked

logger = logging.getLogger(__name__)

SETTINGS_FILE = "resize.json"
_Outcome = tuple[Literal["written", "skipped", "failed"], str]


@dataclass(frozen=True)
class ResizeReport:
    """What `resize_folder` did.

    Args:
        written: images written by this call.
        skipped: images that an earlier call had finished.
        failures: `FILE: reason` of every image that could not be read; nothing is written for it.
    """

    written: int
    skipped: int
    failures: tuple[str, ...] = ()

    @property
    def failed(self) -> int:
        """Images that could not be read."""
        return len(self.failures)


def resize_folder(
    source: str | Path,
    output: str | Path,
    size: int,
    quality: int = 95,
    num_workers: int | None = None,
) -> ResizeReport:
    """Write every image of a folder with a shorter edge of `size` pixels, as JPEG.

    Paths below the folder are kept, but for the suffix, which becomes .jpg. Smaller images keep
    their size. Pixels keep their stored orientation, so the result goes with the annotation file of
    the source, and the EXIF tag that says how to turn them, but no other. Images already in
    `output` are skipped, so an interrupted call can be repeated.

    Args:
        source: folder of image files (`IMAGE_SUFFIXES`), searched with all below it.
        output: folder of the results; made where absent.
        size: pixels of the shorter edge.
        quality: of the JPEG files, 1 to 100.
        num_workers: threads; None for one per CPU, 16 at most.

    Returns:
        How many images were written, skipped and unreadable.

    Raises:
        ValueError: if `source` holds no images, if two of them would become one file, if `output`
            lies in `source` or holds images of other settings, or if a number is out of range.
    """
    source, output = Path(source), Path(output)
    _check_numbers(size, quality, num_workers)
    targets = _targets(source, output)
    claim_folder(output, SETTINGS_FILE, {"size": size, "quality": quality})
    work = partial(_resize, source, output, size, quality)
    executor = ThreadPoolExecutor(num_workers or min(os.cpu_count() or 1, 16))
    try:
        results = executor.map(work, targets.values(), targets.keys())
        return _report(tracked(results, f"resize to {size}", len(targets)))
    finally:
        executor.shutdown(cancel_futures=True)


def _report(results: Iterable[_Outcome]) -> ResizeReport:
    written, skipped, failures = 0, 0, []
    for outcome, message in results:
        written += outcome == "written"
        skipped += outcome == "skipped"
        if outcome == "failed":
            failures.append(message)
            logger.warning("not resized: %s", message)
    return ResizeReport(written, skipped, tuple(failures))


def _check_numbers(size: int, quality: int, num_workers: int | None) -> None:
    if size < 1:
        raise ValueError(f"size={size} is no edge length; pass at least 1 pixel.")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality={quality} is no JPEG quality; pass 1 to 100.")
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"num_workers={num_workers} does nothing; pass at least 1, or None.")


def _targets(source: Path, output: Path) -> dict[Path, Path]:
    """Relative output path -> relative source path."""
    if not source.is_dir():
        raise ValueError(f"source folder {source} does not exist; pass a folder of images.")
    if output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"output {output} lies in source {source}, so the results would be inputs of the next "
            "call; pass a folder outside of it."
        )
    targets: dict[Path, Path] = {}
    for path in find_images(source):
        target = path.with_suffix(".jpg")
        if target in targets:
            raise ValueError(
                f"{path} and {targets[target]} of {source} would both become {target}; rename one."
            )
        targets[target] = path
    if not targets:
        raise ValueError(f"source folder {source} holds no images; pass a folder that does.")
    return targets


def _resize(
    source: Path, output: Path, size: int, quality: int, name: Path, target: Path
) -> _Outcome:
    path = output / target
    if path.exists():
        return "skipped", ""
    try:
        image, exif = _shrink(source / name, size)
    except IMAGE_ERRORS as error:
        return "failed", f"{name.as_posix()}: {error or type(error).__name__}"
    write_whole(path, encoded(image, "JPEG", quality=quality, exif=exif))
    return "written", ""


def _shrink(path: Path, size: int) -> tuple[Image.Image, Image.Exif]:
    """The image in RGB, its shorter edge at most `size`, and its orientation."""
    with opened(path) as image:
        width, height = image.size
        scale = min(size / min(width, height), 1)
        target = (max(round(width * scale), size), max(round(height * scale), size))
        if scale < 1:
            image.draft("RGB", (2 * target[0], 2 * target[1]))  # decodes at 1/2, 1/4 or 1/8
        rgb, orientation = to_rgb(image), orientation_of(image)
    exif = Image.Exif()
    if orientation != 1:
        exif[ExifTags.Base.Orientation] = orientation
    return (rgb.resize(target, Image.Resampling.BICUBIC) if scale < 1 else rgb), exif


def claim_folder(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Note in `folder` what its images are made with, or check that they were made with the same.

    Args:
        folder: made where absent.
        name: of the JSON file with the settings.
        settings: JSON-able.

    Raises:
        ValueError: if the folder holds images of other settings, or images from elsewhere.
    """
    path = folder / name
    if path.is_file():
        found = json.loads(path.read_text())
        if found != settings:
            raise ValueError(
                f"{folder} was made with {found}, now asked for {settings}; "
                "pass the same settings or another folder, or delete this one."
            )
        return
    if folder.is_dir() and find_images(folder):
        raise ValueError(
            f"{folder} holds images but no {name}, so they came from elsewhere; "
            "pass another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1))
