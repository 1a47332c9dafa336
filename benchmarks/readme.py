"""Write the generated sections of the README and the documentation: `make readme`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.accuracy import accuracy_table, choosing_table
from benchmarks.reliability_table import tables as reliability_tables
from benchmarks.table import forms_table, hosts_tables, select_table, stages_table, table
from ocvtp.pruners.catalog import markdown_table

ROOT = Path(__file__).parents[1]


def sections() -> dict[str, dict[str, str]]:
    """File -> name of a section -> what stands between its marks."""
    return {
        "README.md": {"choosing": choosing_table()},
        "docs/choosing.md": {"choosing": choosing_table()},
        "docs/pruners.md": {"pruners": markdown_table()},
        "docs/hosts.md": {"hosts": hosts_tables()},
        "docs/reliability.md": {"reliability": reliability_tables()},
        "docs/results.md": {
            "accuracy": accuracy_table(),
            "select": select_table(),
            "select-official": forms_table(),
            "measured": table(),
            "stages": stages_table(),
        },
    }


def main() -> None:
    """Replace what stands between the marks of each section."""
    for name, contents in sections().items():
        path = ROOT / name
        text = path.read_text()
        for section, content in contents.items():
            pattern = rf"(<!-- {section}: .*?-->\n).*?(<!-- /{section} -->)"
            if not re.search(pattern, text, re.DOTALL):
                raise ValueError(f"{name} lacks the marks of the section {section!r}; add them.")
            text = re.sub(pattern, lambda m, c=content: m[1] + c + m[2], text, flags=re.DOTALL)
        path.write_text(text)


if __name__ == "__main__":
    main()
