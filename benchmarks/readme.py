"""Write the README's generated sections: `make readme`."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.accuracy import accuracy_table
from benchmarks.table import hosts_tables, select_table, stages_table, table
from ocvtp.pruners.catalog import markdown_table


def main() -> None:
    """Replace what stands between the marks of each section."""
    path = Path(__file__).parents[1] / "README.md"
    text = path.read_text()
    sections = {
        "pruners": markdown_table(),
        "select": select_table(),
        "hosts": hosts_tables(),
        "measured": table(),
        "stages": stages_table(),
        "accuracy": accuracy_table(),
    }
    for name, content in sections.items():
        pattern = rf"(<!-- {name}: .*?-->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda m, c=content: m[1] + c + m[2], text, flags=re.DOTALL)
    path.write_text(text)


if __name__ == "__main__":
    main()
