"""Where the hooks of an attached pruner are, and whether that is still the model that runs.

Other libraries replace modules of a model under a pruner: LoRA puts its layers in the place of
linear ones, and takes them out again. Then the modules that a call finds in the model are not those
that have hooks. To look for them takes longer than to see that nothing has changed, so a call first
does the latter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ocvtp.hosts.wrap_methods import Wrapped, any_lost, has_methods
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


@dataclass(frozen=True)
class _Holder:
    """A module on the path to hooks.

    Args:
        module: itself.
        is_compiled: in place.
        parts: those of its parts that are on the path too.
        num_parts: how many it has in all.
    """

    module: nn.Module
    is_compiled: bool
    parts: tuple[tuple[str, nn.Module | None], ...]
    num_parts: int

    @staticmethod
    def of(module: nn.Module, on_the_way: set[int]) -> _Holder:
        """A module as it is now; `on_the_way` has the ids of modules on the path."""
        parts = tuple((k, part) for k, part in module._modules.items() if id(part) in on_the_way)
        is_compiled = module._compiled_call_impl is not None
        return _Holder(module, is_compiled, parts, len(module._modules))

    def is_as_it_was(self) -> bool:
        """Whether it holds the same parts, and names still lead to them."""
        parts = self.module._modules
        return (
            type(self.module).__getattr__ is nn.Module.__getattr__  # PEFT's look up what is active
            and len(parts) == self.num_parts
            and (self.module._compiled_call_impl is not None) == self.is_compiled
            and all(parts.get(name) is part for name, part in self.parts)
            and vars(self.module).keys().isdisjoint(name for name, _ in self.parts)
        )


class InstalledHooks:
    """What a pruner has put into a model.

    Args:
        model: the one that it is attached to.
        check: refuses a model that the pruner cannot be put into.
        groups: each looks up hooks in the model as it is now; they are put there together.
        settings: gives what of the model's configuration, and of the pruner's, decides where hooks
            go.
    """

    def __init__(
        self,
        model: Any,
        check: Callable[[], None],
        groups: Sequence[Callable[[], list[Hook]]],
        settings: Callable[[], Any],
    ) -> None:
        self._model = model
        self._check = check
        self._groups = list(groups)
        self._settings = settings
        self._put: list[list[Put]] = [[] for _ in groups]
        self._found: tuple[Any, list[_Holder]] = None, []

    @uncompiled
    def renew(self) -> None:
        """Put in again what is not where it belongs.

        Raises:
            ValueError: if the model has become one that the pruner cannot be put into.
        """
        if self._are_intact():
            return
        with _RENEWING:
            lost = self._lost()  # nothing, if another thread was here
            if lost:
                self._take_out([*lost])
                self._check()
                for number, hooks in lost.items():
                    self._put[number] = [(hook.module, hook.put()) for hook in hooks]
            self._found = self._settings(), self._holders()

    def _are_intact(self) -> bool:
        """Whether nothing on the path to the hooks has changed since they were looked up."""
        settings, holders = self._found
        return (
            bool(holders)
            and all(holder.is_as_it_was() for holder in holders)
            and not any_lost([put for group in self._put for _, put in group])
            and settings == self._settings()
        )

    def _lost(self) -> dict[int, list[Hook]]:
        """The groups of hooks that are not all where they belong, by their numbers."""
        groups = [look() for look in self._groups]
        pairs = enumerate(zip(groups, self._put, strict=True))
        return {number: pair[0] for number, pair in pairs if not _are_there(*pair)}

    def _holders(self) -> list[_Holder]:
        """All modules between the model and those that have hooks, both included.

        None where one of these is no registered part: nothing tells when it is replaced.
        """
        wanted = {id(module) for group in self._put for module, _ in group}
        holders = {id(module): module for module in self._model.modules()}
        if not wanted <= holders.keys():
            return []
        parents: dict[int, set[int]] = {}
        for number, holder in holders.items():
            for child in holder._modules.values():
                parents.setdefault(id(child), set()).add(number)
        found, queue = set[int](), [*wanted]
        for number in queue:  # grows
            if number not in found:
                found.add(number)
                queue += parents.get(number, ())
        return [_Holder.of(holders[number], found) for number in found]

    def remove(self) -> None:
        """Take everything out; may be called more than once."""
        with _RENEWING:
            self._take_out(range(len(self._groups)))

    def _take_out(self, numbers: Sequence[int]) -> None:
        """Also out of copies of the modules: PEFT trains copies."""
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
    return len(hooks) == len(found) and all(
        hook.module is module and not (isinstance(put, Wrapped) and put.is_lost())
        for hook, (module, put) in zip(hooks, found, strict=True)
    )
