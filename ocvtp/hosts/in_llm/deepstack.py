"""DeepStack: rows of the vision tower that a language model adds to its first hidden states.

A language model takes them as arguments of its own forward. The model around it fills these in only
where it encodes the images itself; for prompts that a pruner shortened, a hook fills them in.

E decoder layers that add rows, R' image tokens that are left, L' columns of the short prompt, n of
one forward.

Paper: https://arxiv.org/abs/2406.04334.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Deepstack:
    """The rows of a short prompt.

    Args:
        rows: [E, R', D'].
        places: [B, L'] which of the R' belongs to each column, -1 where none does.
    """

    rows: Tensor
    places: Tensor

    @staticmethod
    def at(image_tokens: Tensor, rows: Tensor) -> Deepstack:
        """Rows [E, R', D'] in the columns where `image_tokens` [B, L'] is True."""
        numbers = image_tokens.flatten().cumsum(dim=0).view_as(image_tokens) - 1
        return Deepstack(rows, numbers.masked_fill(~image_tokens, -1))

    def part(self, columns: slice, repeats: int = 1, num_more: int = 0) -> Deepstack:
        """Of some columns, each row of the batch `repeats` times; then `num_more` of text."""
        places = self.places[:, columns].repeat_interleave(repeats, dim=0)
        return Deepstack(self.rows, pad(places, (0, num_more), value=-1))

    def arguments(self) -> dict[str, Any]:
        """What the language model's forward() takes."""
        mask = self.places >= 0  # [B, n]
        rows = self.rows[:, self.places[mask].to(self.rows.device)]
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": list(rows)}
