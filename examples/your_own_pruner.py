"""A pruner of your own, in thirty lines: register it, check it, use it by its name.

    python examples/your_own_pruner.py

`contrast` keeps the tokens that differ most from the mean of their image. A pruner says where it
acts (`stage`, by default before the language model) and what it reads beside the tower's
tokens (`needs`); every host then serves it. What a method may ask for is in `ocvtp.Needs`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

import ocvtp
from ocvtp.data.scenes import draw_scene
from ocvtp.hosts.loading import load_model, open_image
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.ops.selection import top_k
from ocvtp.pruners.checks import check_pruner
from ocvtp.pruners.registry import register


@register("contrast")
@dataclass(kw_only=True, eq=False)
class Contrast(ocvtp.Pruner):
    """Contrast: keep the K tokens that differ most from the mean of their image.

    Args:
        num_keep: tokens kept per image.
        power: of the differences; 2 is the squared distance, 1 the sum of absolute values.
    """

    power: float = 2.0

    reads: ClassVar[str] = "projected"

    @property
    def needs(self) -> ocvtp.Needs:
        """What the language model would read."""
        return ocvtp.Needs(projected=True)

    def _select(self, tokens: ocvtp.VisualTokens, num_keep: int) -> ocvtp.Selection:
        assert tokens.projected is not None
        vectors = tokens.projected.float()  # [B, N, D]
        real = tokens.real[:, :, None]  # False on padding, where images differ in size
        mean = (vectors * real).sum(dim=1, keepdim=True) / real.sum(dim=1, keepdim=True)
        scores = (vectors - mean).abs().pow(self.power).sum(dim=2)  # [B, N]
        return top_k(scores, num_keep, tokens.valid)


def main(words: Sequence[str] | None = None) -> None:
    """Check the pruner, then answer a question with it."""
    arguments = parse(words)
    pruner = ocvtp.build_pruner("contrast", num_keep=arguments.num_keep)
    check_pruner(pruner)
    print("contrast keeps to the contract")

    model, processor = load_model(arguments.model, arguments.dtype, arguments.device)
    drawn = Image.fromarray(draw_scene(seed=3, index=0).image)
    image = drawn if arguments.image is None else open_image(arguments.image)
    text = with_template(processor, arguments.prompt, 1)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with pruner(model):
        made = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    new = made[0, inputs["input_ids"].shape[1] :]
    print(arguments.prompt, processor.decode(new, skip_special_tokens=True).strip())


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="a pruner of your own")
    parser.add_argument("--model", default="checkpoints/demo-vlm", help="folder or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--image", help="without it, a scene is drawn")
    parser.add_argument("--prompt", default="How many circles are there in the image?")
    parser.add_argument("--num-keep", type=int, default=36, help="visual tokens of an image")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
