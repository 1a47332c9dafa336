"""All of it: draw, encode once, train, assemble and measure; what is done is not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ocvtp.data.resize import claim_folder
from ocvtp.evaluation.conditions import Budget, content_hash
from ocvtp.evaluation.labels import ORACLE, RANDOM
from ocvtp.evaluation.report import results
from ocvtp.evaluation.run import evaluate
from ocvtp.evaluation.runner import Subject
from ocvtp.hosts.loading import load_model
from ocvtp.reporting.files import replacing
from tools.photo_vlm.card import card
from tools.photo_vlm.composites import Painter, split_photos
from tools.photo_vlm.cutouts import Cutouts, cut_out
from tools.photo_vlm.folders import assemble, save_reader
from tools.photo_vlm.learner import Learner
from tools.photo_vlm.model import build_processor
from tools.photo_vlm.questions import Asker
from tools.photo_vlm.settings import PhotoSettings
from tools.photo_vlm.shards import encode_all, read_shards
from tools.photo_vlm.task import CompositeTask
from tools.photo_vlm.test_set import write_test_set
from tools.photo_vlm.tower import convert, read_timm, tower_config
from tools.photo_vlm.training import train

READER, COMPOSITES, WORK = "reader", "composites", "work"
FIGURES_FILE = "figures.json"
SHARE = 9
"""The controls keep one in so many tokens."""

_HELD_OUT = 100  # of the test composites, encoded for the scores that the training prints
_BATCH = 16


def make_model(settings: PhotoSettings) -> Path:
    """Draw, encode, train and assemble.

    The output folder is the whole model. In it are `reader/`, the same without the tower,
    `composites/`, the test set, and `work/`, which may be deleted when all is done.

    Returns:
        the output folder.

    Raises:
        ValueError: if an input is not what it should be, or the folder holds other work.
    """
    root = Path(settings.output)
    cutouts, photos = cut_out(settings.coco, settings.rule), split_photos(settings.photos)
    tower = read_timm(settings.tower, settings.size)
    vision, encoder = tower_config(tower), convert(tower)
    claim_folder(root / WORK, "recipe.json", _recipe(settings, cutouts, photos, encoder))
    categories = cutouts["train"].categories
    painters = {
        split: Painter(cutouts[split], photos[split], settings.size, settings.seed, split)
        for split in ("train", "test")
    }
    asker = Asker(categories, cutouts["train"].together)
    count = (settings.num_test, settings.questions)
    write_test_set(root / COMPOSITES, painters["test"], asker, *count)
    processor = build_processor(settings.tower, settings.size, vision.patch_size, categories)
    nums = {"train": settings.num_train, "test": min(settings.num_test, _HELD_OUT)}
    encoded = {}
    for split, painter in painters.items():
        place = root / WORK / split
        paths = encode_all(painter, encoder, processor.image_processor, place, nums[split])
        encoded[split] = read_shards(paths)
    tokenizer = processor.tokenizer
    learner = Learner(vision, settings.reader, tokenizer, categories, settings.seed)
    place = root / WORK / "training"
    train(learner, settings, encoded["train"], encoded["test"], asker, tokenizer, place)
    save_reader(learner.model, processor, root / READER)
    assemble(root / READER, settings.tower, root)
    return root


def measure(settings: PhotoSettings) -> dict[str, Any]:
    """Figures of the whole model on the test set, in `figures.json` and the card.

    Returns:
        See `ocvtp.evaluation.report.results`: all tokens, on the right picture and on a wrong one;
        and a ninth of them, at random and chosen by the oracle.
    """
    root = Path(settings.output)
    model, processor = load_model(str(root), "float32")
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    report, _ = evaluate(
        Subject(model, processor, str(root)),
        CompositeTask(str(root / COMPOSITES)),
        [],
        [Budget(num_keep=side**2 // SHARE)],
        root / WORK / "answers" / content_hash(str(root))[:16],
        batch_size=_BATCH,
        controls=(RANDOM, ORACLE),
    )
    figures = results(report)
    with replacing(root / FIGURES_FILE) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n")
    own = (p for name, p in model.named_parameters() if "vision_tower" not in name)
    num_parameters = sum(parameter.numel() for parameter in own)
    cutouts = cut_out(settings.coco, settings.rule)
    text = card(settings, figures, model.config, num_parameters, cutouts, SHARE)
    for folder in (root, root / READER):
        with replacing(folder / "README.md") as temporary:
            temporary.write_text(text)
    return figures


def _recipe(
    settings: PhotoSettings,
    cutouts: Mapping[str, Cutouts],
    photos: Mapping[Any, list[Path]],
    tower: Any,
) -> dict[str, Any]:
    """What the composites and what the tower makes of them depend on, as JSON."""
    drawn = hashlib.sha256()
    for split, some in cutouts.items():
        for found in some.by_category.values():
            for cutout in found:
                drawn.update(cutout.pixels.tobytes() + cutout.mask.tobytes())
        drawn.update("\n".join(path.name for path in photos[split]).encode())
    weights = hashlib.sha256()
    for value in tower.state_dict().values():
        weights.update(value.numpy().tobytes())
    facts = {
        "categories": cutouts["train"].categories,
        "rule": asdict(settings.rule),
        "size": settings.size,
        "seed": settings.seed,
        "images": drawn.hexdigest()[:16],
        "tower": weights.hexdigest()[:16],
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain
