"""Sizes and provenance of an OC-pruner, and the ways in which its slots may choose tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from ocvtp.field_types import LAYERS, PROVENANCE_RANGES, Ranges, read_fields
from ocvtp.slots.attention import Truncation
from ocvtp.slots.decoder import DecoderConfig
from ocvtp.structures import Layout

Choice = Literal["winners", "one_to_one", "restore"]
"""How slots choose tokens. `winners`: each the one that it attends to most, so that some share a
token and the pruner fills up. The others keep K at any time: `one_to_one` greedily, the largest
share first, see `ocvtp.slots.matching`; `restore` those from which the tokens with a large share
can be restored, see `restore`."""
CHOICES: tuple[Choice, ...] = ("winners", "one_to_one", "restore")
_WIDTH = (1, 2**20)


@dataclass(frozen=True)
class NetworkSizes:
    """Sizes that may be chosen for any tower; the defaults are the paper's.

    Args:
        hidden_dim: of the encoding MLP. slot_dim: C. ffn_dim: of Slot Attention.
        num_iterations: of Slot Attention. dropout: in its feed-forward network.
        truncation: of the gradient of Slot Attention.
        noise_rows: rows of the saved table of query noise. noise_seed: its seed.
        frozen_queries: whether the table is the noise in training too; paper: no.
        standardize: whether the tokens are read at mean 0 and scale 1 per feature, by statistics of
            the training images that are saved with the weights; paper: no.
        choice: how slots choose tokens, see `ocvtp.slots.config.Choice`; paper: `winners`.
    """

    ranges: ClassVar[Ranges] = {
        **{"hidden_dim": _WIDTH, "slot_dim": _WIDTH, "ffn_dim": _WIDTH, "dropout": (0, 1)},
        **{"num_iterations": (1, 100), "noise_rows": (0, 2**20), "noise_seed": (0, 2**32 - 1)},
    }

    hidden_dim: int = 2048
    slot_dim: int = 512
    ffn_dim: int = 2048
    num_iterations: int = 3
    dropout: float = 0.01
    truncation: Truncation = "bilevel"
    noise_rows: int = 1024
    noise_seed: int = 0
    frozen_queries: bool = False
    standardize: bool = False
    choice: Choice = "winners"


@dataclass(frozen=True)
class OCPrunerConfig(NetworkSizes):
    """Sizes, provenance and training summary of an OC-pruner; the defaults are LLaVA-1.5's.

    Args:
        feature_dim: D.
        grid_hw: token grid that it was trained on; of a view where images have several, of the
            decoder's stored positions where grids vary. It runs on any other.
        layout: how images became tokens in training; see `ocvtp.structures.Layout`.
        decoder: None without one.
        tower: vision tower whose tokens it reads: a hub id, or a description.
        layer: it reads `hidden_states[layer]` of the tower.
        preprocessing: settings of the image processor that it was trained with.
        num_slots: slot counts that it was trained with.
        objective: the one that it was trained for.
        target_layer: the layer of the tower whose tokens that objective restores, if it is another;
            the artifact then holds their statistics.
        training: summary of the run: steps, images, losses, versions.
    """

    ranges: ClassVar[Ranges] = {**PROVENANCE_RANGES, "target_layer": LAYERS}

    feature_dim: int = 1024
    grid_hw: tuple[int, int] = (24, 24)
    layout: Layout = "grid"
    decoder: DecoderConfig | None = None
    tower: str | None = "openai/clip-vit-large-patch14-336"
    layer: int = 9
    preprocessing: dict[str, Any] = field(default_factory=dict)
    num_slots: tuple[int, ...] = (16, 32, 64, 128)
    objective: str = "slots"
    target_layer: int | None = None
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def num_views(self) -> int:
        """Most views of an image whose tokens share the slots."""
        return 2 if self.layout == "joint" else 1

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OCPrunerConfig:
        """Read what `asdict` (or config.json) wrote.

        Raises:
            ValueError: for unknown names, and values of another type or out of their range.
        """
        return read_fields(cls, values)


def layers_read(config: OCPrunerConfig, choice: Choice) -> tuple[int, ...]:
    """The tower's layers that the network and a choice read."""
    if choice != "restore" or config.target_layer is None:
        return (config.layer,)
    return tuple({config.layer: 0, config.target_layer: 0})


def check_choice(config: OCPrunerConfig, choice: Choice) -> None:
    """Refuse what is unknown or lacks what it reads.

    Raises:
        ValueError: for an unknown choice; for `restore` without statistics of a target layer.
    """
    if choice not in CHOICES:
        raise ValueError(f"choice={choice!r}; pass one of {', '.join(CHOICES)}.")
    if choice == "restore" and config.target_layer is None:
        raise ValueError(
            "choice='restore' restores the tokens of a target layer, and this OC-pruner has none;"
            " train it with the objective `kept`, or set choice to one_to_one."
        )
