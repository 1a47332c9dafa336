"""Where the hooks of an attached pruner are, and whether that is still the model that runs.

Other libraries replace modules of a model under a pruner: LoRA puts its layers in the place of
linear ones, and takes them out again. What a call looks up in the model is then not what has hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from threading import RLock
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ocvtp.hosts.wrap_methods import Wrapped, has_methods
from ocvtp.towers.hooks import Hook, Removable
from ocvtp.towers.module_state import uncompiled

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_RENEWING = RLock()

Put = tuple[nn.Module, Removable]
"""What was put into a module."""


class Site:
    """What a pruner has put into a model.

    Args:
        model: that it is attached to.
        check: refuses a model that the pruner cannot be put into.
        groups: each looks up hooks in the model as it is now; they are put there together.
    """

    def __init__(
        self, model: Any, check: Callable[[], None], groups: Sequence[Callable[[], list[Hook]]]
    ) -> None:
        self._model = model
        self._check = check
        self._groups = list(groups)
        self._put: list[list[Put]] = [[] for _ in groups]

    @uncompiled
    def renew(self) -> None:
        """Put in what is not where it belongs.

        Raises:
            ValueError: if the model has become one that the pruner cannot be put into.
        """
        if self._lost():
            with _RENEWING:
                lost = self._lost()  # unless another thread was here
                self._take_out([*lost])
                self._check()
                for number, hooks in lost.items():
                    self._put[number] = [(hook.module, hook.put()) for hook in hooks]

    def _lost(self) -> dict[int, list[Hook]]:
        """The groups of hooks that are not all where they belong, by their numbers."""
        groups = [look() for look in self._groups]
        pairs = enumerate(zip(groups, self._put, strict=True))
        return {number: pair[0] for number, pair in pairs if not _are_there(*pair)}

    def remove(self) -> None:
        """Take everything out; may be called more than once."""
        with _RENEWING:
            self._take_out(range(len(self._groups)))

    def _take_out(self, numbers: Sequence[int]) -> None:
        """Of modules that had it, and of their copies: PEFT trains copies of modules."""
        found: list[Removable] = []
        for number in numbers:
            found += [put for _, put in self._put[number]]
            self._put[number] = []
        if not found:
            return
        for put in found:
            put.remove()
        wrapped = [put for put in found if isinstance(put, Wrapped)]
        ids = {put.id for put in found if isinstance(put, RemovableHandle)}
        for module in self._model.modules():
            for name in _HOOKS:
                hooks = vars(module).get(name)
                for number in ids & hooks.keys() if hooks else ():
                    del hooks[number]
            if has_methods(module):
                for method in wrapped:
                    method.sweep(module)


def _are_there(hooks: Sequence[Hook], found: Sequence[Put]) -> bool:
    """Whether hooks are in the modules that they belong to."""
    return len(hooks) == len(found) and all(
        hook.module is module and not (isinstance(put, Wrapped) and put.is_lost())
        for hook, (module, put) in zip(hooks, found, strict=True)
    )
