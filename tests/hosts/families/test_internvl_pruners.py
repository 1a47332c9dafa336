"""Every registered pruner on InternVL with its own processor, and the commands.

T tiles of all images, U views that pruners see, M tokens of a view.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import Short, assert_close
from reference_internvl import Cell, projected, shorten_internvl, tiles_of, views
from small_networks import network_setting
from test_internvl import by_hand
from test_llava_pruners import CASES as OF_ALL
from tiny_models import IMAGE_TOKEN
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import ocvtp
from ocvtp import Needs, Pruner, Selection, VisualTokens, build_pruner
from ocvtp.cli import main
from ocvtp.hosts.prompt.user_words import Prompts
from ocvtp.random_models.byte_tokenizer import byte_tokenizer
from ocvtp.random_models.tiny_internvl import SPECIAL_TOKENS, tiny_internvl
from ocvtp.structures import AttentionKind

pytestmark = pytest.mark.sampled(1)

WORDS = ["what is it?", "how many are there, and where?"]
OWN = [0, 1, 1]  # whose words each image goes with
SAME = [(112, 112)] * 3  # pixels: a single tile
MIXED = [(200, 210), (112, 112), (230, 112)]
NUM_TILES = [5, 1, 3]
REFUSED = ("cdpruner", "trim")
CASES = [(name, settings) for name, settings in OF_ALL if name not in REFUSED]
# which tokens of several tiles are not
ON_GRIDS = [("pool", {}), ("surprise", {}), ("fopru", {"strategy": "row"})]
SHOWN = {
    "one_tile": (SAME, "per_image", "left"),
    "tiles": (MIXED, "per_image", "right"),
    "each_tile": (MIXED, "per_tile", "left"),
}
shown = pytest.mark.parametrize(("sizes", "budget", "side"), SHOWN.values(), ids=SHOWN.keys())
KINDS: tuple[AttentionKind, ...] = ("cls", "cls_sharpest", "received", "given")
EVERYTHING = Needs(
    hidden=(3,),
    attention=tuple((b, kind) for b in (2, -2, -1) for kind in KINDS),
    keys=(2, -2, -1),
)


@pytest.fixture(scope="module")
def random_internvl() -> Any:
    model, processor = tiny_internvl(byte_tokenizer(SPECIAL_TOKENS))
    return model, processor


def build(name: str, num_keep: int | None = 6, **settings: Any) -> Pruner:
    settings |= network_setting(name, 64, projected_dim=96)
    if name == "hiprune":
        settings["object_block"] = 2
    return build_pruner(name, num_keep=num_keep, **settings)


def prompts_about(processor: Any, sizes: Any, side: str = "left") -> Any:
    """A row about one image, one about none, one about two."""
    random = np.random.default_rng(0)
    pictures = [
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes
    ]
    rows = []
    for number, words in ((1, WORDS[0]), (0, "nothing to see"), (2, WORDS[1])):
        content = [{"type": "image"}] * number + [{"type": "text", "text": words}]
        message = {"role": "user", "content": content}
        rows.append(processor.apply_chat_template([message], add_generation_prompt=True))
    processor.tokenizer.padding_side = side
    made = processor(images=pictures, text=rows, padding=True, return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def with_its_placeholder(model: Any, inputs: Any) -> Any:
    """The same for the reference, which looks for a token that none of the words is."""
    ids = inputs["input_ids"]
    assert not (ids == IMAGE_TOKEN).any()
    return inputs | {"input_ids": ids.masked_fill(ids == model.config.image_token_id, IMAGE_TOKEN)}


@torch.no_grad()
def tokens_by_hand(
    model: Any, processor: Any, inputs: Any, looks: list[list[Cell]], needs: Needs
) -> VisualTokens:
    """Everything that a pruner may read."""
    tiled = by_hand(model, inputs["pixel_values"], needs)
    image_of = [i for i, count in enumerate(tiles_of(inputs)) for _ in range(count)]
    seen: dict[str, Any] = {"hidden": {}, "attention": {}}
    for name, values in tiled.items():
        kind, *rest = name.split()
        if kind in ("cls_keys", "cls_queries") or name == "cls":  # of the thumbnail
            found = torch.stack([values[view[-1][0]] for view in looks])
        else:
            found = pad_sequence([torch.stack([values[c] for c in v]) for v in looks], True)
        if not rest:
            seen[name] = found
        elif kind in KINDS:
            seen["attention"][int(rest[0]), kind] = found
        else:
            seen.setdefault(kind, {})[int(rest[0])] = found
    embed = model.get_input_embeddings()
    words = [processor.tokenizer(w, add_special_tokens=False)["input_ids"] for w in WORDS]
    said = [embed(torch.tensor(words[OWN[image_of[view[0][0]]]])) for view in looks]
    valid = pad_sequence([torch.ones(len(view)).bool() for view in looks], True)
    return VisualTokens(
        grid_hw=(4, 4),
        valid=None if valid.all() else valid,
        num_heads=4,
        text=pad_sequence(said, True),
        text_valid=pad_sequence([torch.ones(len(s)).bool() for s in said], True),
        **seen,
    )


@torch.no_grad()
def shortened(
    model: Any, inputs: Any, tokens: VisualTokens, selection: Selection, looks: Any, side: Any
) -> Short:
    """The prompt with what is kept, mixed by hand where it is to be."""
    selection = selection.in_raster_order()
    rows, kept = projected(model, inputs["pixel_values"]), []
    for number, view in enumerate(looks):
        for k, place in enumerate(selection.keep_indices[number].tolist()):
            if selection.valid is not None and not selection.valid[number, k]:
                continue
            kept.append(view[place])
            if selection.merge is not None:
                assert tokens.cls is not None
                states = torch.cat([tokens.cls[number : number + 1], tokens.features[number]])
                mixed = selection.merge[number, k] @ states
                rows[view[place]] = model.model.multi_modal_projector(mixed)
    return shorten_internvl(model, inputs, kept, side, rows)


@pytest.mark.slow
@shown
@pytest.mark.parametrize(("name", "settings"), CASES)
@torch.no_grad()
def test_answers_are_those_of_prompts_made_by_hand(
    random_internvl: Any, name: str, settings: Any, sizes: Any, budget: Any, side: Any
) -> None:
    model, processor = random_internvl
    pruner, inputs = build(name, **settings), prompts_about(processor, sizes, side)
    theirs, prompts = with_its_placeholder(model, inputs), list[Any]()
    assert tiles_of(theirs) == ([1, 1, 1] if sizes is SAME else NUM_TILES)
    looks = views(theirs, budget)
    with pruner(model, budget=budget, processor=processor, on_prune=prompts.append):
        if (name, settings) in ON_GRIDS and sizes is MIXED and budget == "per_image":
            with pytest.raises(ValueError, match="grid"):
                model(**inputs)
            return
        logits = model(**inputs).logits
    needs = Needs(**vars(EVERYTHING) | {"patch_queries": pruner.needs.patch_queries})
    tokens = tokens_by_hand(model, processor, theirs, looks, needs)
    expected, found = pruner.select(tokens), prompts[0].selection
    real = torch.ones_like(found.keep_indices).bool() if found.valid is None else found.valid
    assert real.equal(torch.ones_like(real) if expected.valid is None else expected.valid)
    assert found.keep_indices[real].equal(expected.keep_indices[real])
    short = shortened(model, theirs, tokens, expected, looks, side)
    real = short.mask.bool()
    assert_close(logits[real], short.logits()[real], 1e-5)


def single(inputs: Any, row: int) -> Any:
    """One row of `MIXED` without its padding."""
    real = inputs["attention_mask"][row].bool()
    alone = {name: inputs[name][row : row + 1, real] for name in ("input_ids", "attention_mask")}
    own = {0: slice(0, 5), 2: slice(5, 9)}
    return alone | ({"pixel_values": inputs["pixel_values"][own[row]]} if row in own else {})


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["per_image", "per_tile"])
@pytest.mark.parametrize(
    "name", sorted({name for name, _ in CASES} - {"random", "pool", "surprise"})
)
def test_a_batch_answers_as_its_rows_do(random_internvl: Any, budget: Any, name: str) -> None:
    model, processor = random_internvl
    pruner, inputs = build(name), prompts_about(processor, MIXED)
    new = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with pruner(model, budget=budget, processor=processor):
        together = model.generate(**inputs, **new)[:, -4:]
        alone = [model.generate(**single(inputs, row), **new)[:, -4:] for row in range(3)]
    assert together.equal(torch.cat(alone))


@torch.no_grad()
def test_tiles_do_not_count_as_images_of_a_prompt(
    random_internvl: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates write other things around one image than around several."""
    model, processor = random_internvl
    seen, words = [], Prompts.words

    def spy(self: Prompts, ids: Tensor, real: Tensor, num_images: Any) -> Tensor:
        seen.append(list(num_images))
        return words(self, ids, real, num_images)

    monkeypatch.setattr(Prompts, "words", spy)
    for budget in ("per_image", "per_tile"):
        with build("zspaprune")(model, budget=budget, processor=processor):
            model(**prompts_about(processor, MIXED))
    assert seen == [[1, 2], [1, 2]]


@pytest.mark.parametrize("name", REFUSED)
def test_pruners_without_what_they_read_are_refused(random_internvl: Any, name: str) -> None:
    model, processor = random_internvl
    with pytest.raises(ValueError, match="InternVL are not; use a pruner"):
        ocvtp.attach(model, build(name), processor=processor)


def test_frames_of_videos_are_images(random_internvl: Any) -> None:
    model, processor = random_internvl
    frames = np.random.default_rng(0).integers(0, 256, (3, 112, 112, 3), dtype=np.uint8)
    made = processor(text=["<video>\nwhat?"], videos=[torch.tensor(frames).permute(0, 3, 1, 2)])
    inputs = {name: torch.as_tensor(np.array(made[name])) for name in ("input_ids", "pixel_values")}
    prompts: list[Any] = []
    with torch.no_grad(), build("uniform")(model, on_prune=prompts.append):
        model(**inputs)
    assert prompts[0].summary()["visual_tokens_kept"] == [6, 6, 6]


# --------------------------------------------------------------------------------- the commands


@pytest.fixture
def photo(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (112, 230, 3), dtype=np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture
def loaded(random_internvl: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for command in ("answer", "show"):
        path = f"ocvtp.commands.{command}.load_model"
        monkeypatch.setattr(path, lambda *_: random_internvl)
    return ["--model", "an InternVL"]


def test_answer(capsys: pytest.CaptureFixture[str], loaded: list[str], photo: str) -> None:
    words = ["answer", *loaded, "--pruner", "zspaprune", "--num-keep", "7", "--json"]
    words += ["--image", photo, photo, "--prompt", "what is it?", "--max-new-tokens", "4"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["visual_tokens"] == [48, 48]
    assert found["visual_tokens_kept"] == [7, 7]
    assert found["prompt_tokens"] - found["prompt_tokens_kept"] == 2 * (48 - 7)


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "kept"), [("per_image", 8), ("per_tile", 24)])
def test_show(
    capsys: pytest.CaptureFixture[str],
    loaded: list[str],
    photo: str,
    tmp_path: Path,
    budget: str,
    kept: int,
) -> None:
    path = str(tmp_path / "kept.png")
    words = ["show", *loaded, "--pruner", "fastervlm", "uniform", "--num-keep", "8"]
    words += ["--budget", budget, "--image", photo, "--output", path, "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kept"] == {"fastervlm": kept, "uniform": kept}
    assert found["visual_tokens"] == 48
    with Image.open(path) as picture:
        assert picture.width > picture.height


def test_a_pipeline(random_internvl: Any) -> None:
    from transformers import pipeline

    model, processor = random_internvl
    image = Image.linear_gradient("L").convert("RGB").resize((230, 112))
    content = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    talk = [{"role": "user", "content": content}]
    settings = {"max_new_tokens": 4, "do_sample": False}
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    prompts: list[Any] = []
    with build("fastervlm")(model, on_prune=prompts.append):
        said = pipe(text=talk, generate_kwargs=settings, return_full_text=False)
        inputs = processor.apply_chat_template(
            talk, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :]
    assert prompts[0].summary()["visual_tokens_kept"] == [6]
    assert said[0]["generated_text"] == processor.decode(expected, skip_special_tokens=True)
