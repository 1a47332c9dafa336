"""What figures depend on besides the settings: versions, device, commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from ocvtp import __version__


def environment_of(model: Any) -> dict[str, str]:
    """What figures of a model depend on: versions, device, commit."""
    device = torch.device(model.device)
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type}: {name}",
        "threads": str(torch.get_num_threads()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "ocvtp": _version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _version() -> str:
    """Of this package, with the commit where it runs from a checkout, installed or not."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists() or shutil.which("git") is None:
        return __version__
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    commit = found.stdout.strip()
    return f"{__version__}, commit {commit}" if commit else __version__
