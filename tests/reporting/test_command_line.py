"""Commands that are printed run as they stand."""

from __future__ import annotations

import shlex

from ocvtp.reporting.command_line import command, typed_before


def test_a_command_has_what_was_typed_before_it():
    words = ["export", "--checkpoint", "my runs/best.ckpt"]
    with typed_before(["--import", "my pruner.py", "--"]):
        found = command(*words)
    assert shlex.split(found) == ["ocvtp", "--import", "my pruner.py", "--", *words]
    assert command("list") == "ocvtp list"
