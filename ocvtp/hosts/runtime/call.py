"""One call of an attached model: all that its parts must know of each other.

L' columns of the short prompt, n tokens of one forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ocvtp.hosts.in_llm.deepstack import Deepstack
from ocvtp.hosts.in_llm.layer_call import LayerCall
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.runtime.generate_arguments import Callers
from ocvtp.towers.recordings import CALL


@dataclass
class Call(LayerCall):
    """A `generate()` or `forward()` of an attached model that runs in this thread.

    Args:
        model: the one that was called.
        prompt: the short one that steps of generate() read; None outside of generate(), and in
            later turns, whose images are in the cache.
        callers: processors and criteria that read the caller's prompt; None if there are none.
        wants_tuple: whether the model will hand back a tuple, whose parts have no names.
        num_read: of the short prompt's columns that went into the model.
    """

    model: Any
    prompt: Prompt | None = None
    callers: Callers | None = None
    wants_tuple: bool = False
    num_read: int = 0

    @contextmanager
    def on_its_way(self) -> Iterator[None]:
        """Inside the block, hooks see this call."""
        self.around = CALL.get()
        token = CALL.set(self)
        try:
            yield
        finally:
            CALL.reset(token)

    def check_read(self) -> None:
        """Refuse an answer to something else.

        Raises:
            ValueError: if generate() has not read all of the prompt.
        """
        if self.prompt is not None and self.num_read < self.prompt.short_ids.shape[1]:
            raise ValueError(
                "generate() did not read the prompt that it was given, so the images are not in"
                " the answer; leave out what rewrites prompts, e.g. token_healing."
            )

    def step(self, kwargs: dict[str, Any], past: int) -> tuple[dict[str, Any], Deepstack | None]:
        """Arguments of a forward() inside generate(), whose ids are those of the short prompt.

        The prepared embeddings take the place of ids of the prompt, whichever part of it this
        forward reads.

        Args:
            kwargs: of the forward(). past: columns in the cache that it was given.

        Returns:
            the arguments, and what the language model adds to these columns.

        Raises:
            ValueError: if the ids are another prompt with images.
        """
        prompt, ids = self.prompt, kwargs.get("input_ids")
        assert prompt is not None
        rows, length = prompt.short_ids.shape
        if ids is None or past >= length:
            return kwargs, None
        here = slice(past, past + ids.shape[1])
        repeats, rest = divmod(ids.shape[0], rows)
        expected = prompt.short_ids[:, here].repeat_interleave(max(repeats, 1), dim=0)
        head = ids[:, : expected.shape[1]]
        if rest or not torch.equal(expected.to(ids.device), head):
            if bool((ids == self.model.config.image_token_id).any()):
                raise ValueError(
                    "generate() ran the model on image placeholders that are not the prompt's (e.g."
                    " a negative prompt with an image); leave them out while a pruner is attached."
                )
            return kwargs, None  # e.g. the text-only branch of classifier-free guidance
        self.num_read = max(self.num_read, past + head.shape[1])
        kwargs = dict(kwargs)
        tail = kwargs.pop("input_ids")[:, expected.shape[1] :]
        embeddings = prompt.embeddings[:, here].repeat_interleave(repeats, dim=0)
        if tail.shape[1]:
            embed = self.model.get_input_embeddings()
            embeddings = torch.cat([embeddings, embed(tail).to(embeddings)], dim=1)
        kwargs["inputs_embeds"] = embeddings
        gapped = prompt.positions is not None and prompt.rope_deltas is None
        if gapped and kwargs.get("attention_mask") is None:
            # An all-ones mask may have been dropped; without one, gaps look like packed sequences.
            kwargs["attention_mask"] = torch.ones(
                ids.shape[0], past + ids.shape[1], dtype=torch.long, device=ids.device
            )
        if prompt.deepstack is None:
            return kwargs, None
        return kwargs, prompt.deepstack.part(here, repeats, tail.shape[1])
