"""The network of a learned selector: a scorer, what it was trained by, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

from ocvtp.choices import Positions
from ocvtp.field_types import LAYERS, PROVENANCE_RANGES, Ranges, of_fields, read_fields
from ocvtp.learning import artifact
from ocvtp.learning.network import PrunerNetwork
from ocvtp.selectors.budgets import NumKeep, check_budgets
from ocvtp.selectors.choices import parse_choice
from ocvtp.selectors.scorer import Scorer, Scores, Widths, build_scorer, scorer_class
from ocvtp.selectors.scorers.slots import OC_PRUNER, read_oc_pruner
from ocvtp.structures import Layout, Needs, VisualTokens

SelectorStage = Literal["llm_input", "llm_layers"]


@dataclass(frozen=True, kw_only=True)
class SelectorConfig:
    """Sizes of a scorer, what it reads, and how it was trained, in plain types.

    Args:
        scorer: its name in the registry.
        sizes: its fields.
        widths: of what it reads; a mapping of them is read too.
        stage: where its tokens are dropped: `llm_input` or `llm_layers`.
        layer: of the language model, before which they are, at stage `llm_layers`.
        choice: how tokens are chosen by score, see `ocvtp.selectors.choices.parse_choice`.
        positions: of the tokens that are left, in training's or in numbers of their own.
        relaxation: that scores went through in training: name and arguments.
        gate: how the language model was shown them: name and arguments.
        losses: by name, their arguments.
        host: the model that it was trained in: `model_type`, `width`, `num_layers`, `tower`,
            `content_hash`, as far as they are known.
        num_slots: the budgets that it was trained with, counts and shares.
        objective: name of the recipe.
        tower: vision tower of the host: a hub id, or a description.
        grid_hw: token grid that it was trained on. It runs on any other.
        layout: how images became tokens in training; see `ocvtp.structures.Layout`.
        preprocessing: settings of the image processor in training.
        training: summary of the run: steps, images, losses, versions.

    Raises:
        ValueError: for a stage or positions that there are not, a layer that does not go with
            the stage, and an unknown choice.
    """

    ranges: ClassVar[Ranges] = {
        **PROVENANCE_RANGES,
        "layer": (0, LAYERS[1]),
        "num_slots": (0, 2**20),
    }

    scorer: str
    sizes: dict[str, Any] = field(default_factory=dict)
    widths: Widths
    stage: SelectorStage = "llm_input"
    layer: int | None = None
    choice: str | dict[str, Any] = "topk"
    positions: Positions = "contiguous"
    relaxation: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)
    num_slots: tuple[int | float, ...] = ()
    objective: str = ""
    tower: str | None = None
    grid_hw: tuple[int, int] = (24, 24)
    layout: Layout = "grid"
    preprocessing: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kinds in (("stage", SelectorStage), ("positions", Positions)):
            if getattr(self, name) not in get_args(kinds):
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; pass one of {', '.join(get_args(kinds))}."
                )
        if (self.stage == "llm_layers") != (self.layer is not None):
            raise ValueError(
                f"stage={self.stage!r}, layer={self.layer}; pass a layer with the stage llm_layers,"
                " and with no other."
            )
        if isinstance(self.widths, Mapping):
            object.__setattr__(self, "widths", Widths(**self.widths))
        object.__setattr__(self, "grid_hw", tuple(int(v) for v in self.grid_hw))
        budgets = check_budgets("num_slots", self.num_slots) if self.num_slots else ()
        object.__setattr__(self, "num_slots", tuple(budgets))
        object.__setattr__(self, "choice", parse_choice(self.choice).describe())

    @property
    def feature_dim(self) -> int:
        """D."""
        return self.widths.tower


class SelectorNetwork(PrunerNetwork):
    """A scorer in an artifact.

    Args:
        config: its sizes and provenance.

    Attributes:
        scorer: the scorer.

    Raises:
        ValueError: for an unknown scorer, and sizes that it refuses.
    """

    format: ClassVar[str] = "ocvtp.pruner"
    called: ClassVar[str] = "a learned selector"
    sizes_class: ClassVar[type[Any]] = Scorer
    config: SelectorConfig

    def __init__(self, config: SelectorConfig) -> None:
        scorer = build_scorer(config.scorer, config.sizes, config.widths)
        if scorer.needs.column is not None and config.stage != "llm_layers":
            raise ValueError(
                f"scorer {config.scorer!r} reads a column of its own after the prompt, which there"
                " is not before the language model; pass the stage llm_layers and a layer."
            )
        super().__init__(replace(config, sizes=scorer.sizes()))  # those of its defaults too
        self.scorer = scorer

    def forward(self, tokens: VisualTokens, num_keep: NumKeep | None = None) -> Scores:
        """Scores [B, N] of the tokens of B images.

        Args:
            tokens: with everything that `scorer.needs` names.
            num_keep: K, for scorers that are told the budget, or [B].

        Raises:
            ValueError: for tokens of another width than it was trained on, without what it reads,
                and for a scorer whose scores have another shape.
        """
        if missing := tokens.missing(self.scorer.needs):
            raise ValueError(
                f"scorer {self.config.scorer!r} reads {', '.join(missing)}, which the given visual"
                " tokens do not hold; put it there, or pass it through a host that supplies it."
            )
        self._check_widths(tokens)
        scores: Scores = self.scorer(tokens, num_keep)
        wanted = tokens.features.shape[:2]
        if scores.values.shape != wanted:
            raise ValueError(
                f"scorer {self.config.scorer!r} gave scores of shape {list(scores.values.shape)};"
                f" return [B, N], here {list(wanted)}."
            )
        return scores

    def _check_widths(self, tokens: VisualTokens) -> None:
        needs, widths = self.scorer.needs, self.config.widths
        read = {f"hidden[{layer}]": (tokens.hidden[layer], widths.tower) for layer in needs.hidden}
        if needs.projected:
            assert tokens.projected is not None
            read["projected"] = tokens.projected, widths.projected
        if needs.text:
            assert tokens.text is not None
            read["text"] = tokens.text, widths.projected
        for name, (values, width) in read.items():
            if values.shape[2] != width:
                raise ValueError(
                    f"{name} is {values.shape[2]} wide, and this selector was trained on a width of"
                    f" {width}{self._host()}; pass a checkpoint that was trained in this model."
                )

    def _host(self) -> str:
        known = self.config.host.get("model_type"), self.config.tower
        said = " on ".join(str(value) for value in known if value)
        return f" ({said})" if said else ""

    @classmethod
    def needs(cls, sizes: Scorer, layer: int) -> Needs:
        """What the scorer reads."""
        del layer
        return sizes.needs

    @classmethod
    def build(cls, sizes: Scorer, objective: Any, /, **origin: Any) -> Self:
        """A network to be trained.

        Args:
            sizes: a scorer, whose layers need not be there.
            objective: not read.
            origin: all other fields of `SelectorConfig` but `training`.
        """
        del objective
        return cls(SelectorConfig(scorer=sizes.name, sizes=sizes.sizes(), **origin))

    @classmethod
    def read_config(cls, values: dict[str, Any]) -> SelectorConfig:
        """The config that `asdict` (or config.json) wrote.

        Raises:
            ValueError: for unknown names, and values of another type or out of their range.
        """
        config = read_fields(SelectorConfig, values)
        of_fields(scorer_class(config.scorer), config.sizes)
        return config

    @classmethod
    def default_config(cls, feature_dim: int, layer: int, num_tokens: int = 0) -> SelectorConfig:
        """The smallest reader of projected tokens, which are taken to be as wide as the tower's."""
        del layer, num_tokens
        widths = Widths(projected=feature_dim, tower=feature_dim)
        return SelectorConfig(scorer="pointwise", widths=widths)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, map_location: str = "cpu", **hub: Any
    ) -> Self:
        """Read an exported network, in evaluation mode; an OC-pruner as the scorer `slots`.

        See `PrunerNetwork.from_pretrained`.
        """
        source, place = pretrained_model_name_or_path, {"map_location": map_location}
        if artifact.config_of(source, **hub).get("format") != OC_PRUNER:
            return super().from_pretrained(source, **place, **hub)
        settings, weights = read_oc_pruner(source, **place, **hub)
        network = cls(cls.read_config(settings))
        network.scorer.load_state_dict(weights)
        network.source = str(source)
        return network.to(map_location).eval()

    def describe(self) -> str:
        config = self.config
        where = "the language model" if config.layer is None else f"layer {config.layer}"
        return f"scorer {config.scorer!r} before {where} of {config.tower}"

    def statistics(self) -> list[tuple[Any, Any]]:
        """Those of the scorer, see `Scorer.statistics`."""
        return self.scorer.statistics()
