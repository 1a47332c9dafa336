"""How many files one call passes through: `python -m tools.trip [--files]`.

A hop is a change of file inside `ocvtp/` from one called function to the next, while the demo VLM
answers once for one image under a pruner, or while the demo's OC-pruner makes a training step with
two images, its set-up included. What is imported on the way does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = str(ROOT / "ocvtp") + "/"
PRUNERS = ("fastervlm", "fastv:stages=[[1,16]]", "tome")


class Trip:
    """The files of `ocvtp/` whose functions run, in their order.

    Attributes:
        files: one entry for every time that another file goes on.
    """

    def __init__(self) -> None:
        self.files: list[str] = []

    @property
    def hops(self) -> int:
        """How often the file changes."""
        return max(0, len(self.files) - 1)

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """What `sys.setprofile` calls."""
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(PACKAGE) or frame.f_code.co_name == "<module>":
            return
        name = name.removeprefix(PACKAGE)
        if not self.files or self.files[-1] != name:
            self.files.append(name)


def follow(work: Callable[[], Any]) -> Trip:
    """What `work()` passes through, in this thread."""
    trip = Trip()
    sys.setprofile(trip)
    try:
        work()
    finally:
        sys.setprofile(None)
    return trip


def generate_trip(spec: str) -> Trip:
    """One token about one drawn scene, from the demo VLM with a pruner attached."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import ocvtp
    from ocvtp.data.scenes import draw_scene
    from ocvtp.pruners.specs import build_spec

    folder = ROOT / "checkpoints/demo-vlm"
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    image = Image.fromarray(draw_scene(seed=0, index=0).image)
    prompt = "USER: <image>\nHow many circles are there in the image? ASSISTANT:"
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    settings = {} if "stages" in spec else {"num_keep": 16}
    handle = ocvtp.attach(model, build_spec(spec, **settings), processor=processor)
    try:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)  # what is read once, is read
        return follow(lambda: model.generate(**inputs, max_new_tokens=1, do_sample=False))
    finally:
        handle.remove()


def training_trip() -> Trip:
    """One step of the demo's training, from the command's words to the last checkpoint."""
    from ocvtp.training.run import train

    with tempfile.TemporaryDirectory() as folder:
        words = ["--config", str(ROOT / "configs/train/demo_kept.yaml")]
        words += ["--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0"]
        words += ["--data.init_args.num_train", "2", "--data.init_args.num_val", "2"]
        words += ["--data.init_args.root", f"{folder}/scenes", "--data.init_args.batch_size", "2"]
        words += ["--trainer.default_root_dir", folder, "--trainer.accelerator", "cpu"]
        words += ["--trainer.enable_progress_bar", "false"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(words)  # draws the scenes
            return follow(lambda: train(words))


def trips() -> Iterator[tuple[str, Trip]]:
    """All of them by their names."""
    for spec in PRUNERS:
        yield f"generate, {spec}", generate_trip(spec)
    yield "one training step, set-up included", training_trip()


def main() -> None:
    """Print the table; `--files` prints the way of every trip as well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", action="store_true", help="print every file on the way")
    arguments = parser.parse_args()
    found = list(trips())
    print("| trip | files | hops |\n|---|---|---|")
    for name, trip in found:
        print(f"| {name} | {len(set(trip.files))} | {trip.hops} |")
    for name, trip in found if arguments.files else []:
        print(f"\n{name}\n" + "\n".join(f"  {file}" for file in trip.files))


if __name__ == "__main__":
    main()
