"""`ocvtp probe`: whether soft gates in a model stand in for dropping, by how far they are open."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from PIL import Image

from ocvtp.commands import options, output
from ocvtp.commands.image_files import image_files
from ocvtp.data.questions import ask
from ocvtp.data.scenes import draw_scene, scene_style, split_seed
from ocvtp.evaluation.gate_probe import Facts, build_gates, probe, to_markdown
from ocvtp.hosts.loading import check_place, load_model, open_image

GATES = ("key_bias:floor=0", "noise", "scale")
"""What is measured where no gate is named: the key bias without a floor."""
PROMPT = "What is in the image?"


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    options.check_counts(arguments, "num_images", "num_keep")
    check_place(arguments.dtype, arguments.device)
    specs = tuple(dict.fromkeys(arguments.gate or GATES))
    gates = build_gates(specs)  # refuses what is unknown before anything is loaded
    items = _items(arguments)
    model, processor = load_model(arguments.model, arguments.dtype, arguments.device)
    facts: Facts = {"model": arguments.model} | probe(
        model,
        processor,
        gates,
        items,
        num_keep=arguments.num_keep,
        layer=arguments.layer,
        seed=arguments.seed,
    )
    output.emit(facts, to_markdown(facts), arguments.json)
    return 0


def _items(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Questions about so many images, see `PromptTransform`."""
    if arguments.images is None:
        if arguments.prompt is not None:
            raise ValueError(
                f"--prompt {arguments.prompt!r} is about --images; drawn scenes have questions of"
                " their own. Pass both, or neither."
            )
        return _scenes(arguments.level or "hard", arguments.num_images, arguments.seed)
    if arguments.level is not None:
        raise ValueError(
            f"--level {arguments.level} is of drawn scenes, and --images names others; pass one of"
            " the two."
        )
    paths = image_files(arguments.images)[: arguments.num_images]
    prompt = PROMPT if arguments.prompt is None else arguments.prompt
    return [_item(open_image(path), prompt, "It", str(path)) for path in paths]


def _scenes(level: str, num: int, seed: int) -> list[dict[str, Any]]:
    """A question about each of some scenes that nothing is trained on."""
    stream, items = split_seed("test", seed), []
    for number in range(num):
        scene = draw_scene(stream, number, style=scene_style(level))
        question = ask(scene.objects, 1, np.random.default_rng([stream, number]))[0]
        image = Image.fromarray(scene.image)
        items.append(_item(image, question.text, question.answer, str(number)))
    return items


def _item(image: Image.Image, question: str, answer: str, key: str) -> dict[str, Any]:
    return {
        "image": image,
        "question": question,
        "answer": answer,
        "before": (),
        "masks": None,
        "key": key,
    }
