"""Train an OC-pruner on any folder of images, without annotations; export it; plug it in.

    python examples/train_on_your_images.py
    python examples/train_on_your_images.py --images DIR --epochs 30 --batch-size 64 \
        --model llava-hf/llava-1.5-7b-hf --tower openai/clip-vit-large-patch14-336 --layer 9 \
        --num-keep 64

The tower is the host's own, and stays as it is; the pruner reads its hidden states of one layer. A
few epochs on a few drawn scenes, as without flags, show the road; they make no good pruner.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import ocvtp
from ocvtp.data.coco import find_images
from ocvtp.data.scenes import write_scenes
from ocvtp.export import export_checkpoint
from ocvtp.hosts.loading import load_model, open_image
from ocvtp.hosts.prompt.chat_template import with_template
from ocvtp.training.run import train


def main(words: Sequence[str] | None = None) -> None:
    """From a folder of images to an answer."""
    arguments = parse(words)
    output = Path(arguments.output)
    images = Path(arguments.images or output / "scenes")
    if arguments.images is None:
        write_scenes(images, num_train=60, num_val=0, size=96, seed=0)
    lay_out(images, output / "coco")

    result = train(
        [
            *("--config", "configs/train/coco_folder.yaml"),
            *("--data.root", str(output / "coco")),
            *("--data.train_annotations", "null", "--data.val_annotations", "null"),
            *("--data.batch_size", str(arguments.batch_size)),
            *("--model.encoder.tower", arguments.tower),
            *("--model.encoder.layer", str(arguments.layer)),
            *("--trainer.max_epochs", str(arguments.epochs)),
            *("--output", str(output)),
        ]
    )
    artifact = output / "oc-pruner"
    export_checkpoint(result.best, artifact)
    print(f"validation loss {result.best_score:.3f}; wrote {artifact}")

    model, processor = load_model(arguments.model, arguments.dtype, arguments.device)
    pruner = ocvtp.build_pruner("ocvtp", num_keep=arguments.num_keep, checkpoint=artifact)
    image = images / find_images(images)[0]
    text = with_template(processor, arguments.prompt, 1)
    inputs = processor(images=[open_image(str(image))], text=[text], return_tensors="pt")
    inputs = inputs.to(model.device, model.dtype)
    with pruner(model):
        made = model.generate(**inputs, do_sample=False, max_new_tokens=32)
    new = made[0, inputs["input_ids"].shape[1] :]
    answer = processor.decode(new, skip_special_tokens=True).strip()
    print(f"{arguments.prompt} {answer}  [{arguments.num_keep} visual tokens of {image}]")


def lay_out(images: Path, root: Path, val_every: int = 10) -> None:
    """Links to the images in COCO's layout: every tenth for validation, the others for training.

    Raises:
        ValueError: if there are too few.
    """
    found = find_images(images)
    if len(found) < val_every:
        raise ValueError(
            f"{images} holds {len(found)} images; pass a folder of {val_every} or more."
        )
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True, exist_ok=True)
        for link in (root / split).iterdir():  # of an earlier run
            if link.is_symlink():
                link.unlink()
    for number, path in enumerate(found):
        split = "val2017" if number % val_every == 0 else "train2017"
        link = root / split / f"{number:012d}{path.suffix}"
        link.symlink_to((images / path).resolve())


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description="train an OC-pruner on a folder of images")
    parser.add_argument("--images", help="folder of JPEG or PNG; without it, scenes are drawn")
    parser.add_argument("--model", default="checkpoints/demo-vlm", help="the host, to plug it in")
    parser.add_argument("--dtype", default="auto", help="of the host")
    parser.add_argument("--device", default="cpu", help="of the host; training picks its own")
    parser.add_argument("--tower", default="checkpoints/demo-vlm", help="the host's vision tower")
    parser.add_argument("--layer", type=int, default=3, help="of its hidden states, to be read")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=9)
    parser.add_argument("--num-keep", type=int, default=16, help="visual tokens of an image")
    parser.add_argument("--prompt", default="How many stars are there in the image?")
    parser.add_argument("--output", default="outputs/examples/train")
    return parser.parse_args(words)


if __name__ == "__main__":
    main()
