"""Text of others where it is shown: it shows itself, and does nothing else.

Names of models, files, pruners and images, and what models say, come from elsewhere. A terminal
obeys control characters, Markdown makes pages, links and HTML of marks.
"""

from __future__ import annotations

import re
import unicodedata

_SHOWN = "\n\t"
_TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_MARKS = str.maketrans({"<": "&lt;", ">": "&gt;"})
_NO_PAIR = re.compile(r"``|\\`")
"""Backticks that Markdown pairs in other ways than one with the next."""


def terminal(text: str) -> str:
    """Text for a terminal or a log: control characters are spelled, lines and tabs stay."""
    return "".join(c if c in _SHOWN or not _controls(c) else _spelled(c) for c in text)


def one_line(text: str) -> str:
    """The same in one line."""
    return " ".join(terminal(text).split())


def markdown(text: str) -> str:
    """Text for Markdown, in one line: no HTML, links or pictures come of it.

    Code stays code where each backtick has its other one; else they become `'`, as in `code`: of
    what Markdown pairs in another way, HTML would be left.
    """
    text = one_line(text)
    if text.count("`") % 2 or _NO_PAIR.search(text):
        text = text.replace("`", "'")
    parts = re.split(r"(`[^`]*`)", text)  # every other one is code
    return "".join(
        part if number % 2 else re.sub(r"\]([(\[])", r"]\\\1", part.translate(_MARKS))
        for number, part in enumerate(parts)
    )


def code(text: str) -> str:
    """Text as code in Markdown, in one line."""
    return "`" + one_line(text).replace("`", "'") + "`"


def cell(text: str) -> str:
    """What is Markdown already, for a cell of a table."""
    return re.sub(r"(?<!\\)\|", r"\\|", text.replace("\n", " "))


def better(name: str, lower: bool) -> str:
    """The name of a figure, and which way is better where that is down."""
    return f"{name} (lower is better)" if lower else name


def on_images(number: int) -> str:
    """`on 1 image`, `on 20 images`."""
    return f"on {number} image{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time as people say it: `0.4 s`, `34 s`, `5 min 36 s`, `3 h 41 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds) if seconds < 3600 else 60 * round(seconds / 60)
    (hours, rest), units = divmod(whole, 3600), ("h", "min", "s")
    numbers = zip((hours, *divmod(rest, 60)), units, strict=True)
    return " ".join(f"{number} {unit}" for number, unit in numbers if number)


def _controls(character: str) -> bool:
    """Whether it commands a terminal, ends a line, or turns the direction of what follows."""
    kind = unicodedata.category(character)
    return kind in ("Cc", "Cs", "Zl", "Zp") or character in _TURNS


def _spelled(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
