"""`python -m tools.demo_grounding --output DIR`: train, and save the model with its card."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

import torch

from ocvtp.hosts.loading import load_model
from ocvtp.reporting.files import replacing
from tools.demo_grounding.conversations import STEP, grounding_tokenizer
from tools.demo_grounding.training import GroundingSettings, train
from tools.demo_vlm.processor import llava_processor

_CARD = Path(__file__).with_name("card.md")


def main(words: Sequence[str] | None = None) -> int:
    """Run it; what is wrong is said in one line."""
    arguments = vars(_parser().parse_args(words))
    resume = arguments.pop("resume")
    try:
        settings = GroundingSettings(**arguments)
        reader = train(settings, resume)
    except ValueError as error:
        print(f"demo_grounding: error: {error}", file=sys.stderr)
        return 2
    save(reader, settings)
    print(f"wrote {settings.output}")
    return 0


def save(reader: Any, settings: GroundingSettings) -> None:
    """Write weights (fp16 safetensors), tokenizer, processor and card; the reader is spent."""
    _, processor = load_model(settings.base, "float32")
    folder = Path(settings.output)
    reader.model.generation_config.max_new_tokens = 5
    reader.model.to(torch.float16).save_pretrained(folder)
    made = llava_processor(processor.image_processor, grounding_tokenizer(), processor.patch_size)
    made.save_pretrained(folder)
    card = Template(_CARD.read_text(encoding="utf-8")).substitute(asdict(settings), step=STEP)
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card, encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.demo_grounding", description=__doc__)
    parser.add_argument("--output", default="outputs/demo-grounding", metavar="DIR")
    parser.add_argument("--base", default=GroundingSettings.base, metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on where it was stopped")
    for name in ("tower_steps", "sight_steps", "steps", "alone_steps", "seed"):
        default = getattr(GroundingSettings, name)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=default, help=f"(default: {default})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
