"""Pruners that are trained: what they add to the contract of a pruner.

`ocvtp train`, `export`, and the commands that take a `--checkpoint` know a trainable pruner by its
class alone. The class names its network (`ocvtp.learning.PrunerNetwork`) and the objective
(`ocvtp.learning.Objective`) that it is trained for by default. The pruner of a run is found by the
sizes of the network in the settings, that of an artifact by the `format` in its config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from ocvtp.pruners.base import Pruner
from ocvtp.pruners.registry import list_pruners, pruner_class
from ocvtp.shipped import find_folder
from ocvtp.structures import VisualTokens

if TYPE_CHECKING:
    from ocvtp.learning.network import PrunerNetwork

DEFAULT = "ocvtp"
"""The trainable pruner where settings of a run, its checkpoint, or the control `untrained` name
none."""

NetworkT = TypeVar("NetworkT", bound="PrunerNetwork")


@dataclass(kw_only=True, eq=False)
class TrainablePruner(Pruner, Generic[NetworkT]):
    """A pruner around a trained network.

    A subclass names `network_class` and `objective_class`, and in `_select` asks `self.ready`.

    Args:
        checkpoint: folder or hub id of what `ocvtp export` wrote.
        network: one in memory, instead of `checkpoint`.

    Raises:
        ValueError: without a network, with two, and for a checkpoint that cannot be read or is of
            another pruner.
    """

    checkpoint: str | None = None
    network: NetworkT | None = field(default=None, repr=False)

    network_class: ClassVar[Any]
    """A `PrunerNetwork`."""
    objective_class: ClassVar[Any]
    """An `Objective` that is built without arguments."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self._has_one_network:
            kind = self.network_class.__name__
            raise ValueError(
                f"pruner {self.name!r} needs a trained network: pass checkpoint=DIR_OR_HUB_ID"
                " (written by `ocvtp export`) or, in Python, network=a"
                f"{'n' * (kind[0] in 'AEIOU')} {kind}, and not both."
            )
        if self.network is not None and not isinstance(self.network, self.network_class):
            raise ValueError(
                f"network={self.network!r} is no {self.network_class.__name__}; pass one, or"
                " checkpoint=DIR_OR_HUB_ID."
            )
        if self.checkpoint is not None and self.network is None:
            self.network = self._read(self.checkpoint)

    @classmethod
    def takes(cls, config: Mapping[str, Any]) -> bool:
        """Whether it reads an artifact, as far as the settings tell.

        Args:
            config: what config.json holds.
        """
        return bool(config.get("format") == cls.network_class.format)

    @classmethod
    def usual_config(cls, tokens: VisualTokens, layer: int) -> Any:
        """Settings of a network for a model where there is no trained one, e.g. to time one.

        Args:
            tokens: of the model, with `hidden` of the layer and `projected`.
            layer: `default_layer` of its kind of network.
        """
        width = tokens.hidden[layer].shape[2]
        return cls.network_class.default_config(width, layer, tokens.num_tokens)

    @property
    def _has_one_network(self) -> bool:
        """Whether it got one network; `dataclasses.replace` passes a checkpoint and its network."""
        if self.checkpoint is None or self.network is None:
            return (self.checkpoint is None) != (self.network is None)
        return getattr(self.network, "source", None) == self.checkpoint

    def _read(self, checkpoint: str) -> NetworkT:
        try:
            network: NetworkT = self.network_class.from_pretrained(checkpoint)
        except ValueError as error:
            others = readers(checkpoint) if Path(find_folder(checkpoint)).is_dir() else []
            if not others or self.name in others:
                raise
            raise ValueError(
                f"pruner {self.name!r} got checkpoint={checkpoint}, a network of pruner"
                f" {' or '.join(map(repr, others))}; build that, or pass a checkpoint of"
                f" {self.network_class.called}."
            ) from error
        return network

    @property
    def trained(self) -> NetworkT:
        """The network."""
        assert self.network is not None
        return self.network

    def ready(self, tokens: VisualTokens) -> NetworkT:
        """The network in evaluation mode, on the device of the tokens, to which it moves."""
        return self.trained.eval().to(tokens.features.device)


def trainables() -> dict[str, type[TrainablePruner[Any]]]:
    """All that are registered, by name; those with the network of another come last."""
    known = {name: pruner_class(name) for name in list_pruners()}
    found = [(name, cls) for name, cls in known.items() if issubclass(cls, TrainablePruner)]
    return dict(sorted(found, key=lambda pair: "network_class" not in vars(pair[1])))


def of_name(name: str) -> type[TrainablePruner[Any]]:
    """The trainable pruner of a name.

    Raises:
        ValueError: if there is none.
    """
    cls = pruner_class(name)
    if not issubclass(cls, TrainablePruner):
        raise ValueError(
            f"pruner {name!r} has no network to train; pass one of {', '.join(trainables())}."
        )
    return cls


def of_sizes(sizes: Any) -> type[TrainablePruner[Any]]:
    """The pruner whose network has such sizes.

    Args:
        sizes: settings of a network: `sizes_class`, or its whole config; None for the default.

    Raises:
        ValueError: if there is none.
    """
    if sizes is None:
        return of_name(DEFAULT)
    sizes = getattr(sizes, "sizes", sizes)
    for base in type(sizes).__mro__:
        for cls in trainables().values():
            if cls.network_class.sizes_class is base:
                return cls
    raise ValueError(
        f"{type(sizes).__name__} are the sizes of no network of a trainable pruner; register that"
        " pruner (`ocvtp --import FILE train ...`), or pass those of"
        f" {', '.join(cls.network_class.sizes_class.__name__ for cls in trainables().values())}."
    )


def of_format(format: str | None) -> type[TrainablePruner[Any]]:
    """The pruner whose networks have a format; the first of `trainables`, where several do.

    Args:
        format: None for the default, as checkpoints of earlier versions name none.

    Raises:
        ValueError: if there is none.
    """
    if format is None:
        return of_name(DEFAULT)
    for cls in trainables().values():
        if cls.network_class.format == format:
            return cls
    raise ValueError(
        f"format {format!r} is that of no trainable pruner; register its pruner"
        " (`ocvtp --import FILE COMMAND ...`)."
    )


def of_network(network: PrunerNetwork) -> type[TrainablePruner[Any]]:
    """The pruner that takes a network; the first of `trainables`, where several do.

    Raises:
        ValueError: if there is none.
    """
    config = {"format": network.format, **asdict(network.config)}
    for cls in trainables().values():
        if cls.takes(config):
            return cls
    return of_format(network.format)


def readers(checkpoint: str) -> list[str]:
    """Names of the pruners that read an exported network; none where that is unknown.

    Args:
        checkpoint: folder or hub id.
    """
    from ocvtp.learning.artifact import config_of

    config = config_of(checkpoint)
    return [name for name, cls in trainables().items() if cls.takes(config)]
