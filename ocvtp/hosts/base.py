"""The contract of a host: what a vision-language model must tell about itself.

R are the rows that the language model reads of all images of a call.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from ocvtp.choices import Separators, TileBudget
from ocvtp.hosts.lazy_projection import Rows
from ocvtp.pruners import Pruner
from ocvtp.structures import Needs, Selection, Stage, VisualTokens
from ocvtp.towers import taps
from ocvtp.towers.hooks import Hook, Removable, put
from ocvtp.towers.module_state import is_compiled


@dataclass(frozen=True)
class Savings:
    """Work that changes no result; each kind can be switched on or off.

    Where a host or a pruner leaves nothing to save, a setting has no effect: `Handle.savings` tells
    which have one. Hooks of your own on modules that do not run see what these were given (the
    tower) or zeros (the projector); compiled modules always run.

    Args:
        cut_tower: blocks of the vision tower after the last one that anyone reads do not run, nor
            does what follows them (a norm, a pooling head). Results are the same bit for bit.
        project_kept: the projector runs on the tokens that are kept, not on all, unless the pruner
            reads projected tokens. A smaller matrix product may round its last bits in another way;
            where all tokens are kept it is the same product.
        compile_select: `torch.compile` makes one graph of how the pruner before the language
            model chooses, on a GPU with CUDA graphs. It takes a while at the first call, and for
            other shapes.

    Raises:
        ValueError: for values other than True and False.
    """

    cut_tower: bool = True
    project_kept: bool = True
    compile_select: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(value := getattr(self, field.name), bool):
                raise ValueError(f"{field.name}={value!r}; pass True or False.")


@dataclass(frozen=True)
class Tiling:
    """How to prune images that a model cuts into tiles; to other models it means nothing.

    Args:
        budget: `per_image` shows pruners the tokens of all tiles as one image; `per_tile` shows
            them every tile as an image of its own, so that each keeps `num_keep` tokens.
        separators: which tokens that end the rows of an image stay: of `rows` that kept a token,
            `all`, or `none`. They do not count as visual tokens.

    Raises:
        ValueError: for other values.
    """

    budget: TileBudget = "per_image"
    separators: Separators = "rows"

    def __post_init__(self) -> None:
        for name, allowed in (("budget", TileBudget), ("separators", Separators)):
            if (value := getattr(self, name)) not in get_args(allowed):
                choices = ", ".join(map(repr, get_args(allowed)))
                raise ValueError(f"{name}={value!r}; pass one of {choices}.")


@dataclass(frozen=True)
class Encoded:
    """The images of one call.

    Args:
        tokens: [I, N, ...], what pruners see; I counts tiles where each is shown on its own.
        embeddings: [R, D'], what the language model would read, image after image.
        starts: [I] number of each image's first row among the R, that of the whole image for
            tiles; None where all have equally many.
        deepstack: [E, I, N, D'], what the language model would add to its hidden states after
            each of its first E layers; None where it adds nothing.
        num_given: [I] tokens of each image before any was dropped in the tower; None if none was.
        output: of the model's own `get_image_features`, see `tower_output.known`.
    """

    tokens: VisualTokens
    embeddings: Rows
    starts: Tensor | None = None
    deepstack: Tensor | None = None
    num_given: Tensor | None = None
    output: Any = None

    def counts(self) -> Tensor:
        """[I] visual tokens of each image, before any was dropped."""
        return self.tokens.real.sum(dim=1) if self.num_given is None else self.num_given

    def first_rows(self, device: torch.device) -> Tensor:
        """[I] `starts`; computed where all images have equally many rows."""
        if self.starts is not None:
            return self.starts.to(device)
        images = self.tokens.batch_size
        return torch.arange(images, device=device) * (len(self.embeddings) // images)


@dataclass(frozen=True)
class Kept:
    """What the language model reads after pruning.

    Args:
        positions: [R'] ascending row numbers among the R that it would have read.
        embeddings: [R', D'].
        deepstack: [E, R', D'], see `Encoded`.
    """

    positions: Tensor
    embeddings: Tensor
    deepstack: Tensor | None = None


@dataclass(frozen=True)
class Tiny:
    """A model of a family with random weights, for tests and for `random:tiny-NAME`.

    Args:
        make: tokenizer -> the model, in evaluation mode, and its processor around the tokenizer.
            Hosts are imported without transformers: it imports what it needs when it is called.
        special_tokens: of the tokenizer, by their names, besides those that end and pad texts.
    """

    make: Callable[[Any], tuple[Any, Any]]
    special_tokens: Mapping[str, str]


class Host(ABC):
    """Adapter of one model family. Holds no state of a call.

    Args:
        model: the transformers `...ForConditionalGeneration`.
        tiling: how to prune images in tiles.
        savings: what to leave out; see `savings_for`.
    """

    name: ClassVar[str]
    """What `register_host` calls its family."""
    tiny: ClassVar[Tiny | None] = None
    """The model of random weights that `random:tiny-NAME` stands for."""
    model_types: ClassVar[tuple[str, ...]]
    """Values of `config.model_type` that it serves."""
    image_keys: ClassVar[tuple[str, ...]]
    """Arguments of forward() that belong to the images."""
    stages: ClassVar[tuple[Stage, ...]] = ("llm_input", "llm_layers")
    """Pruner stages that it can serve."""
    plain_positions_tell: ClassVar[bool] = True
    """Whether position_ids [B, L] tell packed samples apart, where there is no mask."""
    features_are_projected: ClassVar[bool] = False
    """Whether pruners see as `features` what the projector makes, in place of what it reads."""
    counts_operations: ClassVar[bool] = False
    """Whether `ocvtp flops` counts its models; a test compares the count with torch's."""

    def __init__(
        self, model: Any, tiling: Tiling | None = None, savings: Savings | None = None
    ) -> None:
        self.model = model
        self.tiling = Tiling() if tiling is None else tiling
        self.savings = Savings() if savings is None else savings

    @property
    @abstractmethod
    def tower(self) -> nn.Module:
        """The vision tower; a CLIP's of transformers, if `check` allows the need `clip`."""

    @property
    def language_model(self) -> Any:
        """The language model, its `layers` in order."""
        return self.model.model.language_model

    @abstractmethod
    def tower_parts(self) -> taps.Tower:
        """Where things are in the vision tower, as it is now; its blocks have an `mlp`."""

    @property
    def num_tower_blocks(self) -> int:
        """Blocks of the vision tower."""
        return len(self.tower_parts().blocks)

    @property
    @abstractmethod
    def projectors(self) -> Sequence[nn.Module]:
        """Modules that turn what the tower gives into rows of the language model."""

    @property
    def num_prefix(self) -> int:
        """Tokens of the tower before the patches: its CLS, then its registers."""
        return 0

    @property
    def num_registers(self) -> int:
        """How many of these are registers: the language model reads them, pruners do not."""
        return 0

    @property
    def unit_side(self) -> int:
        """Patches along the side of a visual token."""
        return 1

    @property
    def grid_hw(self) -> tuple[int, int] | None:
        """Tokens of every image, or of every tile of one; None where images have any shape."""
        return None

    def segments(self, block: int, grid_hw: tuple[int, int]) -> list[int]:
        """Patches of the parts of an image that attend inside themselves, in a block of the tower.

        Args:
            block: its number. grid_hw: rows and columns of the image's tokens.
        """
        del block
        return [grid_hw[0] * grid_hw[1] * self.unit_side**2]

    def layers_read(self, images: dict[str, Any]) -> list[int]:
        """Layers of `hidden_states` that go to the projector, side by side; see `encode`."""
        del images
        return [self.num_tower_blocks]

    @property
    def image_tokens(self) -> int | None:
        """Visual tokens of every image; None where images differ."""
        return None

    @property
    def usual_tokens(self) -> int | None:
        """Visual tokens of an image where nobody says its size, to count operations."""
        return self.image_tokens

    @property
    def num_deepstack_layers(self) -> int:
        """Layers of the language model, the first ones, that add rows of the tower."""
        return 0

    @property
    def image_token_id(self) -> int:
        """The placeholder in `input_ids`."""
        return int(self.model.config.image_token_id)

    @abstractmethod
    def check(self, needs: Needs) -> None:
        """Refuse what cannot be supplied.

        Raises:
            ValueError: that names the alternative.
        """

    @property
    def hook_settings(self) -> Any:
        """What of the model's configuration decides where `hooks` go."""
        return None

    @abstractmethod
    def hooks(self, needs: Needs) -> list[Hook]:
        """Inert hooks where `needs` looks, and where there is something to save."""

    def install(self, needs: Needs) -> list[Removable]:
        """Put these into the model."""
        return put(self.hooks(needs))

    def savings_for(self, needs: Needs) -> Savings:
        """Which of `savings` leave out anything for a pruner of these needs."""
        del needs
        return replace(self.savings, cut_tower=False, project_kept=False)

    def set_stages(self, parts: Sequence[Pruner], needs: Needs, processor: Any = None) -> None:
        """Let pruners act before and inside the tower from `install` on.

        Args:
            parts: those of stages `pixels` and `encoder`, none for hosts that serve neither.
            needs: of what reads the tower after them. processor: of the model, None if not given.

        Raises:
            ValueError: if they do not fit the model or each other.
        """
        del needs, processor
        assert not parts, self.stages

    @abstractmethod
    def encode(self, images: dict[str, Any], needs: Needs) -> Encoded:
        """Run the host's own image encoding, with the hooks of `install` in place.

        Args:
            images: the arguments that `image_keys` names.
            needs: as given to `install`.
        """

    def by_image(self, encoded: Encoded, slots: Tensor) -> Encoded:
        """Put together the parts of each image, for hosts whose images only the prompt tells apart.

        Args:
            encoded: as `encode` returns it.
            slots: [R, 2] row and column of the placeholder of every row of `encoded.embeddings`.

        Returns:
            the same tokens as images; what `encode` returns, for all other hosts.
        """
        del slots
        return encoded

    @abstractmethod
    def apply(self, encoded: Encoded, selection: Selection) -> Kept:
        """Keep what was selected."""

    def tokens_of_rows(self, encoded: Encoded) -> Tensor:
        """[R] which token of its image every row is, -1 for rows that are none (separators)."""
        starts = encoded.first_rows(encoded.embeddings.device).unique()
        rows = torch.arange(len(encoded.embeddings), device=starts.device)
        return rows - starts[torch.searchsorted(starts, rows, right=True) - 1]

    def lines(self, encoded: Encoded) -> Tensor | None:
        """[R] the line of its image that every row is in or ends, where a line's end goes with it.

        A row that ends a line (a newline) stays as long as any token of the line does. Lines are
        counted over all images; -1 for rows that are in none. None where no rows are such ends.
        """
        del encoded
        return None

    def grids(self, encoded: Encoded) -> tuple[tuple[int, int], ...]:
        """The grids that the tokens of the first image form, one after the other, to draw them."""
        return (encoded.tokens.grid_hw,)

    def cells(self, encoded: Encoded) -> Tensor:
        """[I, N] the cell of every token among those of `grids`, -1 for tokens of other images."""
        tokens = encoded.tokens
        cells = torch.full((tokens.batch_size, tokens.num_tokens), -1)
        count = sum(rows * columns for rows, columns in self.grids(encoded))
        cells[0, :count] = torch.arange(count)
        return cells

    def picture(self, images: dict[str, Any]) -> Tensor:
        """[3, H, W] the first image of a call as the tower saw it; put together, if it is tiles."""
        pixels: Tensor = images["pixel_values"].flatten(0, -4)[0]
        return pixels

    def rope_positions(self, inputs: dict[str, Any], images: dict[str, Any]) -> Tensor | None:
        """The coordinates of a whole prompt, for hosts that turn tokens in several dimensions.

        Args:
            inputs: what the processor returned. images: those of it that `image_keys` names.

        Returns:
            [C, B, L] of C dimensions; None where positions are plain numbers of columns.
        """
        del inputs, images
        return None

    def set_rope_deltas(self, deltas: Tensor | None) -> None:
        """Tell a model that keeps them how far coordinates run ahead of columns, [B, 1]."""
        del deltas

    def describe(self) -> dict[str, Any]:
        """Facts for tables and reports; `savings` are those for a pruner that needs nothing."""
        savings = asdict(self.savings_for(Needs()))
        kind = self.model.config.model_type
        return {"model_type": kind, "stages": list(self.stages), "savings": savings}

    def eager_tower(self, needs: Needs, acts: bool = False) -> AbstractContextManager[Any]:
        """Run a compiled tower eagerly if hooks look into it, or act: dynamo ignores them."""
        looks_inside = acts or needs.hidden or needs.attention or needs.keys or needs.cls
        if looks_inside and is_compiled(self.tower):
            return torch.compiler.set_stance("force_eager")
        return nullcontext()
