"""A pruned model in transformers' own pipeline: chats in, answers out, in batches.

    python examples/pipeline.py
    python examples/pipeline.py --model llava-hf/llava-1.5-7b-hf --device cuda --num-keep 64 \
        --images DIR --question "What is this?"

The pipeline keeps working as ever: inside the `with` block its model reads `num_keep` visual tokens
of every image, outside of it all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import ocvtp
from ocvtp.data.coco import find_images
from ocvtp.data.scenes import write_scenes
from ocvtp.hosts.loading import open_image


def main(words: Sequence[str] | None = None) -> None:
    """Answer one question about every image, without and with the pruner."""
    arguments = parse(words)
    folder = Path(arguments.images or "outputs/examples/scenes/val2017")
    if arguments.images is None:
        write_scenes("outputs/examples/scenes", num_train=0, num_val=6, size=96, seed=0)
    names = find_images(folder)
    chats = [chat(folder / name, arguments.question) for name in names]

    model = AutoModelForImageTextToText.from_pretrained(arguments.model, dtype=arguments.dtype)
    processor = AutoProcessor.from_pretrained(arguments.model)
    processor.tokenizer.padding_side = "left"  # answers follow their prompts, in batches too
    pipe = pipeline(
        "image-text-to-text",
        model=model,
        processor=processor,
        device=arguments.device,
    )
    settings = {"max_new_tokens": arguments.max_new_tokens, "return_full_text": False}

    whole = pipe(text=chats, batch_size=arguments.batch_size, **settings)
    pruner = ocvtp.build_pruner(arguments.pruner, num_keep=arguments.num_keep)
    prompts: list[Any] = []  # every shortened prompt, to say how many tokens were read
    with pruner(model, processor=processor, on_prune=prompts.append):
        pruned = pipe(text=chats, batch_size=arguments.batch_size, **settings)

    counts = prompts[0].summary()
    tokens, kept = counts["visual_tokens"][0], counts["visual_tokens_kept"][0]
    print(arguments.question)
    print(f"{'image':<24} {f'{tokens} tokens':<24} {f'{kept} tokens ({pruner.name})'}")
    for name, one, other in zip(names, whole, pruned, strict=True):
        print(f"{name!s:<24} {text(one):<24} {text(other)}")


def chat(image: Path, question: str) -> list[dict[str, Any]]:
    """A question about an image, as chat templates want it."""
    content = [{"type": "image", "image": open_image(str(image))}]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def text(answer: Any) -> str:
    """The words of one answer of the pipeline."""
    return str(answer[0]["generated_text"]).strip()


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="a pruned model in a transformers pipeline")
    parser.add_argument("--model", default="checkpoints/demo-vlm", help="folder or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", help="folder; without it, scenes are drawn")
    parser.add_argument("--question", default="How many circles are there in the image?")
    parser.add_argument("--pruner", default="divprune", help="see `ocvtp list`")
    parser.add_argument("--num-keep", type=int, default=36, help="visual tokens of an image")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=16)
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
