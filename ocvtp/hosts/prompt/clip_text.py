"""CLIP's shared space of images and texts, for hosts whose vision tower is a CLIP's.

P width of the shared space, S texts, T parts of a text that CLIP can read, Q parts of all texts.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ocvtp.hosts.prompt.chat_template import find_tokenizer
from ocvtp.shipped import find_weights

TextTower = Any  # a hub id or folder, a CLIPModel, or a pair of a CLIPModel and its tokenizer
_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096, "patch_size": 14}
_KNOWN = (
    ("openai/clip-vit-large-patch14-336", _VIT_L | {"image_size": 336}),
    ("openai/clip-vit-large-patch14", _VIT_L | {"image_size": 224}),
)
_HOW = (
    "pass text_tower=, the hub id or folder of the whole CLIP that the vision tower is from, e.g."
    " 'openai/clip-vit-large-patch14-336' for LLaVA-1.5; in Python also a CLIPModel, or a pair"
    " (CLIPModel, tokenizer)"
)


@dataclass(frozen=True, eq=False)
class ClipText:
    """The parts of a CLIP that a vision tower alone does not have.

    It stays on its device when the host moves: inputs are brought to it.

    Args:
        text_model: reads texts.
        text_projection: maps them to the shared space.
        visual_projection: maps tokens there.
        tokenizer: of the text model.
    """

    text_model: Any
    text_projection: nn.Linear
    visual_projection: nn.Linear
    tokenizer: Any

    @torch.no_grad()
    def visual(self, norm: nn.Module, features: Tensor) -> Tensor:
        """Tokens in the shared space, not normalised.

        Args:
            norm: the one after the host's own tower.
            features: [I, N, D], tokens of one layer of it.

        Returns:
            [I, N, P] on the device of the features and in their precision.
        """
        weight = self.visual_projection.weight
        projected: Tensor = self.visual_projection(norm(features).to(weight.device, weight.dtype))
        return projected.to(features.device, features.dtype)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Texts in the shared space, not normalised.

        A text is cut into parts of as many tokens as CLIP can read, and each is read on its own.

        Args:
            texts: S of them, none empty.

        Returns:
            [S, T, P], and [S, T] bool that marks parts where texts have different numbers of them.
        """
        size = self.text_model.config.max_position_embeddings - 2  # besides BOS and EOS
        start, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        parts: list[list[int]] = []
        counts = []
        for ids in self.tokenizer(list(texts), add_special_tokens=False, verbose=False)[
            "input_ids"
        ]:
            cut = [ids[i : i + size] for i in range(0, len(ids), size)]
            parts += [[start, *part, end] for part in cut]
            counts.append(len(cut))
        embedded = self._read(parts, end)
        rows = embedded.split(counts)
        padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        if len(set(counts)) == 1:
            return padded, None
        numbers = torch.arange(max(counts), device=padded.device)
        return padded, numbers < torch.tensor(counts, device=padded.device)[:, None]

    def _read(self, parts: Sequence[Sequence[int]], pad_id: int) -> Tensor:
        """[Q, P] from each part's last token, the EOS."""
        device = self.text_projection.weight.device
        lengths = torch.tensor([len(part) for part in parts], device=device)
        rows = [torch.tensor(part, device=device) for part in parts]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        states = self.text_model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        pooled = states[torch.arange(len(ids), device=device), lengths - 1]
        return torch.as_tensor(self.text_projection(pooled))


def load_clip_text(tower: Any, text_tower: TextTower = None, folder: str = "") -> ClipText:
    """The CLIP that belongs to a vision tower.

    Args:
        tower: a CLIP's, of transformers.
        text_tower: hub id or folder of a whole CLIP, or `random:tiny` (random weights that mean
            nothing, for the tower of that name); a `CLIPModel`; or a pair of one and its tokenizer
            or processor. None: the CLIP that is known to belong to the tower, if it is on this
            machine: nothing is downloaded.
        folder: of the model that the tower is from; a CLIP in it is named where one lacks.

    Raises:
        ValueError: if there is none, or it does not fit the tower.
    """
    tokenizer = None
    if text_tower is None or isinstance(text_tower, (str, Path)):
        name = find_clip(tower.config, text_tower, folder)
        model, tokenizer = _named(name, tower, is_known=text_tower is None)
    elif isinstance(text_tower, (tuple, list)) and len(text_tower) == 2:
        model, tokenizer = text_tower[0], find_tokenizer(text_tower[1])
    else:
        model = text_tower
    if not all(hasattr(model, part) for part in ("vision_model", "text_model", *_PROJECTIONS)):
        raise ValueError(f"text_tower is a {type(model).__name__}, no CLIPModel; {_HOW}.")
    if tokenizer is None:
        tokenizer = _tokenizer_of(model)
    _check_tokenizer(model, tokenizer)
    _check_vision(model, tower)
    return ClipText(model.text_model, model.text_projection, model.visual_projection, tokenizer)


_PROJECTIONS = ("text_projection", "visual_projection")


def find_clip(config: Any, text_tower: str | Path | None = None, folder: str = "") -> str:
    """The name of the CLIP that belongs to a vision tower; no weights are read.

    Args:
        config: of the tower. text_tower: a name, see `load_clip_text`. folder: see there.

    Raises:
        ValueError: if there is none, or what is there is no CLIP.
    """
    if text_tower is None:
        name = _known(config, folder)
        with _lacking(name):
            _check_type(name, local_files_only=True)
    elif not (name := str(text_tower)).startswith("random:"):
        with _loading(name):
            _check_type(find_weights(name), local_files_only=False)
    return name


def _known(config: Any, folder: str) -> str:
    """The CLIP that is known to belong to a tower of this configuration."""
    for name, settings in _KNOWN:
        if all(getattr(config, k, None) == v for k, v in settings.items()):
            return name
    there = _clip_in(folder)
    how = _HOW if there is None else f"pass text_tower={there!r}, which lies in the model's folder"
    raise ValueError(
        "the pruner compares images with the prompt by CLIP's text tower, which this model does not"
        f" carry; {how}."
    )


@contextmanager
def _lacking(name: str) -> Iterator[None]:
    """A known CLIP that is not on this machine is to be asked for."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            "the pruner compares images with the prompt by CLIP's text tower, which this model does"
            f" not carry; pass text_tower={name!r} to load (and download) the one that belongs to"
            " its vision tower, or a folder that holds it."
        ) from error


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What transformers raises in the block, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text_tower={name!r} cannot be loaded ({' '.join(str(error).split())[:300]}); {_HOW}."
        ) from error


def _clip_in(folder: str) -> str | None:
    """The first folder inside of a model's that says of itself that it is a whole CLIP."""
    for path in sorted(Path(folder).glob("*/config.json")) if folder else ():
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(config, dict) and config.get("model_type") == "clip":
            return str(path.parent)
    return None


def _named(name: str, tower: Any, is_known: bool) -> tuple[Any, Any]:
    """The CLIP of a name, and its tokenizer; nothing is downloaded of one that nobody named."""
    if name.startswith("random:"):
        from ocvtp.random_models.tiny_clip import random_clip

        return random_clip(name)
    if is_known:
        with _lacking(name):
            return _from_pretrained(name, tower, local_files_only=True)
    with _loading(name):
        return _from_pretrained(find_weights(name), tower, local_files_only=False)


def _check_type(name: str, local_files_only: bool) -> None:
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(name, local_files_only=local_files_only).model_type
    if kind != "clip":
        raise ValueError(f"it is a {kind}, no whole CLIP")


def _from_pretrained(name: str, tower: Any, local_files_only: bool) -> tuple[Any, Any]:
    """A CLIP on the tower's device and in its precision, and its tokenizer."""
    from transformers import AutoTokenizer, CLIPModel

    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)
    model, info = CLIPModel.from_pretrained(
        name, dtype=tower.dtype, local_files_only=local_files_only, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} weights, e.g. {missing[:2]}")
    return model.to(_device_of(tower)).eval(), tokenizer


def _device_of(tower: Any) -> Any:
    """Where the tower runs; where accelerate brings it if it is offloaded."""
    device = next(tower.parameters()).device
    if device.type != "meta":
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in tower.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), "cpu")


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer saved with a CLIPModel, if it is on this machine."""
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", None)
    try:
        if not name:
            raise ValueError("it was not loaded from anywhere")
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            "text_tower is a CLIPModel whose tokenizer is not on this machine; pass the pair"
            " text_tower=(CLIPModel, tokenizer)."
        ) from error


def _check_tokenizer(model: Any, tokenizer: Any) -> None:
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    vocabulary = model.text_model.config.vocab_size
    if None in ends or len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer of text_tower has {len(tokenizer)} tokens with BOS and EOS {ends}, the"
            f" CLIP reads {vocabulary}; pass the tokenizer that belongs to it."
        )
    # Without files to read, transformers makes a tokenizer that knows no word.
    if set(tokenizer("what", add_special_tokens=False)["input_ids"]) <= {
        *tokenizer.all_special_ids
    }:
        raise ValueError(
            f"the tokenizer of text_tower ({len(tokenizer)} tokens) knows no words: its files are"
            " missing; pass the pair text_tower=(CLIPModel, tokenizer), or a folder with both."
        )


def _check_vision(model: Any, tower: Any) -> None:
    """Whether the CLIP is the one that the tower is from."""
    wide, wanted = model.visual_projection.in_features, tower.config.hidden_size
    if wide != wanted:
        raise ValueError(
            f"the vision side of text_tower is {wide} wide, the model's vision tower {wanted}; pass"
            " the CLIP that this vision tower is from."
        )
    theirs, ours = model.vision_model, tower
    pairs = (
        (theirs.post_layernorm.weight, ours.post_layernorm.weight),
        (theirs.embeddings.class_embedding, ours.embeddings.class_embedding),
    )
    if not all(_is_close(a, b) for a, b in pairs):
        warnings.warn(
            "the vision tower's weights are not those of text_tower: it was trained further, or is"
            " from another CLIP, and then its tokens and the text may have no space in common.",
            stacklevel=2,
        )


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Equal up to bfloat16's rounding; also if one is offloaded, and cannot be compared."""
    if "meta" in (a.device.type, b.device.type):
        return True
    a, b = (t.detach().float().cpu() for t in (a, b))
    return bool((a - b).abs().max() <= 0.01 * a.abs().max())
