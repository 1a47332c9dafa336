"""Every registered pruner on Qwen-VL models with their own processors, and the commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_reference import Looked, by_unit, look_at_all, shorten
from reference import assert_close
from small_networks import network_setting
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import ocvtp
from ocvtp import Pruner, VisualTokens, build_pruner
from ocvtp.cli import main
from ocvtp.hosts import find_host
from ocvtp.hosts.loading import RANDOM_MODELS
from ocvtp.random_models.byte_tokenizer import byte_tokenizer
from ocvtp.random_models.tiny_qwen import SPECIAL_TOKENS, tiny_qwen, tiny_qwen2, tiny_qwen3

pytestmark = pytest.mark.sampled(2)

MODELS = [name for name in RANDOM_MODELS if "qwen" in name]
FAMILIES = {"Qwen2-VL": tiny_qwen2, "Qwen2.5-VL": tiny_qwen, "Qwen3-VL": tiny_qwen3}
WORDS = ["what is it?", "how many are there, and where?"]
OWN = [0, 1, 1]  # whose words each image goes with
SAME = [(4, 5)] * 3  # rows and columns of units
MIXED = [(4, 5), (7, 4), (3, 8)]
NEED_GRID = ("hiprune", "pool", "surprise")
SETTINGS: dict[str, dict[str, Any]] = {"hiprune": {"object_block": 2, "alpha": 0.9}}
REFUSED = ("cdpruner", "fastervlm", "holov", "prumerge", "prumerge_plus", "ridge", "scope", "todre")
REFUSED += ("surprise", "trim", "visionzip", "vispruner")
CASES: list[tuple[str, dict[str, Any]]] = [
    (name, {}) for name in ocvtp.list_pruners("llm_input") if name not in REFUSED
]
WITHOUT_CLS: dict[str, dict[str, Any]] = {
    "ridge": {"weights": "received"},
    "surprise": {"attention_power": 0.0},
    "visionzip": {"guidance": "received", "block": -1},
}
CASES += [*WITHOUT_CLS.items(), ("ridge", {"weights": "none"})]
CASES += [("fopru", {"block": -1}), ("fps", {"space": "projected"})]


FASTER = {"Qwen2.5-VL"}
"""The families share what pruners see: of the others slow tests are enough."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name in FASTER else [pytest.mark.slow]) for name in FAMILIES
    ],
)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def random_qwen(family: str) -> Any:
    return FAMILIES[family](byte_tokenizer(SPECIAL_TOKENS))


def build(name: str, num_keep: int = 6, **settings: Any) -> Pruner:
    settings = (
        SETTINGS.get(name, {}) | network_setting(name, 64, (4, 5), projected_dim=96) | settings
    )
    return build_pruner(name, num_keep=num_keep, **settings)


def prompts_about(processor: Any, sizes: list[tuple[int, int]], side: str = "left") -> Any:
    """A row about one image, one about none, one about two."""
    random, unit = np.random.default_rng(0), 2 * processor.image_processor.patch_size
    shapes = [(rows * unit, columns * unit, 3) for rows, columns in sizes]
    pixels = [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]
    rows = []
    for number, words in ((1, WORDS[0]), (0, "nothing to see"), (2, WORDS[1])):
        content = [{"type": "image"}] * number + [{"type": "text", "text": words}]
        message = {"role": "user", "content": content}
        rows.append(processor.apply_chat_template([message], add_generation_prompt=True))
    processor.tokenizer.padding_side = side
    pictures = [Image.fromarray(image) for image in pixels]
    return dict(processor(images=pictures, text=rows, padding=True, return_tensors="pt"))


@torch.no_grad()
def tokens_by_hand(
    model: Any, processor: Any, images: list[Looked], grid: tuple[int, int]
) -> VisualTokens:
    """Everything that a pruner may read."""

    def together(of: Callable[[Looked], Tensor]) -> Tensor:
        return pad_sequence([of(image) for image in images], batch_first=True)

    embed = model.get_input_embeddings()
    words = [processor.tokenizer(w, add_special_tokens=False)["input_ids"] for w in WORDS]
    said = [embed(torch.tensor(words[row])) for row in OWN]
    projected = together(lambda image: image.projected)
    valid = together(lambda image: torch.ones(len(image.projected)).bool())
    attention = {}
    for block in (2, -2, -1):
        attention[block, "received"] = together(lambda image, b=block: image.received(b))
        attention[block, "given"] = together(lambda image, b=block: image.given(b))
    return VisualTokens(
        features=projected,
        grid_hw=grid,
        valid=None if valid.all() else valid,
        hidden={3: together(lambda image: by_unit(image.hidden[3]))},
        attention=attention,  # type: ignore[arg-type]
        keys={b: together(lambda image, b=b: by_unit(image.keys[b])) for b in (-2, -1)},
        num_heads=4,
        projected=projected,
        text=pad_sequence(said, batch_first=True),
        text_valid=pad_sequence([torch.ones(len(s)).bool() for s in said], batch_first=True),
    )


@pytest.mark.covering(2)
@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sizes", [SAME, MIXED], ids=["same", "mixed"])
@pytest.mark.parametrize(("name", "settings"), CASES)
@torch.no_grad()
def test_answers_are_those_of_prompts_made_by_hand(
    random_qwen: Any, name: str, settings: dict[str, Any], sizes: Any, side: str
) -> None:
    model, processor = random_qwen
    pruner, inputs = build(name, **settings), prompts_about(processor, sizes, side)
    if name in NEED_GRID and sizes is MIXED:
        with pruner(model, processor=processor), pytest.raises(ValueError, match="grid"):
            model(**inputs)
        return
    images = look_at_all(model, inputs)
    tokens = tokens_by_hand(model, processor, images, (4, 5) if sizes is SAME else (0, 0))
    expected = pruner.select(tokens).in_raster_order()
    places = []
    for i, keep in enumerate(expected.keep_indices):
        real = slice(None) if expected.valid is None else expected.valid[i]
        places.append(keep[real].tolist())
        if expected.merge is not None:
            weights = expected.merge[i][real, 1:]
            for rows in (images[i].projected, *images[i].deepstack):
                rows[keep[real]] = weights[:, : len(rows)] @ rows.clone()
    short = shorten(model, inputs, places, side, images)  # type: ignore[arg-type]
    prompts: list[Any] = []
    with pruner(model, on_prune=prompts.append, processor=processor):
        logits = model(**inputs).logits
    assert prompts[0].selection.keep_indices.equal(expected.keep_indices)
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", sorted({name for name, _ in CASES} - {"random", *NEED_GRID}))
def test_a_batch_answers_as_its_rows_do(random_qwen: Any, name: str) -> None:
    model, processor = random_qwen
    pruner = build(name, **WITHOUT_CLS.get(name, {}))
    inputs = prompts_about(processor, MIXED)
    new = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    patches = inputs["image_grid_thw"].prod(dim=1).tolist()
    with pruner(model, processor=processor):
        together = model.generate(**inputs, **new)[:, -4:]
        for row, images in ((0, slice(0, 1)), (1, slice(0, 0)), (2, slice(1, 3))):
            real = inputs["attention_mask"][row].bool()
            per_token = ("input_ids", "attention_mask", "mm_token_type_ids")
            alone = {key: inputs[key][row : row + 1, real] for key in per_token}
            if images.stop > images.start:
                own = slice(sum(patches[: images.start]), sum(patches[: images.stop]))
                alone["image_grid_thw"] = inputs["image_grid_thw"][images]
                alone["pixel_values"] = inputs["pixel_values"][own]
            assert model.generate(**alone, **new)[:, -4:].equal(together[row : row + 1])


@pytest.mark.parametrize("name", REFUSED)
def test_pruners_without_what_they_read_are_refused(
    random_qwen: Any, family: str, name: str
) -> None:
    model, processor = random_qwen
    with pytest.raises(ValueError, match=f"{family}.*a pruner"):
        ocvtp.attach(model, build(name), processor=processor)


def test_pictures_are_what_the_processor_made(random_qwen: Any) -> None:
    model, processor = random_qwen
    size = np.array([4, 5]) * 2 * processor.image_processor.patch_size
    gradient = np.linspace(0, 255, size.prod() * 3).reshape(*size, 3).astype(np.uint8)
    images = processor.image_processor(images=Image.fromarray(gradient), return_tensors="pt")
    seen = find_host(model).picture(dict(images))
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    back = seen.permute(1, 2, 0) * torch.tensor(std) + torch.tensor(mean)
    assert (back * 255 - torch.tensor(gradient)).abs().max() < 1


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.mark.parametrize("model", MODELS)
def test_answer(capsys: pytest.CaptureFixture[str], photo: str, model: str) -> None:
    words = ["answer", "--model", model, "--pruner", "divprune", "--num-keep", "7", "--json"]
    words += ["--image", photo, photo, "--prompt", "what is it?", "--max-new-tokens", "4"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    tokens = 5 * 6 if "qwen3" in model else 5 * 7  # units of 32 pixels, or 28
    assert found["visual_tokens"] == [tokens] * 2
    assert found["visual_tokens_kept"] == [7, 7]
    assert found["prompt_tokens"] - found["prompt_tokens_kept"] == 2 * (tokens - 7)


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("model", MODELS)
def test_show(capsys: pytest.CaptureFixture[str], photo: str, tmp_path: Path, model: str) -> None:
    path = str(tmp_path / "kept.png")
    words = ["show", "--model", model, "--pruner", "visiondrop", "uniform", "--num-keep", "8"]
    words += ["--image", photo, "--prompt", "what?", "--output", path, "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == {"visiondrop": 8, "uniform": 8}
    with Image.open(path) as picture:
        assert picture.width > picture.height
