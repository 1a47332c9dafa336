"""Features at mean 0 and scale 1: by the statistics of a data set, or of each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOOR = 0.01
"""Added to every standard deviation: features that hardly vary must not become large."""


def image_mean(tokens: Tensor, valid: Tensor | None) -> Tensor:
    """Mean [B, 1, D] of the real tokens of [B, N, D]."""
    if valid is None:
        return tokens.mean(dim=1, keepdim=True)
    real = valid[:, :, None]
    return tokens.masked_fill(~real, 0.0).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)


def centred(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """[B, N, D] minus the mean over the image's real tokens; 0 on padding."""
    centred = tokens - image_mean(tokens, valid)
    return centred if valid is None else centred.masked_fill(~valid[:, :, None], 0.0)


def standardized(tokens: Tensor, valid: Tensor | None = None) -> Tensor:
    """[B, N, D] centred, and divided by each feature's deviation over the image's real tokens."""
    tokens = centred(tokens, valid)
    return tokens / (image_mean(tokens.square(), valid).sqrt() + FLOOR)


def relative_log(values: Tensor, valid: Tensor | None = None) -> Tensor:
    """Logarithms [B, N] of values of at least 0, minus their mean over the image; 0 on padding.

    Of [B, N, H] each of the H by itself.
    """
    logs = values.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    if logs.ndim == 3:
        return centred(logs, valid)
    return centred(logs[:, :, None], valid).squeeze(2)


class FeatureStatistics(nn.Module):
    """Mean and scale of every feature over a data set, saved with the weights.

    Until they are measured, tokens stay as they are.

    Args:
        dim: D.
    """

    mean: Tensor
    scale: Tensor
    num_tokens: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("num_tokens", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        """`(x - mean) / scale` of tokens [..., D]."""
        return (tokens - self.mean) / self.scale

    def measure(self, moments: Moments) -> None:
        """Take mean and scale from what was counted.

        Raises:
            ValueError: if that is nothing.
        """
        if not moments.count:
            raise ValueError("no token was counted; pass images that can be read.")
        mean = moments.total / moments.count
        variance = (moments.squares / moments.count - mean.square()).clamp(min=0)
        self.mean.copy_(mean)
        self.scale.copy_(variance.sqrt() + FLOOR)
        self.num_tokens.fill_(moments.count)


class Moments:
    """Sums over tokens of width D, in fp64.

    Attributes:
        count: of tokens.
        total: [D] sum.
        squares: [D] sum of squares.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros((), dtype=torch.float64)
        self.squares = torch.zeros((), dtype=torch.float64)

    def add(self, tokens: Tensor, valid: Tensor | None = None) -> None:
        """Count the real ones of tokens [B, N, D]."""
        real = (tokens if valid is None else tokens[valid]).flatten(0, -2).double().cpu()
        self.count += len(real)
        self.total = self.total + real.sum(dim=0)
        self.squares = self.squares + real.square().sum(dim=0)
