"""Compare pruners on your own images and questions: a table, a report with plots, and a picture.

    python examples/compare_pruners.py
    python examples/compare_pruners.py --model llava-hf/llava-1.5-7b-hf --device cuda \
        --images DIR --questions FILE --pruners divprune visionzip fastervlm --num-keep 192 64

FILE is a JSON list of `{"image": "NAME.jpg", "question": "..", "answers": [".."]}`. Unpruned,
random and other controls run next to your pruners. A run that was stopped continues where it stood.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ocvtp.commands.show import show
from ocvtp.data.questions import ask
from ocvtp.data.scenes import draw_scene
from ocvtp.evaluation.conditions import Budget
from ocvtp.evaluation.report import short_table, write
from ocvtp.evaluation.run import answers_of, evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.tasks.vqa import VqaTask
from ocvtp.hosts.loading import load_model
from ocvtp.pruners.specs import build_spec
from ocvtp.reporting.files import replacing


def main(words: Sequence[str] | None = None) -> None:
    """Draw what each pruner keeps of the first image, then ask everything under all of them."""
    arguments = parse(words)
    output = Path(arguments.output)
    images, questions = arguments.images, arguments.questions
    if questions is None:
        images, questions = output / "images", draw_questions(output / "images", num_images=24)
    task = VqaTask(questions, images)

    few, checkpoint = min(arguments.num_keep), arguments.checkpoint
    pruners = [build_spec(s, num_keep=few, checkpoint=checkpoint) for s in arguments.pruners]
    first, asked = str(Path(images) / task.image_names[0]), task.items[0].question
    where = (arguments.dtype, arguments.device)
    show(arguments.model, pruners, first, str(output / "kept.png"), *where, prompt=asked)

    model, processor = load_model(arguments.model, *where)
    report, records = evaluate(
        Subject(model, processor, arguments.model),
        task,
        arguments.pruners,
        [Budget(num_keep=count) for count in arguments.num_keep],
        output,
        checkpoints=[] if checkpoint is None else [checkpoint],
        batch_size=arguments.batch_size,
    )
    wrote = write(report, output, answers_of(task, records))
    print(short_table(report))
    print("wrote", *wrote, output / "kept.png")


def draw_questions(folder: Path, num_images: int) -> Path:
    """Scenes with questions about them, as such a file; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for number in range(num_images):
        scene, name = draw_scene(seed=7, index=number), f"{number}.png"
        Image.fromarray(scene.image).save(folder / name)
        for question in ask(scene.objects, num=4, rng=np.random.default_rng(number)):
            listed.append(
                {
                    "image": name,
                    "question": question.text,
                    "answers": [question.answer],
                    "kind": question.kind,
                }
            )
    with replacing(folder / "questions.json") as temporary:
        temporary.write_text(json.dumps(listed, indent=1))
    return folder / "questions.json"


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="compare pruners on your images and questions")
    parser.add_argument("--model", default="checkpoints/demo-vlm", help="folder or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", help="folder of the images that FILE names")
    parser.add_argument("--questions", metavar="FILE", help="without it, scenes are drawn")
    parser.add_argument("--pruners", nargs="+", default=["divprune", "fastervlm", "visionzip"])
    parser.add_argument("--checkpoint", help="an exported OC-pruner, for the pruner ocvtp")
    parser.add_argument("--num-keep", type=int, nargs="+", default=[36, 8])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", default="outputs/examples/compare")
    arguments = parser.parse_args(words)
    if (arguments.images is None) != (arguments.questions is None):
        parser.error("pass --images and --questions together")
    return arguments


if __name__ == "__main__":
    main()
