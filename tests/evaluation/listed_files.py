"""Small images and question files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def write_images(folder: Path, names: Sequence[str], size: tuple[int, int] = (12, 8)) -> Path:
    """Image n has n in its red channel."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", size, (number, 0, 0)).save(folder / name, format="PNG")
    return folder


def write_lines(path: Path, entries: Sequence[dict[str, Any]]) -> Path:
    """JSON lines, as POPE's files are."""
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def answers(texts: Sequence[str]) -> list[dict[str, str]]:
    """Records of a run."""
    return [{"answer": text} for text in texts]
