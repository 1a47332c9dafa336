"""What a host can show a pruner: asked for, and then counted."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from reference import Scripted
from tiny_models import tiny_clip, tiny_processor

from matrix.families import SEVERAL, Family, some
from ocvtp import Needs, attach
from ocvtp.hosts import find_host

BLOCK = 1
SUPPLIES = {
    "hidden states": Needs(hidden=(BLOCK,)),
    "keys": Needs(keys=(BLOCK,)),
    "attention received": Needs(attention=((BLOCK, "received"),)),
    "attention given": Needs(attention=((BLOCK, "given"),)),
    "attention of the CLS": Needs(attention=((BLOCK, "cls"),)),
    "the CLS": Needs(cls=True),
    "projected": Needs(projected=True),
    "text": Needs(text=True),
    "CLIP's space": Needs(clip=True),
}


@torch.no_grad()
def check_supply(family: Family, model: Any, needs: Needs) -> bool:
    """Whether a pruner gets this: what the host says is so, and a refusal names an alternative."""
    host, pruner = find_host(model), Scripted(wants=needs, choose=some)
    try:
        host.check(needs)
    except ValueError:
        with pytest.raises(ValueError, match="; use "):
            attach(model, pruner)
        return False
    clip = tiny_clip(host.tower) if needs.clip else None
    with pruner(model, processor=tiny_processor(), text_tower=clip):
        registers = reference.num_registers(model)
        given = reference.make_batch(SEVERAL, registers=registers) if registers else None
        model(**given or family.make(SEVERAL, "left"))
    assert not pruner.seen[0].missing(needs)
    return True
