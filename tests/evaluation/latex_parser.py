"""Reads what LaTeX would refuse: one table, its rows and cells."""

import re

_COMMANDS = {
    "begin": 1, "end": 1, "centering": 0, "caption": 1, "label": 1, "toprule": 0, "midrule": 0,
    "bottomrule": 0, "cmidrule": 1, "multicolumn": 3, "textbf": 1, "texttt": 1, "scriptsize": 0,
    "dagger": 0, "textbackslash": 1, "textasciitilde": 1, "textasciicircum": 1, "textless": 1,
    "textgreater": 1, "textbar": 1, "textquotedbl": 1, "ldots": 1, "pm": 0, "mu": 0,
}  # fmt: skip
"""Known ones, and how many arguments in braces each takes."""


def check(text):
    """Every brace, command and environment has its end; no sign is left that means something."""
    bare = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    open_, depth = [], 0
    for token in re.findall(r"\\[a-zA-Z]+(?:\(lr\))?|\\.|[{}]|\$|.", bare, re.DOTALL):
        if token == "{":
            depth += 1
        elif token == "}":
            depth -= 1
            assert depth >= 0
        elif len(token) > 2:
            assert token[1:].removesuffix("(lr)") in _COMMANDS, token
        else:
            assert token not in '%#~^"<>|' or token == "^", token
            assert ord(token[-1]) < 128, token
    assert depth == 0
    assert bare.count("$") % 2 == 0 - bare.count(r"\$") % 2 * -1
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", bare):
        if kind == "begin":
            open_.append(name)
        else:
            assert open_.pop() == name
    assert open_ == []
    outside = re.sub(r"\$[^$]*\$", "", bare.replace(r"\$", ""))
    assert not re.search(r"(?<!\\)[_^#]", outside)


def rows(text):
    """Cells of every row of the only tabular, which all have as many as it has columns."""
    check(text)
    ((spec, body),) = re.findall(
        r"\\begin\{tabular\}\{(\w+)\}(.*)\\end\{tabular\}", text, re.DOTALL
    )
    body = re.sub(r"\\(toprule|midrule|bottomrule)|\\cmidrule\(lr\)\{\d+-\d+\}", "", body)
    found = []
    for line in body.split("\\\\\n"):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)&", line)]
        spans = [re.match(r"\\multicolumn\{(\d+)\}", cell) for cell in cells]
        assert sum(int(span[1]) if span else 1 for span in spans) == len(spec), line
        found.append(cells)
    return found
