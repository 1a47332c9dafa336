"""The files that --images names: images, and folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ocvtp.data.coco import IMAGE_SUFFIXES


def image_files(given: Sequence[str]) -> list[Path]:
    """The images, those of folders by name.

    Raises:
        ValueError: if a folder has none.
    """
    found: list[Path] = []
    for name in given:
        path = Path(name)
        if not path.is_dir():
            found.append(path)
            continue
        inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES]
        if not inside:
            raise ValueError(f"--images {name} is a folder without images; pass another one.")
        found += inside
    return found
