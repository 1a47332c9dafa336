"""Models and processors by name: a folder, a hub id, or random weights that need no download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ocvtp.choices import TINY_MODELS
from ocvtp.hosts.prompt.clip_text import find_clip
from ocvtp.hosts.registry import hosts
from ocvtp.images import open_image as open_image  # users import it from here too
from ocvtp.pruners.base import Pruner
from ocvtp.random_models import full_size
from ocvtp.random_models.byte_tokenizer import byte_tokenizer
from ocvtp.shipped import find_weights

_TINY = "random:tiny-"
RANDOM_MODELS = TINY_MODELS
FULL_SIZE_MODELS = tuple(f"random:{name}" for name in full_size.FULL_SIZE_MODELS)
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A vision-language model in evaluation mode, and its processor.

    Args:
        name: folder or hub id; or random weights, whose answers mean nothing: one of
            `RANDOM_MODELS` (tiny; those of registered hosts too) or of `FULL_SIZE_MODELS` (real
            sizes, for times and FLOPs).
        dtype: `auto` (as saved; float16 becomes float32 on a CPU, where it is slow), `float32`,
            `bfloat16` or `float16`. Of the weights: buffers keep their precision (rotary
            frequencies in bfloat16 are wrong by whole positions).
        device: e.g. `cpu`, `cuda`.

    Raises:
        ValueError: if there is no such model, dtype or device.
    """
    check_place(dtype, device)
    if name in FULL_SIZE_MODELS:
        return full_size.build(name.removeprefix("random:"), dtype, device)
    if name.startswith("random:"):
        model, processor = _random_model(name)
        if dtype != "auto":
            _cast_weights(model, getattr(torch, dtype))
    else:
        from transformers import AutoConfig, AutoModelForImageTextToText

        processor = load_processor(name)
        with _loading(name):
            source = find_weights(name)
            if dtype == "auto" and torch.device(device).type == "cpu":
                saved = AutoConfig.from_pretrained(source).dtype
                dtype = "float32" if saved == torch.float16 else dtype
            model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    return model.to(device).eval(), processor


def load_processor(name: str) -> Any:
    """The processor of `load_model` alone, which is there at once.

    Args:
        name: see there.

    Raises:
        ValueError: if there is no such model.
    """
    if name in FULL_SIZE_MODELS:
        return full_size.processor(name.removeprefix("random:"))
    if name.startswith("random:"):
        return _random_model(name)[1]
    from transformers import AutoProcessor

    with _loading(name):
        return AutoProcessor.from_pretrained(find_weights(name))


def empty_model(name: str) -> Any:
    """The model of `load_model` on the device `meta`: its modules, and no weights.

    Args:
        name: see there.

    Raises:
        ValueError: if there is no such model.
    """
    from transformers import AutoModelForImageTextToText

    config = load_config(name)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """What transformers raises in the block, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={name!r} cannot be loaded ({' '.join(str(error).split())[:300]}); pass a folder"
            " or hub id of a vision-language model, or one of"
            f" {[*_tiny_models(), *FULL_SIZE_MODELS]}."
        ) from error


def check_model(
    name: str,
    dtype: str,
    device: str,
    pruners: Sequence[Pruner] = (),
    text_tower: str | None = None,
    *,
    reads_clip: bool = False,
) -> None:
    """Refuse what `load_model` and `attach` would, where no weights need be read to know it.

    Args:
        name: see `load_model`. dtype: see there. device: see there.
        pruners: that will be attached.
        text_tower: name of a CLIP, see `attach`.
        reads_clip: whether that is read in any case.

    Raises:
        ValueError: for a precision and a device that cannot be used, for a `text_tower` that is no
            CLIP, and for pruners that compare images with the prompt where there is none for it.
    """
    check_place(dtype, device)
    if reads_clip or any(pruner.tower_needs.clip for pruner in pruners):
        tower = getattr(load_config(name), "vision_config", None)
        if getattr(tower, "model_type", None) == "clip_vision_model":  # others have no CLIP at all
            find_clip(tower, text_tower, find_weights(name))


def check_place(dtype: str, device: str) -> None:
    """Refuse a precision that is none of `DTYPES`, and a device that cannot be used.

    Raises:
        ValueError: for these.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}; pass {', '.join(DTYPES[:-1])} or {DTYPES[-1]}.")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        here = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ValueError(
            f"device={device!r} cannot be used ({reason}); pass {' or '.join(here)}."
        ) from error


def load_config(name: str) -> Any:
    """The configuration of a model of transformers; no weights are read or made.

    Args:
        name: see `load_model`; a name of `FULL_SIZE_MODELS` needs no `random:`.

    Raises:
        ValueError: if there is no such model.
    """
    if name in full_size.FULL_SIZE_MODELS or name in FULL_SIZE_MODELS:
        return full_size.config_of(name.removeprefix("random:"))
    if name.startswith("random:"):
        return _random_model(name)[0].config
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(find_weights(name))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={name!r} has no configuration that can be read"
            f" ({' '.join(str(error).split())[:300]}); pass a folder or hub id of a vision-language"
            f" model, or one of {[*full_size.FULL_SIZE_MODELS, *_tiny_models()]}."
        ) from error


def _random_model(name: str) -> tuple[Any, Any]:
    host = hosts().get(name.removeprefix(_TINY))
    if not name.startswith(_TINY) or host is None or host.tiny is None:
        known = [*_tiny_models(), *FULL_SIZE_MODELS]
        raise ValueError(f"{name!r} is unknown; random models are {known}.")
    return host.tiny.make(byte_tokenizer(host.tiny.special_tokens))


def _tiny_models() -> list[str]:
    """`RANDOM_MODELS`, and those of hosts from outside."""
    return [f"{_TINY}{name}" for name, host in hosts().items() if host.tiny is not None]


def _cast_weights(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters, and leave buffers as they are."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
