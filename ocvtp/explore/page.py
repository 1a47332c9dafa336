"""One HTML file that asks nothing of anybody: style, script, pictures and data are inside.

What others wrote (names of files, prompts, answers, labels of pruners) is in the data alone, where
no character of it can end the element that it is in; the script puts it on the page as text. The
policy of the page allows that script and that style, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ocvtp.explore.kept import Stage
from ocvtp.images import encoded
from ocvtp.reporting.plain_text import terminal
from ocvtp.visualize import slot_palette

MAX_SIDE = 640
"""Pixels of the longer side of a picture."""
_QUALITY = 88
_NONE = 0xFFFF
_MAX_COLOURS = 256
_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def to_html(facts: Mapping[str, Any]) -> str:
    """The page of what `ocvtp.explore.run.explore` found.

    Args:
        facts: JSON, see there.
    """
    facts, style, script = _told(facts), _part("page.css"), _script()
    parts = {
        "policy": html.escape(policy(style, script)),
        "title": html.escape(f"What pruners keep: {facts['model']}"),
        "style": style,
        "script": script,
        "data": _json(facts),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _part("page.html"))


def policy(style: str | None = None, script: str | None = None) -> str:
    """The Content-Security-Policy of the page: its own style and script, and pictures in it.

    Args:
        style, script: as they are in the page; None for those of every page.
    """
    style, script = style or _part("page.css"), script or _script()
    rules = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _hash(style),
        "script-src": _hash(script),
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def picture(seen: NDArray[np.uint8]) -> dict[str, Any]:
    """An image [H, W, 3] in the page: `picture`, `width` and `height`, of at most `MAX_SIDE`."""
    image = Image.fromarray(seen)
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    data = base64.b64encode(encoded(image, "JPEG", quality=_QUALITY)).decode()
    width, height = image.size
    return {"picture": f"data:image/jpeg;base64,{data}", "width": width, "height": height}


def look(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What is left of an image stage by stage, in the page.

    Of every stage `grids` and its `place`; `kept`, a bit for each cell, the highest of a byte
    first; where there are any, `slots`, the strongest of each cell, and `numSlots`; `merged`, see
    `Stage`. These two are numbers of 16 bits, the low byte first, 65535 for none. All in base64.
    """
    return [_stage(stage) for stage in stages]


def palette(looks: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """Colours for the slots and merged tokens of such looks."""
    stages = [stage for stages in looks for stage in stages]
    most = max((stage.get("numSlots", 0) for stage in stages), default=0)
    if any("merged" in stage for stage in stages):
        most = _MAX_COLOURS
    return [f"#{r:02x}{g:02x}{b:02x}" for r, g, b in slot_palette(min(most, _MAX_COLOURS))]


def _stage(stage: Stage) -> dict[str, Any]:
    total = sum(rows * columns for rows, columns in stage.grids)
    kept = np.zeros(total, np.bool_)
    kept[stage.cells.numpy()] = True
    made: dict[str, Any] = {
        "grids": [list(grid) for grid in stage.grids],
        "place": stage.place,
        "kept": base64.b64encode(np.packbits(kept).tobytes()).decode(),
    }
    if stage.masks is not None:
        strongest = stage.masks.argmax(dim=0).masked_fill(stage.masks.amax(dim=0) <= 0, -1)
        made |= {"slots": _numbers(strongest, total), "numSlots": len(stage.masks)}
    if stage.merged is not None:
        made["merged"] = _numbers(stage.merged, total)
    return made


def _numbers(values: Tensor, total: int) -> str:
    """-1 for none, as are all up to `total`."""
    found = np.full(total, _NONE, "<u2")
    found[: len(values)] = np.where(values.numpy() < 0, _NONE, values.numpy())
    return base64.b64encode(found.tobytes()).decode()


def _part(name: str) -> str:
    """A file of the page; its lines end as a browser reads them."""
    return files("ocvtp.explore").joinpath(name).read_text(encoding="utf-8")


def _script() -> str:
    """What draws, and what uses that."""
    return _part("picture.js") + _part("page.js")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _json(facts: Any) -> str:
    """JSON in an element of HTML: nothing in it ends that, or opens another."""
    text = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.translate(_ESCAPES)


def _told(value: Any) -> Any:
    """Without control characters in texts, and what turns the direction of others."""
    if isinstance(value, str):
        return terminal(value)
    if isinstance(value, Mapping):
        return {name: _told(item) for name, item in value.items()}
    return [_told(item) for item in value] if isinstance(value, list | tuple) else value
