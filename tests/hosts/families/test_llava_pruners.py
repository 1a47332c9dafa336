"""Every registered pruner on LLaVA, against tokens and prompts that were put together by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import (
    BATCH,
    IMAGE_TOKEN,
    IMG,
    ask,
    assert_close,
    first_patch,
    make_batch,
    make_prompts,
    num_registers,
    project,
    shorten,
    single,
    tower_states,
)
from reference_tower import queries_and_keys
from small_networks import network_setting
from torch import Tensor

import ocvtp
from ocvtp import Compose, Pruner, Selection, VisualTokens, build_pruner
from ocvtp.evaluation.tasks.kept_tokens import kept_cells
from ocvtp.hosts import find_host
from ocvtp.structures import OF_CLS

WORDS = ["what is it?", "how many are there, and where?"]
ROWS = [
    f"USER: <image>\n{WORDS[0]} ASSISTANT:",
    "USER: nothing to see ASSISTANT:",
    f"USER: <image>\n<image>\n{WORDS[1]} ASSISTANT:",
]
OWN = [0, 1, 1]  # whose words each image goes with
SETTINGS: dict[str, dict[str, Any]] = {"hiprune": {"object_block": 2}}
pytestmark = pytest.mark.usefixtures("untouched")


def build(name: str, num_keep: int | None = 6, **settings: Any) -> Pruner:
    settings |= network_setting(name, 32, projected_dim=48)
    return build_pruner(name, num_keep=num_keep, **SETTINGS.get(name, {}), **settings)


@pytest.fixture
def reading(processor: Any, clip: tuple[Any, Any]) -> dict[str, Any]:
    return {"processor": processor, "text_tower": clip}


@torch.no_grad()
def tokens_by_hand(
    model: Any, clip: Any, processor: Any, pixels: Tensor, patch: bool, own: Any = OWN
) -> Any:
    """Everything that any pruner reads, from the eager tower, the CLIP and the embeddings.

    Without a CLIP, what is in its space is left out.
    """
    hidden, attentions = tower_states(model, pixels)
    tower, first = model.model.vision_tower, first_patch(model)
    attention, keys, queries = {}, {}, {}
    for block in (2, -2, -1):
        weights = attentions[block].mean(dim=1)  # [I, T, T]
        rows = weights[:, first:] if patch else weights
        attention[block, "cls"] = weights[:, 0, first:]
        heads = attentions[block][:, :, 0, first:]
        sharpest = heads.log().std(dim=2).argmax(dim=1)
        attention[block, "cls_sharpest"] = heads[torch.arange(len(heads)), sharpest]
        attention[block, "received"] = rows.mean(dim=1)[:, first:]
        attention[block, "given"] = weights[:, first:, first:].mean(dim=2)
        queries[block], keys[block] = queries_and_keys(tower, block, hidden[block - (block < 0)])
    embed = model.get_input_embeddings()
    words = [processor.tokenizer(w, add_special_tokens=False)["input_ids"] for w in WORDS]
    length = max(map(len, words))
    text = torch.zeros(len(own), length, 48)
    valid = torch.zeros(len(own), length, dtype=torch.bool)
    for i, row in enumerate(own):
        text[i, : len(words[row])] = embed(torch.tensor(words[row]))
        valid[i, : len(words[row])] = True
    features, space = hidden[-2][:, first:], {}
    if clip is not None:
        clip_model, clip_tokenizer = clip
        said = [clip_tokenizer(w, return_tensors="pt")["input_ids"] for w in WORDS]
        clip_text = torch.cat([clip_model.get_text_features(ids).pooler_output for ids in said])
        space["clip_visual"] = clip_model.visual_projection(tower.post_layernorm(features))
        space["clip_text"] = clip_text[own][:, None]
    return VisualTokens(
        features=features,
        grid_hw=(4, 4),
        cls=hidden[-2][:, 0],
        hidden={3: hidden[3][:, first:]},
        attention=attention,
        keys={block: k[:, first:] for block, k in keys.items()},
        cls_keys={block: k[:, 0] for block, k in keys.items()},
        cls_queries={block: q[:, 0] for block, q in queries.items()},
        num_heads=4,
        projected=project(model, pixels)[:, num_registers(model) :],
        text=text,
        text_valid=valid,
        **space,
    )


@torch.no_grad()
def read_by_hand(model: Any, tokens: VisualTokens, selection: Selection) -> tuple[Any, Tensor]:
    """The kept places of each image, and what the language model reads there [I, N, D']."""
    rows = tokens.projected.clone()  # type: ignore[union-attr]
    places: list[list[int]] = []
    for i, keep in enumerate(selection.keep_indices):
        real = slice(None) if selection.valid is None else selection.valid[i]
        places.append(keep[real].tolist())
        if selection.merge is not None:
            states = torch.cat([tokens.cls[i : i + 1], tokens.features[i]])  # type: ignore[index]
            mixed = selection.merge[i][real] @ states
            rows[i, keep[real]] = model.model.multi_modal_projector(mixed)
    return places, rows


NAMES = ocvtp.list_pruners("llm_input")
"""Others act in the tower (test_tower_stages.py) or in the language model (test_layers.py)."""
CASES = [(name, {}) for name in NAMES]
CASES += [(name, {"num_keep": None}) for name in ("trim", "prumerge", "prumerge_plus")]
CASES += [("fopru", {"strategy": "row"}), ("visionzip", {"guidance": "received"})]
CASES += [("fps", {"space": "projected"}), ("kmeans", {"space": "projected"})]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_answers_are_those_of_prompts_made_by_hand(
    llava: Any, clip: Any, reading: Any, side: Any, name: str, settings: dict[str, Any]
) -> None:
    pruner, processor = build(name, **settings), reading["processor"]
    inputs = make_prompts(processor, ROWS, side)
    patch = pruner.needs.patch_queries
    tokens = tokens_by_hand(llava, clip, processor, inputs["pixel_values"], patch)
    expected = pruner.select(tokens)
    places, rows = read_by_hand(llava, tokens, expected)
    short = shorten(llava, inputs, places, side, rows)
    prompts: list[Any] = []
    with pruner(llava, on_prune=prompts.append, **reading), torch.no_grad():
        logits = llava(**inputs).logits
        answer = ask(llava, inputs) if side == "left" else None
    found = prompts[0].selection
    assert found.keep_indices.equal(expected.keep_indices)
    assert (found.valid is None) == (expected.valid is None)
    if expected.merge is not None:
        assert_close(found.merge, expected.merge, 1e-5)
    real = short.mask.bool()
    assert_close(logits[real], short.logits(short.positions("contiguous"))[real], 1e-4)
    if answer is not None:
        assert answer.equal(short.greedy(5))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_a_batch_answers_as_its_rows_do(llava: Any, reading: Any, name: str) -> None:
    pruner, inputs = build(name), make_prompts(reading["processor"], ROWS)
    with pruner(llava, **reading):
        together = ask(llava, inputs)
        alone = [ask(llava, single(inputs, row)) for row in range(3)]
    assert together.equal(torch.cat(alone))


@pytest.mark.sampled(9)
@pytest.mark.parametrize("name", NAMES)
def test_a_tower_without_cls(llava_siglip: Any, reading: Any, name: str) -> None:
    """A method runs, or it is refused with a hint at others."""
    pruner, inputs = build(name), make_prompts(reading["processor"], ROWS)
    asks_cls = pruner.needs.cls or pruner.needs.cls_queries
    asks_cls = asks_cls or any(kind in OF_CLS for _, kind in pruner.needs.attention)
    if not asks_cls and not pruner.needs.clip:
        with pruner(llava_siglip, **reading):
            assert ask(llava_siglip, inputs).shape == (3, 5)
        return
    with pytest.raises(ValueError, match="a pruner"):
        ocvtp.attach(llava_siglip, pruner, **reading)


@pytest.mark.covering(1)
@pytest.mark.usefixtures("untouched_dino")
@pytest.mark.parametrize(("name", "settings"), CASES)
@pytest.mark.sampled(4)
def test_dino_towers(llava_dino: Any, processor: Any, name: str, settings: dict[str, Any]) -> None:
    """Registers are read before the tokens of each image, whatever is kept of these."""
    model, registers = llava_dino, num_registers(llava_dino)
    pruner, inputs = build(name, **settings), make_prompts(processor, ROWS, "left", registers)
    if pruner.needs.clip:
        with pytest.raises(ValueError, match=rf"tokens of a {tower_kind(model)} are not; use a"):
            ocvtp.attach(model, pruner, processor=processor)
        return
    tokens = tokens_by_hand(
        model, None, processor, inputs["pixel_values"], pruner.needs.patch_queries
    )
    expected = pruner.select(tokens)
    places, rows = read_by_hand(model, tokens, expected)
    read = torch.cat([project(model, inputs["pixel_values"])[:, :registers], rows], dim=1)
    short = shorten(model, inputs, places, "left", read)
    prompts: list[Any] = []
    with pruner(model, on_prune=prompts.append, processor=processor), torch.no_grad():
        logits = model(**inputs).logits
        together = ask(model, inputs)
        alone = [ask(model, single(inputs, row)) for row in range(3)]
    assert prompts[0].selection.keep_indices.equal(expected.keep_indices)
    real = short.mask.bool()
    assert_close(logits[real], short.logits(short.positions("contiguous"))[real], 1e-4)
    assert together.equal(short.greedy(5))
    assert name == "random" or together.equal(torch.cat(alone))


@pytest.mark.usefixtures("untouched_dino")
@pytest.mark.parametrize("name", ["fastervlm", "pyramiddrop"])
def test_cells_of_dino_towers(llava_dino: Any, name: str) -> None:
    """Registers have no place in the grid, and no row of theirs is a token."""
    settings = {"num_keep": 6} if name == "fastervlm" else {"stages": ((1, 9), (2, 4))}
    registers, host = num_registers(llava_dino), find_host(llava_dino)
    inputs, prompts = make_batch([(2, IMG, 2), (3, IMG)], registers=registers), list[Any]()
    with build_pruner(name, **settings)(llava_dino, on_prune=prompts.append), torch.no_grad():
        llava_dino(**inputs)
    (prompt,) = prompts
    rows = host.tokens_of_rows(prompt.encoded)
    assert rows.tolist() == 2 * ([-1] * registers + list(range(16)))
    assert host.cells(prompt.encoded).tolist() == [list(range(16)), [-1] * 16]
    kept = kept_cells(host, prompt)
    assert kept.shape == (2, 16)
    places = prompt.selection.keep_indices
    if name == "pyramiddrop":
        (stayed,) = [stage for stage in prompt.layers.kept if stage.layer == 2]
        places = stayed.places
    for image, own in enumerate(places):
        assert kept[image].nonzero()[:, 0].tolist() == own[own >= 0].tolist()


def tower_kind(model: Any) -> str:
    return str(model.config.vision_config.model_type)


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("untouched_dino")
@pytest.mark.parametrize("side", ["left", "right"])
def test_dino_towers_keep_all(llava_dino: Any, side: Any) -> None:
    """Bit for bit the bare model, also for images of another size than the settings name."""
    registers = num_registers(llava_dino)
    inputs = make_batch(BATCH, side, registers=registers)
    large = {
        "input_ids": torch.tensor([[1, 5, *[IMAGE_TOKEN] * (registers + 6 * 5), 7]]),
        "pixel_values": torch.randn(1, 3, 6 * 14, 5 * 14),
    }
    for given in (inputs, large):
        with torch.no_grad():
            bare, said = llava_dino(**given).logits, ask(llava_dino, given)
            for pruner in (
                build_pruner("none"),
                build("fopru", None, keep_ratio=1.0),
                build("fastervlm", None, keep_ratio=1.0),
            ):
                with pruner(llava_dino):
                    assert torch.equal(llava_dino(**given).logits, bare)
                    assert ask(llava_dino, given).equal(said)
    with build("fopru", 4)(llava_dino), torch.no_grad():
        assert llava_dino(**large).logits.shape[1] == 3 + registers + 4


def test_merged_tokens_under_their_original_positions(llava: Any, clip: Any, reading: Any) -> None:
    """Every row gets the position of the token in whose place it stands."""
    pruner, processor = build("prumerge"), reading["processor"]
    inputs = make_prompts(processor, ROWS)
    tokens = tokens_by_hand(llava, clip, processor, inputs["pixel_values"], patch=False)
    places, rows = read_by_hand(llava, tokens, pruner.select(tokens).in_raster_order())
    short = shorten(llava, inputs, places, projected=rows)
    with pruner(llava, positions="original"):
        assert ask(llava, inputs).equal(short.greedy(5, "original"))


def test_compose_of_one_stage_is_that_pruner(llava: Any) -> None:
    inputs = {
        "input_ids": torch.tensor([[1, 5] + [IMAGE_TOKEN] * 16 + [7, 8]]),
        "pixel_values": torch.randn(1, 3, 56, 56),
    }
    pruner = build("fopru")
    with pruner(llava):
        alone = ask(llava, inputs)
    with Compose([pruner])(llava):
        assert ask(llava, inputs).equal(alone)


def test_compose_names_the_stage_that_the_host_lacks(internvl: Any) -> None:
    class Early(type(build("uniform"))):  # type: ignore[misc]
        name, stage = "early", "pixels"

    both = Compose([build("fopru"), Early(num_keep=2)])
    assert [part.name for part in both.parts] == ["early", "fopru"]
    with pytest.raises(ValueError, match="'early' acts at stage 'pixels'"):
        ocvtp.attach(internvl, both)
