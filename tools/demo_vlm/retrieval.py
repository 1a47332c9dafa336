"""How well the demo VLM's text tower tells scenes apart, and what it says of their patches.

T texts, P width of the shared space, A captions that patches show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ocvtp.choices import Level
from ocvtp.data.drawing import COLOURS
from ocvtp.data.scenes import draw_scene, scene_style, split_seed
from ocvtp.evaluation.intervals import estimate
from ocvtp.evaluation.tasks.base import Ratio
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.clip_text import load_clip_text
from tools.demo_vlm.batches import image_labels, patch_labels, to_pixels
from tools.demo_vlm.captions import described, pair_captions
from tools.demo_vlm.model import FEATURE_LAYER
from tools.demo_vlm.settings import DemoSettings
from tools.demo_vlm.text_tower import FOLDER

Figures = dict[str, dict[str, Any]]


def measure_text_tower(settings: DemoSettings) -> dict[str, Figures]:
    """Figures of the saved text tower on scenes of `settings.report`.

    Returns:
        By level, each with its 95% interval. `caption`: share of scenes whose nearest of all
        captions like "a red star" is true. `chance`: the same of a random caption. `patches`: the
        chance that a patch of what a true caption is about is nearer to it than another patch of
        the scene (area under the ROC curve), in the layer that the language model reads.
    """
    model, _ = load_model(settings.output, "float32", settings.device)
    tower = model.model.vision_tower
    clip = load_clip_text(tower, Path(settings.output) / FOLDER)
    return {level: _measure(settings, level, tower, clip) for level in settings.report.levels}


@torch.no_grad()
def _measure(settings: DemoSettings, level: Level, tower: Any, clip: Any) -> Figures:
    captions = pair_captions()
    texts = clip.encode([caption.text for caption in captions])[0][:, 0]
    texts = _unit(texts)  # [T, P]
    about = described(captions)
    norm = getattr(tower, "vision_model", tower).post_layernorm
    stream, size = split_seed(settings.report.split, settings.seed), settings.model.image_size
    found: dict[str, list[Tensor]] = {"caption": [], "chance": [], "patches": []}
    for index in range(settings.report.num_images):
        scene = draw_scene(stream, index, size, style=scene_style(level))
        fits = (about @ image_labels(scene)["kinds"] > 0).float()  # [T]
        out = tower(to_pixels(scene.image)[None].to(texts.device), output_hidden_states=True)
        image = clip.visual_projection(out.pooler_output)[0]
        found["caption"].append(fits[(texts @ image).argmax()][None])
        found["chance"].append(fits.mean()[None])
        patches = clip.visual(norm, out.hidden_states[FEATURE_LAYER][0, 1:])
        labels = patch_labels(scene, settings.model.patch_size)
        pair = (labels["shape"] - 1) * len(COLOURS) + labels["colour"]
        asked = pair[labels["shape"] > 0].unique()  # [A] in the order of the captions
        near = (texts @ _unit(patches).T).cpu()[asked]
        found["patches"].append(roc_areas(near, pair == asked[:, None]))
    return {name: _figure(values) for name, values in found.items()}


def roc_areas(scores: Tensor, positive: Tensor) -> Tensor:
    """[A] the share of pairs of a positive and a negative that scores put in order; ties are half.

    Args:
        scores: [A, N]. positive: [A, N] bool, in every row some and not all.
    """
    above = (scores[:, :, None] - scores[:, None]).sign() / 2 + 0.5  # [A, N, N]
    pairs = (positive[:, :, None] & ~positive[:, None]).float()
    return (above * pairs).sum((1, 2)) / pairs.sum((1, 2))


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def _figure(values: Sequence[Tensor]) -> dict[str, Any]:
    """The mean over all, with an interval over scenes: [1] or [A] of each."""
    hits = torch.cat(list(values)).double().numpy()
    owners = np.repeat(np.arange(len(values)), [len(some) for some in values])
    return asdict(estimate(Ratio(hits, np.ones_like(hits), owners)))
