"""What a network is trained for, apart from the network and from the loop.

An objective names the tokens it reads (`needs`, of the training encoder) and turns one batch into a
loss.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from ocvtp.learning.network import PrunerNetwork
from ocvtp.structures import Needs, VisualTokens

NetworkT = TypeVar("NetworkT", bound=PrunerNetwork)


@dataclass(frozen=True)
class Outcome:
    """What an objective returns.

    Args:
        loss: scalar.
        slots: [B, S, C], of networks that make any.
        attention: [B, S, N] soft masks of the parts of an image, of networks that make any: the
            validation draws them and compares them with annotated objects.
        logs: scalars to plot.
    """

    loss: Tensor
    slots: Tensor | None = None
    attention: Tensor | None = None
    logs: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC, Generic[NetworkT]):
    """How one batch of visual tokens becomes a loss. Holds settings, never parameters.

    Parameters that only training needs live in the network, which leaves them out of its artifact
    (`PrunerNetwork.for_inference`).
    """

    name: ClassVar[str]
    trains: ClassVar[type[PrunerNetwork]] = PrunerNetwork
    """The networks that it can train, e.g. its `NetworkT`."""
    reads_objects: bool = False
    """Whether it is told which tokens show annotated objects; training data must have masks."""

    def check(self, sizes: Any) -> None:
        """Refuse sizes that this objective cannot train.

        Args:
            sizes: `sizes_class` of a network of `trains`.

        Raises:
            ValueError: names what to set.
        """
        del sizes

    def needs(self, layer: int) -> Needs:
        """What the encoder must supply, for a network that reads `hidden_states[layer]`."""
        return Needs(hidden=(layer,))

    def compile_steps(self, backend: str) -> None:
        """Compile what it runs many times in a training step; most have no such thing.

        Args:
            backend: of `torch.compile`.
        """
        del backend

    @abstractmethod
    def __call__(
        self,
        network: NetworkT,
        tokens: VisualTokens,
        num_keep: int,
        objects: Tensor | None = None,
    ) -> Outcome:
        """The loss of one batch.

        Args:
            network: in training mode it may draw random numbers; else all is deterministic.
            tokens: what the network's `needs` and this one's asked for.
            num_keep: K, the budget of this step.
            objects: [B, N] how much of each token's patch shows annotated objects, 0..1; for
                objectives that read it.
        """
