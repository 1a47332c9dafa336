"""What every host can do, on several versions of transformers: `make hosts`.

    python -m benchmarks.hosts PYTHON...

runs `tests/hosts/test_matrix.py` with each of these interpreters and writes results/hosts.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

MATRIX = "tests/hosts/test_matrix.py"
RESULTS = Path(__file__).parent / "results" / "hosts.json"
_OTHER = "not recorded_results"  # the test of the file that is to be written


class Recorder:
    """A pytest plugin that collects what the tests of the matrix report.

    Args:
        found: table -> row -> column -> outcome.
    """

    def __init__(self) -> None:
        self.found: dict[str, dict[str, dict[str, Any]]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest."""
        if report.when == "call":
            for table, (row, column, outcome) in report.user_properties:
                self.found.setdefault(table, {}).setdefault(row, {})[column] = outcome


def record() -> dict[str, Any]:
    """Run the matrix with this interpreter.

    Raises:
        ValueError: if a test fails: there is nothing to record then.
    """
    import pytest

    recorder = Recorder()
    status = pytest.main(["-q", "-p", "no:cacheprovider", "-k", _OTHER, MATRIX], [recorder])
    if status != pytest.ExitCode.OK:
        raise ValueError(f"{MATRIX} ended with status {int(status)}; mend what fails first.")
    installed = {name: version(name) for name in ("transformers", "torch")}
    return installed | dict(sorted(recorder.found.items()))


def _run(python: str) -> dict[str, Any]:
    command = [python, "-m", "benchmarks.hosts"]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def main(pythons: list[str]) -> None:
    """Write the results of these interpreters, or print those of this one as a line of JSON."""
    if not pythons:
        print(json.dumps(record()))
        return
    results = [_run(python) for python in pythons]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
