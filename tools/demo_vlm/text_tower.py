"""A CLIP text tower for the demo VLM, trained against its finished and frozen vision tower.

Pruners that compare visual tokens with the prompt read the two in CLIP's shared space; a vision
tower that was trained without texts has none. As in CLIP only the CLS learns it: an image is
`visual_projection(post_layernorm(CLS))`, a text `text_projection` of its EOS, and nothing is said
of patches. T are the texts of a step, P is the width of the shared space.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel

from ocvtp.hosts.loading import load_model
from tools.demo_vlm.batches import QuestionEncoder, StageScenes, batches
from tools.demo_vlm.captions import described, object_captions, question_captions
from tools.demo_vlm.processor import text_tower_tokenizer, word_tokenizer
from tools.demo_vlm.settings import DemoSettings, TextTowerSettings
from tools.demo_vlm.training import rate

FOLDER = "clip"
"""Of the whole CLIP, in the folder of the demo VLM."""

_RECIPE_FILE = "recipe.json"
_CAPTIONS = 3  # a stream of random numbers beside those of drawing and of questions
_WEIGHT_DECAY = 0.02


def add_text_tower(settings: DemoSettings, resume: bool = False) -> None:
    """Train the text tower of `settings.text_tower` and write the CLIP, if any is asked for.

    It is trained in one go: a call that was stopped leaves nothing and is begun again, to the same
    weights. `clip/` appears when it is finished.

    Args:
        settings: of the model, which lies in `settings.output`.
        resume: leave a finished one as it is.

    Raises:
        ValueError: if there is one and `resume` is not set, or one of other settings or of another
            vision tower.
    """
    if settings.text_tower is None:
        return
    model, _ = load_model(settings.output, "float32", settings.device)
    tower = model.model.vision_tower
    recipe = _recipe(settings, tower)
    folder = Path(settings.output) / FOLDER
    if folder.exists():
        _check(folder, recipe, resume)
        return
    tokenizer = text_tower_tokenizer(settings.text_tower.max_length)
    clip = build_clip(tower, tokenizer, settings.text_tower, settings.seed).to(settings.device)
    _train(clip, tokenizer, settings)
    with _whole_folder(folder) as temporary:
        clip.to(torch.float16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / _RECIPE_FILE).write_text(json.dumps(recipe, indent=1) + "\n")


def build_clip(tower: Any, tokenizer: Any, settings: TextTowerSettings, seed: int) -> Any:
    """A `CLIPModel` around a vision tower, the rest of it random; only that is trainable.

    Args:
        tower: a CLIP's vision tower, which is copied.
        tokenizer: of the texts.
        settings: sizes.
        seed: of the weights; torch's own random numbers are not touched.
    """
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": settings.dim,
        "intermediate_size": 2 * settings.dim,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.num_heads,
        "max_position_embeddings": settings.max_length,
        "projection_dim": settings.shared_dim,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = tower.config.to_dict() | {"projection_dim": settings.shared_dim}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=settings.shared_dim)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip = CLIPModel(config)
    inner = getattr(tower, "vision_model", tower)  # older releases of transformers wrap it
    clip.vision_model.load_state_dict(inner.state_dict())
    clip.vision_model.requires_grad_(False)
    return clip.eval()


def embed_images(clip: Any, pixel_values: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, P] of length 1."""
    with torch.no_grad():
        pooled = clip.vision_model(pixel_values).pooler_output
    return F.normalize(clip.visual_projection(pooled), dim=1)


def embed_texts(clip: Any, tokens: Any) -> Tensor:
    """Texts as the tokenizer returns them -> [T, P] of length 1."""
    pooled = clip.text_model(
        input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
    ).pooler_output
    return F.normalize(clip.text_projection(pooled), dim=1)


def contrastive_loss(logits: Tensor, fits: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy (arXiv 2103.00020), where several texts may fit an image.

    The mean over what fits is outside of the logarithm, as in supervised contrastive learning
    (arXiv 2004.11362, eq. 2).

    Args:
        logits: [B, B] images against texts. fits: [B, B] 1 where the text is true of the image; at
            least one in every row and column.
    """
    terms = [-((logits.log_softmax(dim) * fits).sum(dim) / fits.sum(dim)).mean() for dim in (0, 1)]
    return torch.stack(terms).mean()


def draw_captions(fits: Tensor, seed: int, step: int) -> Tensor:
    """[B] the number of a text that is true of each image.

    Args:
        fits: [B, T] 1 where a text is true of an image.
        seed: of the training. step: in it.
    """
    chance = np.random.default_rng([seed, step, _CAPTIONS]).random(fits.shape, np.float32)
    return (fits * (torch.from_numpy(chance).to(fits.device) + 1e-6)).argmax(dim=1)


def _train(clip: Any, tokenizer: Any, settings: DemoSettings) -> None:
    own, device = settings.text_tower, settings.device
    assert own is not None
    stage = own.stage
    encoder = QuestionEncoder(word_tokenizer(), english=True)
    scenes = StageScenes(
        settings.model,
        stage,
        len(settings.stages),
        settings.seed,
        encoder,
        "train",
        own.steps * own.batch_size,
    )
    captions = [*object_captions(), *question_captions()]
    tokens = tokenizer([c.text for c in captions], padding=True, return_tensors="pt").to(device)
    about = described(captions).to(device)
    learnt = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        learnt, own.learning_rate, betas=(0.9, 0.95), weight_decay=_WEIGHT_DECAY
    )
    stream = batches(scenes, own.batch_size, 0, settings.num_workers)
    shown = track(stream, stage.name, own.steps, console=Console(stderr=True))
    for step, batch in enumerate(shown):
        batch = batch.to(device)
        fits = (batch.kinds @ about.T > 0).float()
        drawn = draw_captions(fits, settings.seed, step)
        images, texts = embed_images(clip, batch.pixel_values), embed_texts(clip, tokens)
        logits = clip.logit_scale.exp() * images @ texts[drawn].T
        loss = contrastive_loss(logits, fits[:, drawn])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(learnt, 1.0)
        optimizer.param_groups[0]["lr"] = own.learning_rate * rate(stage, step)
        optimizer.step()


def _recipe(settings: DemoSettings, tower: Any) -> dict[str, Any]:
    """What the weights of the text tower depend on."""
    weights = hashlib.sha256()
    for value in tower.state_dict().values():
        weights.update(value.detach().to("cpu", torch.float16).contiguous().numpy().tobytes())
    assert settings.text_tower is not None
    parts = {"text_tower": asdict(settings.text_tower), "seed": settings.seed}
    known: dict[str, Any] = json.loads(json.dumps(parts | {"vision_tower": weights.hexdigest()}))
    return known


def _check(folder: Path, recipe: dict[str, Any], resume: bool) -> None:
    if not resume:
        raise ValueError(
            f"{folder} holds a text tower; pass --resume to keep it, or another --output."
        )
    file = folder / _RECIPE_FILE
    if not file.is_file() or json.loads(file.read_text()) != recipe:
        raise ValueError(
            f"{folder} was trained with other settings of text_tower or the seed, or against"
            " another vision tower; pass the same, remove it, or pass another --output."
        )


@contextmanager
def _whole_folder(folder: Path) -> Iterator[Path]:
    """A folder next to `folder`, renamed to it when the block ends without an error."""
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
