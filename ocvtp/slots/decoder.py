"""Decoders: slots back to encoder tokens. They exist in training only; C is the slot width."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ocvtp.field_types import Ranges
from ocvtp.slots.positions import Grids, PositionEmbedding

DecoderKind = Literal["masked_transformer", "mlp"]
Visible = Literal["random", "all", "none"]


@dataclass(frozen=True)
class DecoderConfig:
    """How slots are decoded; the defaults are the paper's, at LLaVA-1.5 size.

    Args:
        kind: `masked_transformer` (the paper's) or `mlp` (light: a spatial broadcast decoder).
        num_layers: of the transformer, or hidden layers of the MLP.
        num_heads: of the transformer.
        ffn_dim: hidden width.
        prefix_probability: chance of a uniformly drawn number of visible tokens in training.
        prefix_fraction: share of visible tokens otherwise.
    """

    ranges: ClassVar[Ranges] = {
        **{"num_layers": (0, 1000), "num_heads": (1, 2**16), "ffn_dim": (1, 2**20)},
        **{"prefix_probability": (0, 1), "prefix_fraction": (0, 1)},
    }

    kind: DecoderKind = "masked_transformer"
    num_layers: int = 4
    num_heads: int = 4
    ffn_dim: int = 4096
    prefix_probability: float = 0.5
    prefix_fraction: float = 0.1


class Decoder(nn.Module, ABC):
    """Reconstructs the tokens of an image from its slots."""

    @abstractmethod
    def forward(
        self,
        features: Tensor,
        slots: Tensor,
        grids: Grids,
        visible: Visible = "none",
        valid: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct.

        Args:
            features: [B, N, D] the tokens, for decoders that see some of them.
            slots: [B, S, C].
            grids: rows and columns of the token grid, or [B, V, 2] of each image's views.
            visible: which tokens the decoder sees: a `random` part (training), `all` (the official
                evaluation) or `none` (an honest one).
            valid: [B, N] bool, False on padding tokens, from which nothing is decoded.

        Returns:
            [B, N, D], anything on padding tokens.
        """


class _Projection(nn.Module):
    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim_in, dim_out, bias=False)
        self.norm = nn.LayerNorm(dim_out)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.norm(self.linear(inputs)))


class MaskedTransformerDecoder(Decoder):
    """A transformer fills in masked tokens from the visible ones and the slots.

    Source: the official code of https://arxiv.org/abs/2511.20439. It permutes the tokens of each
    image at random, shows a prefix, masks the rest, decodes without a causal mask and un-permutes.
    Self-attention without a causal mask does not see the order, so masking a random subset in
    place is the same computation; that is what happens here.

    Args:
        dim: D. slot_dim: C. grid_hw: of the position embedding. config: see `DecoderConfig`.
        num_views: V, most views of an image.
    """

    def __init__(
        self,
        dim: int,
        slot_dim: int,
        grid_hw: tuple[int, int],
        config: DecoderConfig,
        num_views: int = 1,
    ) -> None:
        super().__init__()
        self.config = config
        self.project_tokens = _Projection(dim, dim)
        self.project_slots = _Projection(slot_dim, dim)
        self.positions = PositionEmbedding(dim, grid_hw, num_views)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim).mul_(dim**-0.5))
        layer = nn.TransformerDecoderLayer(
            dim,
            config.num_heads,
            config.ffn_dim,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            bias=False,
        )
        self.backbone = nn.TransformerDecoder(layer, config.num_layers)
        # The first layer's norm1 acts on all that the stack reads, residual branch included.
        first = self.backbone.layers[0]
        self.norm = first.norm1
        first.norm1 = nn.Identity()

    def forward(
        self,
        features: Tensor,
        slots: Tensor,
        grids: Grids,
        visible: Visible = "none",
        valid: Tensor | None = None,
    ) -> Tensor:
        batch, num_tokens, _ = features.shape
        if visible == "none":
            tokens = self.mask_token.expand(batch, num_tokens, -1)
        else:
            tokens = self.project_tokens(features)
        if visible == "random":
            shown = self._draw_visible(batch, num_tokens, features.device, valid)  # [B, N]
            tokens = torch.where(shown[:, :, None], tokens, self.mask_token)
        queries = self.norm(tokens + self.positions(grids, num_tokens))
        padding = None if valid is None else ~valid
        memory = self.project_slots(slots)
        return torch.as_tensor(self.backbone(queries, memory, tgt_key_padding_mask=padding))

    def _draw_visible(
        self, batch: int, num_tokens: int, device: torch.device, valid: Tensor | None = None
    ) -> Tensor:
        """A random subset of each image's tokens [B, N]; its size is drawn as in training."""
        draw = torch.rand(batch, num_tokens + 2, device=device)
        order = draw[:, :num_tokens]
        count = torch.full((batch,), num_tokens, device=device)
        if valid is not None:
            order, count = order.masked_fill(~valid, 2.0), valid.sum(dim=1)  # padding comes last
        rank = order.argsort(dim=1).argsort(dim=1)
        uniform = (draw[:, num_tokens] * (count - 1)).long()
        fixed = (self.config.prefix_fraction * count.double()).long()
        is_uniform = draw[:, num_tokens + 1] < self.config.prefix_probability
        return rank < torch.where(is_uniform, uniform, fixed)[:, None]


class BroadcastMLPDecoder(Decoder):
    """Every slot paints every position; a softmax over slots mixes them. Light and unmasked.

    Paper: https://arxiv.org/abs/2209.14860 (DINOSAUR), section 3 and appendix: the MLP decoder.

    Args:
        dim: D. slot_dim: C. grid_hw: of the position embedding. config: see `DecoderConfig`.
        num_views: V, most views of an image.
    """

    def __init__(
        self,
        dim: int,
        slot_dim: int,
        grid_hw: tuple[int, int],
        config: DecoderConfig,
        num_views: int = 1,
    ) -> None:
        super().__init__()
        self.positions = PositionEmbedding(slot_dim, grid_hw, num_views)
        widths = [slot_dim] + [config.ffn_dim] * config.num_layers
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], dim + 1))

    def forward(
        self,
        features: Tensor,
        slots: Tensor,
        grids: Grids,
        visible: Visible = "none",
        valid: Tensor | None = None,
    ) -> Tensor:
        """It never sees a token, whatever `visible` says."""
        del visible, valid
        positions = self.positions(grids, features.shape[1])[:, None]
        painted = self.mlp(slots[:, :, None] + positions)  # [B, S, N, D+1]
        values, alpha = painted[..., :-1], painted[..., -1:].softmax(dim=1)
        mixed: Tensor = (values * alpha).sum(dim=1)
        return mixed


_DECODERS: dict[str, Callable[..., Decoder]] = {
    "masked_transformer": MaskedTransformerDecoder,
    "mlp": BroadcastMLPDecoder,
}


def build_decoder(
    config: DecoderConfig, dim: int, slot_dim: int, grid_hw: tuple[int, int], num_views: int = 1
) -> Decoder:
    """The decoder that `config.kind` names."""
    if config.kind not in _DECODERS:
        raise ValueError(f"decoder kind={config.kind!r} is unknown; pass one of {list(_DECODERS)}.")
    return _DECODERS[config.kind](dim, slot_dim, grid_hw, config, num_views)
