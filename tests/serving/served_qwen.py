"""Models of the Qwen-VL family for tests of servers, and what transformers makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ocvtp import Pruner
from ocvtp.hosts import find_host
from ocvtp.hosts.loading import load_model
from ocvtp.random_models.weights import materialise

FAMILIES = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
NEW_TOKENS = 8
WIDTH, HEAD = 128, 32  # kernels for CPUs take heads of 32


def save(family: str, folder: Path) -> Path:
    """A tiny model of random weights, with its processor, as a hub has it."""
    model, processor = load_model(f"random:tiny-{family}")
    config = model.config
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.head_dim = WIDTH, HEAD
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [6, 5, 5]}
    name = "hidden_size" if family == "qwen2-vl" else "out_hidden_size"
    setattr(vision, name, WIDTH)
    materialise(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load(folder: Path) -> tuple[Any, Any]:
    """The model in transformers, fp32, whose answers do not end by themselves; its processor."""
    model, processor = load_model(str(folder), dtype="float32")
    model.generation_config.eos_token_id = None
    return model, processor


def drawn(width: int, height: int, colour: str) -> Image.Image:
    """A picture with a square and a circle."""
    image = Image.new("RGB", (width, height), colour)
    pen = ImageDraw.Draw(image)
    pen.rectangle((width // 8, height // 6, width // 2, height // 2), fill=(250, 20, 90))
    pen.ellipse((width // 2, height // 2, width - 3, height - 5), fill=(10, 200, 60))
    return image


def prompt(processor: Any, num_images: int, text: str) -> str:
    """A question about images, as the chat template writes it."""
    content = [{"type": "image"}] * num_images + [{"type": "text", "text": text}]
    message: Any = [{"role": "user", "content": content}]
    written: str = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )
    return written


def short_prompt(model: Any, processor: Any, pruner: Pruner, text: str, images: Any) -> Any:
    """What the language model of transformers reads of a prompt, see `prompt.shorten`."""
    from ocvtp.hosts.prompt.read_call import look
    from ocvtp.hosts.prompt.shorten import shorten

    host = find_host(model)
    handles = host.install(pruner.needs)
    try:
        inputs = dict(processor(text=text, images=images, return_tensors="pt"))
        with torch.inference_mode():
            return shorten(host, pruner, inputs, look(host, pruner.needs, inputs)).prompt
    finally:
        for handle in handles:
            handle.remove()


def coordinates(found: Any) -> tuple[Tensor, int]:
    """[3, L'] of a short prompt, and how far they run ahead of its columns."""
    return found.positions[-3:, 0], int(found.rope_deltas)


@torch.inference_mode()
def answered(model: Any, processor: Any, pruner: Pruner, text: str, images: Any) -> Any:
    """Greedy tokens of transformers' `generate`, and the logarithm of the first's probability."""
    inputs = processor(text=text, images=images or None, return_tensors="pt")
    with pruner(model):
        output = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    return ids, output.logits[0][0].log_softmax(-1)[ids[0]].item()
