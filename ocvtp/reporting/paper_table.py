"""A table for a paper: rows are pruners, columns are figures; in Markdown, LaTeX and CSV.

What evaluations and benchmarks make `Column`s of; `join` sets several beside each other.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from ocvtp.choices import Bold
from ocvtp.reporting import plain_text

Kind = Literal["unpruned", "method", "yours", "control"]
_SECTIONS: tuple[tuple[Kind, ...], ...] = (("unpruned",), ("yours", "method"), ("control",))
_CONTROLS = "Last: controls, which are there to be compared with."
_YOURS = {"markdown": " (yours)", "latex": r"$^{\dagger}$"}
_DAGGER = r"$\dagger$: ours."
_ESCAPED = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "…": r"\ldots{}", "±": r"$\pm$", "µ": r"$\mu$",
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One figure.

    Args:
        value: as the file has it. low, high: of its 95% interval; None without one.
        bold: whether it is set off.
    """

    value: float
    low: float | None = None
    high: float | None = None
    bold: bool = False


@dataclass(frozen=True)
class Row:
    """What is known of a pruner.

    Args:
        kind: what it is there for.
        tokens: visual tokens kept of an image, mean, by the name of the budget.
        whole: whether all are.
    """

    kind: Kind
    tokens: Mapping[str, float] = field(default_factory=dict)
    whole: bool = False


@dataclass(frozen=True)
class Column:
    """One metric at one budget.

    Args:
        group: what stands above it and its neighbours, e.g. `easy/all, %`.
        name: its budget.
        entries: by label of the row.
        rows: what is known of these labels.
        places: after the decimal point. scale: of what is shown: 100 for percent.
        lower: whether lower is better.
    """

    group: str
    name: str
    entries: Mapping[str, Entry]
    rows: Mapping[str, Row]
    places: int
    scale: float = 1.0
    lower: bool = False

    def text(self, value: float) -> str:
        """A figure, rounded."""
        return f"{round(self.scale * value, self.places) + 0.0:.{self.places}f}"


@dataclass(frozen=True)
class PaperTable:
    """Columns side by side.

    Args:
        columns: at least one.
        notes: what a reader must know, whole sentences.
        with_interval: whether intervals are shown.
        label: of LaTeX, after `tab:`.
    """

    columns: Sequence[Column]
    notes: Sequence[str]
    with_interval: bool = False
    label: str = "pruners"

    def sections(self) -> list[list[tuple[str, Row]]]:
        """Labels with what they are: unpruned, methods, controls; best first, by one column."""
        rows: dict[str, Row] = {}
        for column in self.columns:
            for label, row in column.rows.items():
                known = rows.get(label, row)
                rows[label] = replace(row, tokens={**row.tokens, **known.tokens})
        column = self.columns[self._sorted_by()]
        sign = 1 if column.lower else -1

        def place(label: str) -> float:
            found = column.entries.get(label)
            return float("inf") if found is None else sign * found.value

        found = [
            [(label, rows[label]) for label in sorted(rows, key=place) if rows[label].kind in kinds]
            for kinds in _SECTIONS
        ]
        return [section for section in found if section]

    def _sorted_by(self) -> int:
        """The last but one of the first group, where pruners differ and still work."""
        first = [c.group == self.columns[0].group for c in self.columns]
        return max(first.count(True) - 2, 0)

    def tokens(self, row: Row) -> str:
        """`64 / 32`, in the order of the columns; `all` where nothing is pruned."""
        if row.whole:
            return "all"
        names = dict.fromkeys(column.name for column in self.columns)
        shown = [f"{row.tokens[n]:.1f}".removesuffix(".0") for n in names if n in row.tokens]
        return " / ".join(shown)


def markdown(table: PaperTable) -> str:
    """The table, padded so that it can be read in a terminal too, and the notes."""
    groups = dict.fromkeys(column.group for column in table.columns)
    head = ["pruner", "tokens"]
    head += [c.name if len(groups) == 1 else f"{c.group}: {c.name}" for c in table.columns]
    head = [plain_text.cell(plain_text.markdown(name)) for name in head]
    lines = []
    for label, row in (pair for section in table.sections() for pair in section):
        name = plain_text.cell(plain_text.code(label))
        name += _YOURS["markdown"] if row.kind == "yours" else ""
        name += " (control)" if row.kind == "control" else ""
        cells = [
            _shown(column, label, table, "**{}**", "{} ({} to {})") for column in table.columns
        ]
        name = f"**{name}**" if row.kind == "yours" else name
        lines.append([name, table.tokens(row), *cells])
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    rule = ["-" * width for width in widths]
    rows = [head, [rule[0], *(f"{dashes[1:]}:" for dashes in rule[1:])], *lines]
    text = "\n".join(
        "| " + " | ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in
        enumerate(zip(row, widths, strict=True))) + " |" for row in rows
    )  # fmt: skip
    titled = [f"{next(iter(groups))}."] if len(groups) == 1 else []
    return f"{text}\n\n{' '.join(map(plain_text.markdown, [*titled, *table.notes]))}\n"


def latex(table: PaperTable) -> str:
    """The table in LaTeX, with rules of the package booktabs."""
    columns = table.columns
    sections = [list(_latex_rows(table, section)) for section in table.sections()]
    notes = [*map(escaped, table.notes), *([_CONTROLS] if _has(table, "control") else [])]
    notes += [_DAGGER] if _has(table, "yours") else []
    above, rules = [], []
    start = 3
    for group, count in _runs([column.group for column in columns]):
        above.append(rf"\multicolumn{{{count}}}{{c}}{{{escaped(group)}}}")
        rules.append(rf"\cmidrule(lr){{{start}-{start + count - 1}}}")
        start += count
    names = [escaped(column.name) for column in columns]
    lines = [
        r"\begin{table}[t]",
        r"\centering",
        rf"\caption{{{' '.join(notes)}}}",
        rf"\label{{tab:{table.label}}}",
        rf"\begin{{tabular}}{{ll{'r' * len(columns)}}}",
        r"\toprule",
        rf" & & {' & '.join(above)} \\",
        " ".join(rules),
        rf"Pruner & Tokens & {' & '.join(names)} \\",
        r"\midrule",
        "\n\\midrule\n".join("\n".join(section) for section in sections),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(["% needs \\usepackage{booktabs}", *lines]) + "\n"


def csv_text(table: PaperTable) -> str:
    """The table as CSV: figures as the files have them (shares are not in percent)."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    head = ["pruner", "kind", "tokens"]
    for column in table.columns:
        name = f"{column.group}: {column.name}"
        head += [name, f"{name}, low", f"{name}, high"] if table.with_interval else [name]
    writer.writerow(head)
    for label, row in (pair for section in table.sections() for pair in section):
        cells: list[float | str | None] = []
        for column in table.columns:
            entry = column.entries.get(label)
            cells.append("" if entry is None else entry.value)
            if table.with_interval:
                cells += [None, None] if entry is None else [entry.low, entry.high]
        writer.writerow([label, row.kind, table.tokens(row), *cells])
    return file.getvalue()


FORMATS = {"markdown": markdown, "latex": latex, "csv": csv_text}


def escaped(text: str) -> str:
    """Plain text in LaTeX."""
    return "".join(_ESCAPED.get(sign, sign) for sign in text)


def with_bold(column: Column, rule: Bold, alike: Callable[[str, str], bool]) -> Column:
    """The column with what is set off: never a control, nor the unpruned model.

    Args:
        rule: `best` is what shows the best figure, `ci` that and all that cannot be told from it.
        alike: of a label and that of the best, whether they cannot be told apart.
    """
    rivals = {
        label: entry
        for label, entry in column.entries.items()
        if column.rows[label].kind in ("method", "yours")
    }
    if rule == "none" or not rivals:
        return column
    sign = 1 if column.lower else -1
    best = min(rivals, key=lambda label: sign * rivals[label].value)
    shown = column.text(rivals[best].value)
    if not is_best(
        shown, (column.text(one.value) for one in column.entries.values()), column.lower
    ):
        return column
    off = {
        label
        for label, entry in rivals.items()
        if column.text(entry.value) == shown or (rule == "ci" and alike(label, best))
    }
    entries = {label: replace(entry, bold=label in off) for label, entry in column.entries.items()}
    return replace(column, entries=entries)


def is_best(shown: str, all_shown: Iterable[str], lower: bool) -> bool:
    """Whether the best figure of a column is one: 0 is not, unless lower is better than the others.

    Args:
        shown: the figure, as the table has it. all_shown: all of the column.
        lower: whether lower is better.
    """
    return float(shown) != 0 or (lower and any(float(text) != 0 for text in all_shown))


def overlap(a: Entry, b: Entry) -> bool:
    """Whether the intervals of two figures have something in common; equal ones without any do."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return a.value == b.value
    return a.low <= b.high and b.low <= a.high


def _latex_rows(table: PaperTable, section: Sequence[tuple[str, Row]]) -> Iterator[str]:
    for label, row in section:
        name = rf"\texttt{{{escaped(label)}}}"
        if row.kind == "yours":
            name = rf"\textbf{{{name}}}{_YOURS['latex']}"
        interval = r"{} {{\scriptsize ({}--{})}}"
        cells = [_shown(c, label, table, r"\textbf{{{}}}", interval) for c in table.columns]
        yield rf"{' & '.join([name, table.tokens(row), *cells])} \\"


def _shown(column: Column, label: str, table: PaperTable, bold: str, interval: str) -> str:
    """One cell."""
    entry = column.entries.get(label)
    if entry is None:
        return "-"
    text = column.text(entry.value)
    text = bold.format(text) if entry.bold else text
    if not table.with_interval or entry.low is None or entry.high is None:
        return text
    return interval.format(text, column.text(entry.low), column.text(entry.high))


def _has(table: PaperTable, kind: Kind) -> bool:
    return any(row.kind == kind for column in table.columns for row in column.rows.values())


def _runs(names: Sequence[str]) -> list[tuple[str, int]]:
    """Neighbours of one name, and how many."""
    found: list[tuple[str, int]] = []
    for name in names:
        last = found.pop() if found and found[-1][0] == name else (name, 0)
        found.append((name, last[1] + 1))
    return found
