"""The OC-pruner's network: encode tokens, let slots compete for them, (in training) decode.

C is the slot width.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ocvtp.learning.network import PrunerNetwork
from ocvtp.slots.attention import SlotAttention, slot_winners
from ocvtp.slots.choosing import restore
from ocvtp.slots.config import Choice, NetworkSizes, OCPrunerConfig, check_choice
from ocvtp.slots.decoder import Decoder, Visible, build_decoder
from ocvtp.slots.matching import one_to_one, slot_choices
from ocvtp.slots.positions import Grids
from ocvtp.slots.queries import GaussianQueries
from ocvtp.slots.statistics import FeatureStatistics
from ocvtp.structures import VisualTokens

_LAYER_SHARE = 9 / 24  # the paper's layer of its tower


class OCPruner(
    PrunerNetwork,
    tags=["slot-attention"],
    paper_url="https://arxiv.org/abs/2511.20439",
):
    """The network of "Object-Centric Vision Token Pruning".

    Paper: https://arxiv.org/abs/2511.20439. `save_pretrained`, `from_pretrained` and `push_to_hub`
    are huggingface_hub's; the files are `model.safetensors` and `config.json`.

    Args:
        config: sizes and provenance; None for LLaVA-1.5's.

    Attributes:
        inputs: statistics of the tokens that it reads, with `standardize`.
        targets: statistics of the tokens of `target_layer`.

    Raises:
        ValueError: for a `choice` that is unknown or lacks what it reads.
    """

    format: ClassVar[str] = "ocvtp.oc-pruner"
    called: ClassVar[str] = "an OC-pruner"
    pruner: ClassVar[str] = "ocvtp"
    sizes_class: ClassVar[type[Any]] = NetworkSizes
    compiled: ClassVar[tuple[str, ...]] = ("assign", "decode")
    config: OCPrunerConfig

    def __init__(self, config: OCPrunerConfig | None = None) -> None:
        config = config or OCPrunerConfig()
        super().__init__(config)
        check_choice(config, config.choice)
        self.inputs = FeatureStatistics(config.feature_dim) if config.standardize else None
        has_targets = config.target_layer is not None
        self.targets = FeatureStatistics(config.feature_dim) if has_targets else None
        self.encode = nn.Sequential(
            nn.LayerNorm(config.feature_dim),
            nn.Linear(config.feature_dim, config.hidden_dim),
            nn.GELU(),
            nn.Linear(config.hidden_dim, config.slot_dim),
        )
        for module in self.encode:
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.queries = GaussianQueries(
            config.slot_dim, config.noise_rows, config.noise_seed, config.frozen_queries
        )
        self.attention = SlotAttention(
            config.slot_dim,
            config.ffn_dim,
            config.num_iterations,
            config.dropout,
            config.truncation,
        )
        self.decoder: Decoder | None = None
        if config.decoder is not None:
            self.decoder = build_decoder(
                config.decoder,
                config.feature_dim,
                config.slot_dim,
                config.grid_hw,
                config.num_views,
            )

    def assign(
        self,
        features: Tensor,
        num_slots: int,
        noise: Tensor | None = None,
        *,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let `num_slots` slots compete for the tokens.

        Args:
            features: [B, N, D], `hidden_states[config.layer]` of the tower without the CLS.
            num_slots: S, any number.
            noise: [B or 1, S, C] of the queries; None: fresh in training mode unless they are
                frozen, else the table.
            valid: [B, N] bool, False on padding tokens.

        Returns:
            slots [B, S, C] and attention [B, S, N], a softmax over slots.

        Raises:
            ValueError: if features have another width than the network was built for.
        """
        if features.ndim != 3 or features.shape[2] != self.config.feature_dim:
            raise ValueError(
                f"features have shape {list(features.shape)}; this OC-pruner reads"
                f" [B, N, {self.config.feature_dim}], hidden_states[{self.config.layer}] of"
                f" {self.config.tower}."
            )
        if self.inputs is not None:
            features = self.inputs(features)
        initial = self.queries(features.shape[0], num_slots, noise)
        slots, attention = self.attention(self.encode(features), initial, token_mask=valid)
        return slots, attention

    def decode(
        self,
        features: Tensor,
        slots: Tensor,
        grids: Grids,
        visible: Visible = "none",
        valid: Tensor | None = None,
    ) -> Tensor:
        """Reconstruct the tokens [B, N, D] from slots [B, S, C], see `Decoder.forward`.

        Raises:
            ValueError: without a decoder (artifacts are exported without one by default).
        """
        if self.decoder is None:
            raise ValueError(
                "this OC-pruner has no decoder: it was exported without. Export it again with"
                " `--with-decoder`."
            )
        return torch.as_tensor(self.decoder(features, slots, grids, visible, valid))

    def choose(self, tokens: VisualTokens, attention: Tensor, num: int, choice: Choice) -> Tensor:
        """Tokens [B, num] that slots keep by a choice other than `winners`.

        Args:
            tokens: of which `restore` reads the hidden states of the target layer.
            attention: [B, S, N] of `assign`.
            num: K. choice: `one_to_one` or `restore`.
        """
        if choice != "restore":
            return one_to_one(attention, num, tokens.valid)[1]
        layer = self.config.target_layer
        assert self.targets is not None, "see check_choice"
        assert layer is not None
        with torch.autocast(attention.device.type, enabled=False):
            targets = self.targets(tokens.hidden[layer].float())
            return restore(attention, targets, num, tokens.valid)

    @classmethod
    def build(cls, sizes: NetworkSizes, objective: Any, /, **origin: Any) -> OCPruner:
        """With the decoder, and the statistics of the target layer, if the objective names any."""
        decoder = getattr(objective, "decoder", None)
        target = getattr(objective, "target_layer", None)
        config = OCPrunerConfig(**asdict(sizes), **origin, decoder=decoder, target_layer=target)
        return cls(cls.read_config(asdict(config)))

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> OCPrunerConfig:
        return OCPrunerConfig.from_dict(values)

    def statistics(self) -> list[tuple[int, FeatureStatistics]]:
        """`inputs` and `targets`, where it has them, with their layers."""
        read = (self.config.layer, self.inputs), (self.config.target_layer, self.targets)
        return [
            (layer, statistics)
            for layer, statistics in read
            if layer is not None and statistics is not None
        ]

    def kept(self, tokens: VisualTokens, masks: Tensor | None, num_keep: int) -> Tensor:
        """The slots' own tokens, without those that fill up."""
        del num_keep
        assert masks is not None, "both objectives return the slots' attention"
        if self.config.choice != "winners":
            return slot_choices(masks, tokens.valid)
        return slot_winners(masks)

    @classmethod
    def default_layer(cls, num_blocks: int) -> int:
        """The layer that the paper reads, in a tower of another depth."""
        return max(1, round(_LAYER_SHARE * num_blocks))

    @classmethod
    def default_config(cls, feature_dim: int, layer: int, num_tokens: int = 0) -> OCPrunerConfig:
        """The paper's sizes, with query noise for every token."""
        config = OCPrunerConfig(feature_dim=feature_dim, layer=layer, tower=None)
        return replace(config, noise_rows=max(config.noise_rows, num_tokens))

    @classmethod
    def untrained_configs(cls, config: OCPrunerConfig) -> dict[str, OCPrunerConfig]:
        """For raw tokens; and for standardised ones if the network reads these."""
        config = replace(config, decoder=None)
        found = {"": replace(config, standardize=False)}
        if config.standardize:
            found["standardize=true"] = config
        return found

    @classmethod
    def untrained(cls, config: OCPrunerConfig, seed: int, like: OCPruner | None = None) -> OCPruner:
        """The seed is also that of the query noise."""
        return super().untrained(replace(config, noise_seed=seed), seed, like)

    def for_inference(self) -> OCPruner:
        return self.without_decoder()

    def without_decoder(self) -> OCPruner:
        """A copy that only assigns: what an artifact holds by default."""
        copy = OCPruner(replace(self.config, decoder=None))
        weights = {k: v for k, v in self.state_dict().items() if not k.startswith("decoder.")}
        copy.load_state_dict(weights)
        return copy.train(self.training)
