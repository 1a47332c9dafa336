"""The network of a trainable pruner: its settings, how it is built, saved and read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from torch import Tensor, nn

from ocvtp.field_types import PROVENANCE_RANGES, Ranges, checked, read_fields
from ocvtp.learning import artifact
from ocvtp.learning.card import CARD_NAME, WRITTEN, About, model_card
from ocvtp.structures import Layout, Needs, VisualTokens


class Sizes:
    """What may be chosen about a network, for any tower: `model.network` of `ocvtp train`.

    A subclass is a frozen dataclass of numbers, texts, booleans and lists of these, with defaults.
    Its `ranges` say what numbers may be, see `ocvtp.field_types`; what an artifact holds is held to
    them.
    """


SizesT = TypeVar("SizesT", bound=Sizes)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(Generic[SizesT]):
    """Sizes of a network, what tokens it was made for, and the run that trained it.

    Args:
        sizes: those that were chosen.
        feature_dim: D.
        layer: it reads `hidden_states[layer]` of the tower.
        tower: the one whose tokens it reads: a hub id, or a description.
        grid_hw: token grid that it was trained on. It runs on any other.
        layout: how images became tokens in training; see `ocvtp.structures.Layout`.
        preprocessing: settings of the image processor in training.
        num_slots: the budgets K that it was trained with.
        objective: the one that it was trained for.
        training: summary of the run: steps, images, losses, versions.
    """

    ranges: ClassVar[Ranges] = PROVENANCE_RANGES

    sizes: SizesT
    feature_dim: int
    layer: int
    tower: str | None = None
    grid_hw: tuple[int, int] = (24, 24)
    layout: Layout = "grid"
    preprocessing: dict[str, Any] = field(default_factory=dict)
    num_slots: tuple[int, ...] = ()
    objective: str = ""
    training: dict[str, Any] = field(default_factory=dict)


class PrunerNetwork(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="ocvtp",
    tags=["visual-token-pruning"],
):
    """A network that learns which tokens to keep.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are huggingface_hub's; the files are
    `model.safetensors` and `config.json`. A subclass names `format` and `sizes_class`, builds its
    layers in `__init__(self, config)`, and has all methods that its pruner and its objective call.

    Args:
        config: sizes and provenance.

    Attributes:
        source: folder or hub id that it was read from; None for one that was built.
    """

    format: ClassVar[str]
    """Names the kind of network in config.json; the pruner of an artifact is found by it."""
    called: ClassVar[str]
    """What messages call it; by default `a` and the name of the class."""
    sizes_class: ClassVar[type[Any]]
    """Its `Sizes`."""
    compiled: ClassVar[tuple[str, ...]] = ("forward",)
    """Methods that an objective calls, which `ocvtp train --compile` compiles."""
    pruner: ClassVar[str] = ""
    """Name of the pruner that it is of, for its model card; an export knows it anyway."""
    config: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "called" not in vars(cls):
            cls.called = with_article(cls.__name__)

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.source: str | None = None

    @classmethod
    def needs(cls, sizes: Any, layer: int) -> Needs:
        """What it reads of the tower: `hidden_states[layer]`, for most."""
        del sizes
        return Needs(hidden=(layer,))

    @classmethod
    def build(cls, sizes: Any, objective: Any, /, **origin: Any) -> Self:
        """A network to be trained.

        Args:
            sizes: of `sizes_class`.
            objective: what it will be trained for, see `ocvtp.learning.Objective`.
            origin: all fields of `NetworkConfig` but `sizes` and `training`.
        """
        del objective
        return cls(NetworkConfig(sizes=sizes, **origin))

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> Any:
        """The config that `asdict` (or config.json) wrote.

        Raises:
            ValueError: for unknown names, and values of another type or out of their range; see
                `ocvtp.field_types.read_fields`.
        """
        sizes = checked("sizes", values.get("sizes"), cls.sizes_class)
        return read_fields(NetworkConfig, {**values, "sizes": sizes})

    @classmethod
    def default_layer(cls, num_blocks: int) -> int:
        """The layer of `hidden_states` to read by default: that of most hosts."""
        return max(1, num_blocks - 1)

    @classmethod
    def default_config(cls, feature_dim: int, layer: int, num_tokens: int = 0) -> Any:
        """Settings for a tower where there is no trained network, e.g. to time one.

        Args:
            feature_dim: D.
            layer: the one that it reads.
            num_tokens: N, or the most of any image.
        """
        del num_tokens
        return NetworkConfig(sizes=cls.sizes_class(), feature_dim=feature_dim, layer=layer)

    @classmethod
    def untrained_configs(cls, config: Any) -> dict[str, Any]:
        """The untrained controls of a trained network with these settings.

        Returns:
            settings of each, by the word that tells it from the others: empty for the plain one.
        """
        return {"": config}

    @classmethod
    def untrained(cls, config: Any, seed: int, like: Self | None = None) -> Self:
        """A network before its training; global random numbers are left alone.

        Args:
            config: its settings.
            seed: of its weights.
            like: a trained one of the same sizes, whose statistics of the data it takes over.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = cls(config).eval()
        measured = {} if like is None else dict(like.statistics())
        for layer, own in network.statistics():
            if layer in measured:
                own.load_state_dict(measured[layer].state_dict())
        return network

    def for_inference(self) -> Self:
        """What an artifact holds by default: itself, or a copy without what only trains it."""
        return self

    def statistics(self) -> list[tuple[int, Any]]:
        """What is measured on training images before the first step, unless it is known.

        Returns:
            numbers of `hidden_states` that it reads, each with a module of its own, an
            `ocvtp.slots.statistics.FeatureStatistics`.
        """
        return []

    def kept(self, tokens: VisualTokens, masks: Tensor | None, num_keep: int) -> Tensor | None:
        """The tokens that it chooses by itself, for figures of the validation.

        Args:
            tokens: of validation images.
            masks: [B, S, N] that the objective returned for them (`Outcome.attention`).
            num_keep: K.

        Returns:
            [B, N] bool, at most K True in a row; None where it cannot tell.
        """
        del tokens, masks, num_keep
        return None

    def describe(self) -> str:
        """What it reads, in a few words."""
        return f"hidden_states[{self.config.layer}] of {self.config.tower}"

    def _save_pretrained(self, save_directory: Path) -> None:
        artifact.write(save_directory, self.state_dict(), asdict(self.config), self.format)
        card = save_directory / CARD_NAME
        if card.is_file() and WRITTEN in card.read_text(encoding="utf-8", errors="replace"):
            card.unlink()  # it is of other weights, and is written after this

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card, from its config.

        Args:
            args: none. kwargs: fields of `ocvtp.learning.card.About`.
        """
        del args
        info = self._hub_mixin_info
        about = {"pruner": self.pruner, "paper": info.paper_url, **kwargs}
        about.setdefault("weights", sha256(artifact.weights_file(self.state_dict())).hexdigest())
        about.setdefault("parameters", sum(p.numel() for p in self.parameters()))
        header = {"format": self.format, "format_version": artifact.FORMAT_VERSION}
        tags = info.model_card_data.tags or ()
        return ModelCard(model_card(header | asdict(self.config), About(**about), tags))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str = "cpu", **hub: Any
    ) -> Self:
        """Read an exported network, in evaluation mode.

        Args:
            pretrained_model_name_or_path: a folder, or a model id of the hub.
            map_location: device of the weights.
            hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            ValueError: if the files are missing, damaged, of another kind or a newer format.
        """
        source = pretrained_model_name_or_path
        values, weights = artifact.read(source, cls.format, cls.called, map_location, **hub)
        with artifact.explained(f"{source} does not hold {cls.called}"):
            network = artifact.restore(partial(cls, cls.read_config(values)), weights)
        network.source = str(source)
        return network.to(map_location).eval()


def with_article(name: str) -> str:
    """`an OCPruner`, `a LinearScorer`."""
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"
