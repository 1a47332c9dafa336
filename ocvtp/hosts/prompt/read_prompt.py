"""What a pruner learns about the prompt: its words as the language model and as CLIP read them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ocvtp.hosts.base import Encoded, Host
from ocvtp.hosts.prompt.chat_template import find_processor
from ocvtp.hosts.prompt.clip_text import ClipText, TextTower, load_clip_text
from ocvtp.hosts.prompt.user_words import Prompts, embed_words
from ocvtp.structures import Needs


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads prompts for one pruner.

    Args:
        prompts: finds the words.
        wants_text: whether the language model's embeddings of them are wanted.
        clip: CLIP's text side, where its embeddings are wanted.
    """

    prompts: Prompts
    wants_text: bool
    clip: ClipText | None

    @torch.no_grad()
    def read(
        self, host: Host, encoded: Encoded, ids: Tensor, real: Tensor, rows: Tensor
    ) -> Encoded:
        """Add what the prompts say to the visual tokens.

        Args:
            host: of the model.
            encoded: the images.
            ids: [B, L]; of packed samples one a row.
            real: [B, L] bool, False on padding.
            rows: [I], in whose prompt each image (or tile of one) is.

        Raises:
            ValueError: if a prompt has nothing but images.
        """
        starts = encoded.first_rows(rows.device)
        new_image = starts != starts.roll(1)  # and not the next tile of the last
        new_image[:1] = True
        rows, inverse = rows.unique(return_inverse=True)
        counts = torch.zeros_like(rows).index_add(0, inverse, new_image.long())
        ids, words = ids[rows], self.prompts.words(ids[rows], real[rows], counts.tolist())
        self._check(words.any(dim=1).tolist(), rows)
        device, found = encoded.tokens.features.device, dict[str, Any]()
        if self.wants_text:
            text, valid = embed_words(host.model.get_input_embeddings(), ids, words)
            found["text"] = text[inverse.to(text.device)].to(device)
            found["text_valid"] = valid[inverse.to(valid.device)].to(device)
        if self.clip is not None:
            texts = self.prompts.strings(ids, words)
            self._check(texts, rows)
            parts, are_real = self.clip.encode(texts)
            inverse = inverse.to(parts.device)
            features = encoded.tokens.features
            norm: Any = host.tower.post_layernorm
            found["clip_visual"] = self.clip.visual(norm, features)
            found["clip_text"] = parts[inverse].to(device, features.dtype)
            found["clip_text_valid"] = None if are_real is None else are_real[inverse].to(device)
        return replace(encoded, tokens=replace(encoded.tokens, **found))

    def _check(self, said: Sequence[Any], rows: Tensor) -> None:
        silent = [row for row, some in zip(rows.tolist(), said, strict=True) if not some]
        if silent:
            raise ValueError(
                f"the pruner reads the prompt, but row {silent[0]} of the batch has images and no"
                " words of the user's; pass a prompt with a question, or use a pruner that does"
                " not read the text (see `ocvtp list`)."
            )


def make_reader(
    host: Host, needs: Needs, processor: Any = None, text_tower: TextTower = None
) -> Reader | None:
    """What reads prompts for a pruner of these needs; None, and nothing is loaded, without any.

    Args:
        host: of the model; it has checked the needs.
        needs: of the pruner.
        processor: what makes the model's inputs; None looks for the one saved with the model.
        text_tower: see `load_clip_text`.

    Raises:
        ValueError: if the words or CLIP are wanted and cannot be found.
    """
    if not (needs.text or needs.clip):
        return None
    if processor is None:
        processor = find_processor(host.model)
    if processor is None and needs.clip:
        raise ValueError(
            "the pruner reads the prompt by CLIP's text tower, and without the processor the"
            " prompt's tokens cannot be turned into words; pass processor=, the one that makes the"
            " model's inputs."
        )
    prompts = Prompts(host, processor)
    folder = str(getattr(host.model, "name_or_path", None) or "")
    clip = load_clip_text(host.tower, text_tower, folder) if needs.clip else None
    if prompts.problem is not None:
        warnings.warn(
            f"the processor {prompts.problem}, so what a chat template writes around the user's"
            " words is read as theirs; pass processor=, the one that makes the model's inputs.",
            stacklevel=2,
        )
    return Reader(prompts, needs.text, clip)
