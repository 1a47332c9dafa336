"""Tables in Markdown, padded so that they can be read in a terminal too."""

from __future__ import annotations

from collections.abc import Sequence

from ocvtp.reporting.plain_text import cell


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, figures: bool = True) -> str:
    """The first column to the left, and the others to the right.

    Args:
        head: a name a column; Markdown, as all that follows.
        rows: as many cells each.
        figures: whether the others hold figures; else they are to the left, too.
    """
    head, *rows = ([cell(text) for text in row] for row in (head, *rows))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    sides = ["<", *(">" if figures else "<" for _ in widths[1:])]

    def line(row: Sequence[str]) -> str:
        padded = (f"{c:{side}{w}}" for c, side, w in zip(row, sides, widths, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ("-" * (w + 1) + ("-" if s == "<" else ":") for s, w in zip(sides, widths, strict=True))
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, rows)])
