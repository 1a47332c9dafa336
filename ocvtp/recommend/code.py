"""The lines of Python that put a chosen pruner into a model."""

from __future__ import annotations

from typing import Any

from ocvtp.evaluation.conditions import takes_checkpoints
from ocvtp.pruners.specs import has_budget, names_budget, parse_spec, with_budget
from ocvtp.recommend.choice import Option


def lines(option: Option, checkpoint: str | None = None, text_tower: Any = None) -> list[str]:
    """Three lines that attach what was chosen to `model`, whose processor is `processor`.

    Args:
        option: what was chosen.
        checkpoint: exported network that it was measured with, if it takes one.
        text_tower: folder or hub id of a CLIP, if one was given.
    """
    spec = option.label
    if option.num_keep is not None and names_budget(spec):
        spec = with_budget(spec, option.num_keep)
    name, settings = parse_spec(spec)
    if option.num_keep is not None and not has_budget(spec):
        settings = {"num_keep": option.num_keep, **settings}
    if checkpoint is not None and takes_checkpoints(spec):
        settings["checkpoint"] = checkpoint
    words = [repr(name), *(f"{key}={value!r}" for key, value in settings.items())]
    given = "" if text_tower is None else f", text_tower={text_tower!r}"
    return [
        "import ocvtp",
        f"pruner = ocvtp.build_pruner({', '.join(words)})",
        f"handle = ocvtp.attach(model, pruner, processor=processor{given})",
    ]
