"""Hooks are looked up again where something on the way to them has changed, and only there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ocvtp.hosts.runtime.installed_hooks import InstalledHooks
from ocvtp.towers.hooks import Hook, before


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(2)])
        self.head = nn.Linear(2, 2)
        self.layer = 1

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            states = block(states)
        return self.head(states)


class Routed(nn.Module):
    """It looks up what is active, as PEFT's wrappers do."""

    def __init__(self, inside: Any) -> None:
        super().__init__()
        self.inside = inside

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inside, name)


def installed(model: Model, fired: list[int], looked: list[int]) -> InstalledHooks:
    def look() -> list[Hook]:
        looked.append(len(looked))
        linears = [block[0] for block in model.blocks]
        return [before(one, lambda module, args: fired.append(id(module))) for one in linears]

    return InstalledHooks(model, lambda: None, [look], lambda: model.layer)


def append(model: Model) -> None:
    model.blocks.append(nn.Sequential(nn.Linear(2, 2)))


def replace_a_part(model: Model) -> None:
    model.blocks[1][0] = nn.Linear(2, 2)


def replace_a_block(model: Model) -> None:
    model.blocks[0] = nn.Sequential(nn.Linear(2, 2))


def change_a_setting(model: Model) -> None:
    model.layer = 0


def compile_a_block(model: Model) -> None:
    model.blocks[0].compile(backend="eager")


CHANGES = [append, replace_a_part, replace_a_block, change_a_setting, compile_a_block]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_once(change: Callable[[Model], None]) -> None:
    model, fired, looked = Model(), list[int](), list[int]()
    hooks = installed(model, fired, looked)
    hooks.renew()
    before_change = len(looked)
    for _ in range(3):
        hooks.renew()
    assert len(looked) == before_change  # nothing has changed
    change(model)
    hooks.renew()
    assert len(looked) == before_change + 1
    hooks.renew()
    assert len(looked) == before_change + 1
    model(torch.ones(1, 2))
    assert fired == [id(block[0]) for block in model.blocks]
    hooks.remove()
    model(torch.ones(1, 2))
    assert len(fired) == len(model.blocks)


def test_a_part_that_hides_a_registered_one_is_seen() -> None:
    model, fired, looked = Model(), list[int](), list[int]()
    hooks = installed(model, fired, looked)
    hooks.renew()
    registered = model.blocks
    for linear in (nn.Linear(2, 2), nn.Linear(2, 2), None):  # hidden, hidden again, and back
        if linear is None:
            del vars(model)["blocks"]
        else:
            vars(model)["blocks"] = nn.ModuleList([nn.Sequential(linear)])
        hooks.renew()
        fired.clear()
        model(torch.zeros(1, 2))
        assert fired == [id(block[0]) for block in model.blocks]
    assert model.blocks is registered


def test_what_is_not_on_the_way_may_change() -> None:
    model, fired, looked = Model(), list[int](), list[int]()
    hooks = installed(model, fired, looked)
    hooks.renew()
    count = len(looked)
    model.head = nn.Linear(2, 2)
    hooks.renew()
    assert len(looked) == count


def test_what_looks_up_its_parts_is_looked_at_in_every_call() -> None:
    model, fired, looked = Model(), list[int](), list[int]()
    model.blocks[0] = nn.Sequential(Routed(nn.Linear(2, 2)))
    hooks = installed(model, fired, looked)
    hooks.renew()
    count = len(looked)
    hooks.renew()
    assert len(looked) == count + 1
