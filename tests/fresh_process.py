"""Code that runs in forks of one fresh process: what they all import is imported once."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RUN = "import sys; from ocvtp.cli import main; sys.exit(main({words}))"
"""A command, as a process of its own runs it."""
TRAINS = "import ocvtp.training.run; from transformers import CLIPImageProcessor, CLIPVisionModel"
"""For `first`: most of what training imports."""
_END = "-- the end of a fork --"
_EACH = f"""
import os, sys, traceback
first, *pairs = sys.argv[1:]
exec(first)
for folder, code in zip(pairs[::2], pairs[1::2]):
    if not os.fork():
        os.chdir(folder)
        try:
            exec(code, {{"__name__": "__main__"}})
            status = 0
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # at once: to take torch apart takes long
    assert os.wait()[1] == 0, code
    print("{_END}", flush=True)
"""


def outputs(
    codes: Sequence[str],
    *,
    first: str = "",
    folders: Sequence[Path] | None = None,
    python: str = sys.executable,
) -> list[str]:
    """What each code prints, which may exit with 0.

    Args:
        codes: each runs in a fork of one fresh process.
        first: what that process has run.
        folders: where each code runs; None for here.
        python: that runs them.
    """
    pairs = [
        str(word)
        for pair in zip(folders or ["."] * len(codes), codes, strict=True)
        for word in pair
    ]
    words = [python, "-c", _EACH, first, *pairs]
    run = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr
    *found, rest = run.stdout.split(f"{_END}\n")
    assert (len(found), rest) == (len(codes), ""), run.stdout
    return found


_RANKS = """
import os
tasks = []
for rank in range(2):
    tasks.append(os.fork())
    if not tasks[-1]:
        os.environ |= {{"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}}
        os.environ |= {{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}"}}
        os.dup2(1, 2)
        exec({code!r}, {{"__name__": "__main__"}})
        raise SystemExit
while tasks:
    task, status = os.wait()
    tasks.remove(task)
    if status:  # the other one would wait for it
        for other in tasks:
            os.kill(other, 9)
        raise SystemExit(1)
"""


def in_two_processes(code: str) -> str:
    """A code for `outputs`: both processes of a run, as a launcher of others starts them.

    Args:
        code: of each; it may call `train` with two devices. What it says of errors is printed too.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return _RANKS.format(code=code, port=free.getsockname()[1])
