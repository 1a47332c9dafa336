"""Images made smaller before the processor sees them, so that a model makes fewer tokens of them.

The control of VTC-Bench (https://arxiv.org/abs/2510.07143): what a pruner must beat is the whole
model on a picture of fewer pixels. Only models that make more tokens of larger images have it; for
the others, `pool` stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.tasks.base import Ratio, Record, Task
from ocvtp.hosts.prompt.chat_template import with_template

_STEPS = 7  # of the bisection, which ends within two percent of a side
_SHRINK = 0.7  # of a side, from one guess to the next
_LEAST = 14  # pixels of the shorter side
_ABOUT = 0.5  # of the budget, which a smaller picture must at least give

Size = tuple[int, int]
"""Width and height in pixels."""


class Sizer:
    """Finds the sizes at which a model makes few tokens of images.

    What it makes is counted in what its own processor returns for an empty picture of that size.

    Args:
        processor: of the model.
        image_token_id: the placeholder of a visual token.
    """

    def __init__(self, processor: Any, image_token_id: int) -> None:
        self._processor, self._image = processor, image_token_id
        self._text = with_template(processor, "", 1)
        self._counts: dict[Size, int] = {}
        self._found: dict[tuple[Size, int], Size] = {}

    def tokens(self, size: Size) -> int:
        """Placeholders of an image of this size, those that end its rows included."""
        if size not in self._counts:
            made = self._processor(
                images=[[Image.new("RGB", size)]], text=[self._text], return_tensors="pt"
            )
            self._counts[size] = int((made["input_ids"] == self._image).sum())
        return self._counts[size]

    def smaller(self, image: Image.Image, budget: Budget) -> Image.Image:
        """The image at the largest size that gives no more tokens than the budget.

        Where no size gives so few, the one that gives fewest. An image that gives no more as it is
        stays so.
        """
        size = self.size(image.size, budget)
        return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)

    def size(self, size: Size, budget: Budget) -> Size:
        """The size of `smaller` of an image of a size; its shape stays, but for rounding."""
        most = budget.count(self.tokens(size))
        if (size, most) not in self._found:
            self._found[size, most] = self._search(size, most)
        return self._found[size, most]

    def check(self, size: Size, budget: Budget) -> None:
        """Refuse a budget that no size of an image comes near.

        Raises:
            ValueError: that says what it comes to.
        """
        whole, made = self.tokens(size), self.tokens(self.size(size, budget))
        most = budget.count(whole)
        if _ABOUT * most <= made <= most:
            return
        if made == whole:
            raise ValueError(
                f"this model makes {whole} tokens of an image of {size[0]} x {size[1]} pixels, and"
                " as many at any smaller size"
            )
        raise ValueError(
            f"of an image of {size[0]} x {size[1]} pixels this model makes {made} tokens at the"
            f" size that comes nearest, not {most}"
        )

    def _search(self, size: Size, most: int) -> Size:
        whole = self.tokens(size)
        if whole <= most:
            return size
        high, low = 1.0, min(1.0, (most / whole) ** 0.5)
        fewest = size
        while self.tokens(_scaled(size, low)) > most:
            fewest = min(fewest, _scaled(size, low), key=self.tokens)
            if low * min(size) < _LEAST:
                return fewest
            high, low = low, _SHRINK * low
        best = _scaled(size, low)
        for _ in range(_STEPS):
            middle = (low * high) ** 0.5
            guess = _scaled(size, middle)
            if self.tokens(guess) > most:
                high = middle
                continue
            low = middle
            best = max(best, guess, key=lambda size: (self.tokens(size), size))
        return best


class Downsampled(Task):
    """A task whose images are smaller.

    Args:
        asked: the task. sizer: of the model. budget: of the tokens that it shall make.
    """

    def __init__(self, asked: Task, sizer: Sizer, budget: Budget) -> None:
        self._asked, self._sizer, self._budget = asked, sizer, budget
        self.items, self.metrics = asked.items, asked.metrics
        self.keeps_cache = asked.keeps_cache

    def shown(self, owner: int) -> tuple[int, ...]:
        return self._asked.shown(owner)

    def image(self, owner: int) -> Image.Image:
        return self._sizer.smaller(self._asked.image(owner), self._budget)

    def ratios(self, records: Sequence[Record]) -> dict[str, Ratio]:
        return self._asked.ratios(records)

    def describe(self) -> dict[str, Any]:
        return self._asked.describe()


def _scaled(size: Size, by: float) -> Size:
    width, height = (max(1, round(by * side)) for side in size)
    return width, height
