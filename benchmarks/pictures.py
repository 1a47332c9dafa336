"""Draw the README's picture and the image that its code reads: `make pictures`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from ocvtp.cli import main as ocvtp
from ocvtp.data.scenes import draw_scene

IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTION = "How many circles are there in the image?"
PRUNERS = ("ocvtp", "zspaprune", "todre", "divprune", "fastervlm", "random")


def main() -> None:
    """What six pruners keep of one drawn scene on the demo VLM, 16 tokens of 144."""
    scene, kept = IMAGES / "scene.png", IMAGES / "kept.png"
    Image.fromarray(draw_scene(seed=7, index=151).image).save(scene)
    words = ["show", "--model", "checkpoints/demo-vlm", "--pruner", *PRUNERS, "--num-keep", "16"]
    words += ["--checkpoint", "checkpoints/demo-pruner/0", "--prompt", QUESTION]
    ocvtp([*words, "--image", str(scene), "--output", str(kept)])
    drawn = Image.open(kept).convert("RGB")
    small = drawn.resize((1200, round(drawn.height * 1200 / drawn.width)), Image.Resampling.LANCZOS)
    small.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
        kept, optimize=True
    )


if __name__ == "__main__":
    main()
