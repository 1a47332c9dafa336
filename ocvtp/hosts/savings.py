"""What hosts need not compute while a pruner is attached, and whether they leave it out."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Savings:
    """Work that changes nothing, each kind of which can be left out or done on its own.

    Where a host or a pruner leaves nothing to save, a setting has no effect: `Handle.savings` tells
    which have one. Hooks of your own on modules that do not run see what these were given (the
    tower) or zeros (the projector); compiled modules always run.

    Args:
        cut_tower: blocks of the vision tower behind the last one that anyone reads do not run, nor
            does what stands behind them (a norm, a pooling head). Results are the same bit for bit.
        project_kept: the projector runs on the tokens that are kept, not on all, unless the pruner
            reads projected tokens. A smaller matrix product may round its last bits in another way;
            where all tokens are kept it is the same product.
        compile_select: `torch.compile` makes one graph of how the pruner in front of the language
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
