"""`ocvtp answer`: one answer, with the tokens before and after pruning."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ocvtp.commands import options, output
from ocvtp.hosts.attach import attached
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.loading import check_model, load_model, open_image
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.hosts.prompt.checks import refuse_beyond_all, refuse_beyond_context
from ocvtp.hosts.prompt.shorten import Prompt
from ocvtp.hosts.registry import find_host
from ocvtp.pruners import Pruner
from ocvtp.pruners.specs import build_specs


def run(arguments: argparse.Namespace) -> int:
    """Answer and print."""
    options.check_counts(arguments, "max_new_tokens")
    (pruner,) = build_specs([arguments.pruner], **options.pruner_settings(arguments))
    result = answer(
        arguments.model,
        pruner,
        arguments.image,
        arguments.prompt,
        arguments.max_new_tokens,
        arguments.dtype,
        arguments.device,
        arguments.text_tower,
        Tiling(arguments.budget, arguments.separators),
    )
    each = "image" if arguments.budget == "per_image" else "tile"
    pairs = zip(result.visual_tokens_kept, result.visual_tokens, strict=True)
    kept = ", ".join(f"{few} of {all_}" for few, all_ in pairs)
    encoded = ""
    if result.visual_tokens_encoded != result.visual_tokens:
        encoded = f"; {', '.join(map(str, result.visual_tokens_encoded))} left by the tower"
    inside = "".join(
        f"; {', '.join(map(str, stage['visual_tokens_kept']))} from layer {stage['layer']} on"
        for stage in result.layers
    )
    text = (
        f"{result.answer}\n[{result.pruner}: {kept} visual tokens per {each}{encoded}{inside};"
        f" prompt {result.prompt_tokens} -> {result.prompt_tokens_kept} tokens]"
    )
    output.emit(asdict(result), text, arguments.json)
    return 0


@dataclass(frozen=True)
class Answer:
    """One answer.

    Args:
        answer: the text. pruner: its name.
        visual_tokens: of each image (or tile, where each has a budget of its own) before pruning.
        visual_tokens_encoded: what pruners before and inside the tower left of them.
        visual_tokens_kept: what went to the language model.
        prompt_tokens: of the prompt before pruning. prompt_tokens_kept: after.
        layers: inside the language model, `layer` and `visual_tokens_kept` of each image from
            there on.
    """

    answer: str
    pruner: str
    visual_tokens: list[int]
    visual_tokens_encoded: list[int]
    visual_tokens_kept: list[int]
    prompt_tokens: int
    prompt_tokens_kept: int
    layers: list[dict[str, Any]]


def answer(
    model: str,
    pruner: Pruner,
    images: Sequence[str],
    prompt: str,
    max_new_tokens: int = 64,
    dtype: str = "auto",
    device: str = "cpu",
    text_tower: str | None = None,
    tiling: Tiling | None = None,
) -> Answer:
    """Answer one prompt about images, greedily, with pruned visual tokens.

    Args:
        model: see `load_model`.
        pruner: what prunes.
        images: files.
        prompt: plain text; the model's chat template is put around it. With `<image>` in it, it is
            used as it stands.
        max_new_tokens: length of the answer at most.
        dtype: see `load_model`. device: where to run.
        text_tower: see `ocvtp.attach`.
        tiling: its `budget` and `separators`, see there too.

    Raises:
        ValueError: if something cannot be read, or the pruner does not fit the model.
    """
    check_model(model, dtype, device, [pruner], text_tower)
    pictures = [open_image(path) for path in images]
    vlm, processor = load_model(model, dtype, device)
    host = find_host(vlm)
    refuse_beyond_all(host, pruner)
    text = with_template(processor, prompt, len(pictures))
    inputs = processor(images=pictures, text=[text], return_tensors="pt").to(device, vlm.dtype)
    pruned = pruner.name != "none"
    refuse_beyond_context(host, inputs["input_ids"], max_new_tokens, without_images=pruned)
    prompts: list[Prompt] = []
    settings = {"processor": processor, "text_tower": text_tower, **asdict(tiling or Tiling())}
    with attached(vlm, pruner, on_prune=prompts.append, **settings):
        output = vlm.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    counts = prompts[0].summary()
    return Answer(
        answer=processor.decode(new, skip_special_tokens=True).strip(),
        pruner=pruner.name,
        visual_tokens=counts["visual_tokens"],
        visual_tokens_encoded=counts["visual_tokens_encoded"],
        visual_tokens_kept=counts["visual_tokens_kept"],
        prompt_tokens=counts["prompt_tokens"],
        prompt_tokens_kept=counts["prompt_tokens_kept"][0],
        layers=counts["layers"],
    )
