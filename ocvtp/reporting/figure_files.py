"""Figures of matplotlib as files: whole, the same every time, and without formulas of others."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.text import Text

from ocvtp.reporting.files import refuse_cut, replacing

_ENDS = {".png": b"IEND\xaeB`\x82", ".pdf": b"%%EOF\n"}
_METADATA: dict[str, dict[str, None]] = {".png": {"Software": None}, ".pdf": {"CreationDate": None}}
"""Suffixes `save_figure` writes, and what it leaves out so that equal figures are equal files."""

_TEXT_OF_PDF = {"pdf.fonttype": 42}
"""TrueType: the system of many a journal refuses matplotlib's own choice, Type 3."""


def save_figure(drawing: Figure, path: str | Path, *, dpi: int = 160) -> Path:
    """Write a figure to a PNG or PDF file, whole or not at all; folders are made as needed.

    Args:
        drawing: from `figure`.
        path: the suffix, `.png` or `.pdf`, is the format.
        dpi: pixels an inch.

    Raises:
        ValueError: for another suffix.
    """
    path, suffix = Path(path), Path(path).suffix.lower()
    if suffix not in _METADATA:
        raise ValueError(f"cannot write {path.name!r}; end it in {' or '.join(_METADATA)}.")
    for text in drawing.findobj(Text):  # of others: between two `$` matplotlib reads a formula
        if isinstance(text, Text) and text.get_text().count("$") and not _is_a_number(text):
            text.set_parse_math(False)
    with replacing(path) as temporary, rc_context(_TEXT_OF_PDF):
        drawing.savefig(temporary, format=suffix[1:], dpi=dpi, metadata=_METADATA[suffix])
        refuse_cut(temporary, _ENDS[suffix])
    return path


def _is_a_number(text: Text) -> bool:
    """Whether an axis wrote it: powers of ten are formulas."""
    return text.get_text().startswith(r"$\mathdefault{")
