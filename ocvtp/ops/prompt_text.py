"""What the prompt says about visual tokens, through the language model's own embeddings."""

from __future__ import annotations

import torch
from torch import Tensor

from ocvtp.ops.similarity import by_image, full
from ocvtp.structures import VisualTokens, take


def _weights(tokens: VisualTokens) -> Tensor:
    """[B, M] shares of the real text tokens, which sum to 1."""
    assert tokens.text is not None
    if tokens.text_valid is None:
        return full(tokens.text).new_full(tokens.text.shape[:2], 1 / max(1, tokens.text.shape[1]))
    real = tokens.text_valid.to(full(tokens.text).dtype)
    return real / real.sum(dim=1, keepdim=True).clamp(min=1)


def _times(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def text_mean(tokens: VisualTokens) -> Tensor:
    """[B, D'] the mean embedding of the prompt."""
    assert tokens.text is not None
    return by_image(_times, _weights(tokens)[:, None], full(tokens.text)).squeeze(1)


def mean_squared_distance(tokens: VisualTokens) -> Tensor:
    """[B, N] squared distance of each projected token to the prompt's tokens, on average.

    The mean of |v - t|^2 over t is |v|^2 - 2 v . mean(t) + mean(|t|^2).
    """
    assert tokens.text is not None
    assert tokens.projected is not None
    visual = full(tokens.projected)
    lengths = (_weights(tokens) * full(tokens.text).square().sum(dim=2)).sum(dim=1, keepdim=True)
    dots = by_image(_times, visual, text_mean(tokens)[:, :, None]).squeeze(2)
    squared: Tensor = torch.linalg.vector_norm(visual, dim=2).square()
    return squared - 2 * dots + lengths


def clip_parts(tokens: VisualTokens) -> Tensor:
    """[B, T, P] the parts of the prompt in CLIP's space; one where [B, P] was given."""
    assert tokens.clip_text is not None
    return tokens.clip_text if tokens.clip_text.ndim == 3 else tokens.clip_text[:, None]


def last_text(tokens: VisualTokens) -> Tensor:
    """[B, D'] the embedding of the prompt's last token."""
    assert tokens.text is not None
    if tokens.text_valid is None:
        return full(tokens.text[:, -1])
    places = torch.arange(tokens.text.shape[1], device=tokens.text.device)
    last = (places * tokens.text_valid).argmax(dim=1, keepdim=True)
    return full(take(tokens.text, last).squeeze(1))
