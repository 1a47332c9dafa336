"""Qwen2-VL in transformers: every block of the tower attends inside whole images."""

from __future__ import annotations

from typing import ClassVar

from ocvtp.hosts.families.qwen_vl import QwenHost


class Qwen2VLHost(QwenHost):
    """Qwen2-VL; see `QwenHost`."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl",)
    family: ClassVar[str] = "Qwen2-VL"
