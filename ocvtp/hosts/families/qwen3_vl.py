"""Qwen3-VL in transformers: its first decoder layers add rows of several layers of the tower.

R units of all images, D' width of the language model.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ocvtp.hosts.families.qwen_vl import QwenHost
from ocvtp.hosts.in_llm.hooks import deepstack_hook
from ocvtp.structures import Needs
from ocvtp.towers.hooks import Hook


class Qwen3VLHost(QwenHost):
    """Qwen3-VL; see `QwenHost`.

    Tokens that are kept keep the rows that the first decoder layers add to them (DeepStack), and
    merging methods mix these as they mix the tokens. Pruners do not see them.
    """

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_vl",)
    family: ClassVar[str] = "Qwen3-VL"
    plain_positions_tell: ClassVar[bool] = True

    @property
    def num_deepstack_layers(self) -> int:
        """See `Host.num_deepstack_layers`."""
        return len(self.tower.config.deepstack_visual_indexes)

    def hooks(self, needs: Needs) -> list[Hook]:
        """See `Host.hooks`."""
        return [*super().hooks(needs), deepstack_hook(self.language_model)]

    def _layer_rows(self, output: Any) -> list[Tensor]:
        # transformers 5.17 leaves the images together
        found = output.deepstack_features
        return [rows if isinstance(rows, Tensor) else torch.cat(rows) for rows in found]
