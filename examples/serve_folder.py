"""Ask one question about every image of a folder, in pruned batches; an answer a line of JSON.

    python examples/serve_folder.py
    python examples/serve_folder.py --model llava-hf/llava-1.5-7b-hf --device cuda --num-keep 64 \
        --images DIR --prompt "Describe the image." --max-new-tokens 64 --output answers.jsonl

A run that was stopped continues where it stood: run the same command again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import ocvtp
from ocvtp.data.coco import find_images
from ocvtp.data.scenes import write_scenes
from ocvtp.hosts.loading import load_model, open_image
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.reporting.files import replacing


def main(words: Sequence[str] | None = None) -> None:
    """Answer what is not answered yet, and say how fast."""
    arguments = parse(words)
    folder = Path(arguments.images or "outputs/examples/serve/scenes/val2017")
    if arguments.images is None:
        write_scenes(folder.parent, num_train=0, num_val=64, size=96, seed=0)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {
        name: getattr(arguments, name) for name in ("model", "prompt", "pruner", "num_keep")
    }
    done = answered(output, settings)
    names = [name.as_posix() for name in find_images(folder) if name.as_posix() not in done]
    print(f"{len(done)} images are answered, {len(names)} to go")
    if not names:
        return

    model, processor = load_model(arguments.model, arguments.dtype, arguments.device)
    processor.tokenizer.padding_side = "left"  # answers follow their prompts, in batches too
    pruner = ocvtp.build_pruner(arguments.pruner, num_keep=arguments.num_keep)
    prompts: list[Any] = []
    start = time.perf_counter()
    with pruner(model, processor=processor, on_prune=prompts.append), output.open("a") as file:
        for first in range(0, len(names), arguments.batch_size):
            batch = names[first : first + arguments.batch_size]
            images = [folder / name for name in batch]
            answers = ask(model, processor, images, arguments.prompt, arguments.max_new_tokens)
            for name, answer in zip(batch, answers, strict=True):
                file.write(json.dumps({"image": name, "answer": answer, **settings}) + "\n")
            file.flush()
            prompts[:] = prompts[:1]  # one is enough to count; each holds its images
    seconds = time.perf_counter() - start
    counts = prompts[0].summary()
    tokens, kept = counts["visual_tokens"][0], counts["visual_tokens_kept"][0]
    print(
        f"{len(names)} images in {seconds:.1f} s, {len(names) / seconds:.1f} a second, with"
        f" {kept} of {tokens} visual tokens each ({pruner.name}); wrote {output}"
    )


@torch.no_grad()
def ask(
    model: Any, processor: Any, images: Sequence[Path], prompt: str, max_new_tokens: int
) -> list[str]:
    """The answers to one prompt about each of some images."""
    inputs = processor(
        images=[[open_image(str(image))] for image in images],
        text=[with_template(processor, prompt, 1)] * len(images),
        return_tensors="pt",
        padding=True,
    ).to(model.device, model.dtype)
    made = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    new = made[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    return [text.strip() for text in texts]


def answered(output: Path, settings: dict[str, Any]) -> set[str]:
    """The images that an earlier run has answered; a line that was cut off is forgotten.

    Raises:
        ValueError: if the file holds answers under other settings.
    """
    text = output.read_text() if output.is_file() else ""
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        with replacing(output) as temporary:
            temporary.write_text(whole)
    records = [json.loads(line) for line in whole.splitlines()]
    for record in records:
        if any(record.get(name) != value for name, value in settings.items()):
            raise ValueError(
                f"{output} holds answers under other settings than {settings}; pass another"
                " --output, or delete that file."
            )
    return {record["image"] for record in records}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="ask about every image of a folder")
    parser.add_argument("--model", default="checkpoints/demo-vlm", help="folder or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", help="folder; without it, scenes are drawn")
    parser.add_argument("--prompt", default="How many stars are there in the image?")
    parser.add_argument("--pruner", default="divprune", help="see `ocvtp list`")
    parser.add_argument("--num-keep", type=int, default=36, help="visual tokens of an image")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=8)
    parser.add_argument("--output", default="outputs/examples/serve/answers.jsonl")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
