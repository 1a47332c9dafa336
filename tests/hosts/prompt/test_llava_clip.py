"""CLIP's shared space as pruners are shown it, against the CLIP itself."""

from __future__ import annotations

import re
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import (
    Scripted,
    ask,
    assert_close,
    fingerprint,
    make_batch,
    make_prompts,
    shorten,
    single,
)
from tiny_models import tiny_clip, tiny_llava
from torch import Tensor

from ocvtp import Needs, Selection, attach
from ocvtp.hosts import find_host
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt import clip_text
from ocvtp.random_models.tiny_clip import random_clip

CLIP = Needs(clip=True)
LONG = "where are they? " * 12 + "who are they?"  # 205 characters
ROWS = [
    "USER: <image>\nwhat is it? ASSISTANT:",
    "USER: nothing to see ASSISTANT:",
    f"USER: <image>\n<image>\n{LONG} ASSISTANT:",
]
SAID = ["what is it?", LONG, LONG]
pytestmark = [pytest.mark.usefixtures("untouched"), pytest.mark.sampled(2)]


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.fixture
def reading(processor: Any, clip: tuple[Any, Any]) -> dict[str, Any]:
    return {"processor": processor, "text_tower": clip}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, clip: tuple[Any, Any]) -> Path:
    """The CLIP, saved."""
    path: Path = tmp_path_factory.mktemp("clip")
    for part in clip:
        part.save_pretrained(path)
    return path


def shown(model: Any, inputs: Any, needs: Needs = CLIP, **options: Any) -> Any:
    """What a pruner of these needs sees."""
    pruner = Scripted(wants=needs)
    with pruner(model, **options), torch.no_grad():
        model(**inputs)
    return pruner.seen[0]


@torch.no_grad()
def by_hand(clip: tuple[Any, Any], text: str) -> Tensor:
    """[T, P] of a text, in parts of 75 characters."""
    model, tokenizer = clip
    parts = [text[i : i + 75] for i in range(0, len(text), 75)]
    ids = [tokenizer(part, return_tensors="pt")["input_ids"] for part in parts]
    assert max(part.shape[1] for part in ids) <= 77
    return torch.cat([model.get_text_features(part).pooler_output for part in ids])


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_are_read_in_parts(llava: Any, reading: Any, clip: Any, side: Any) -> None:
    tokens = shown(llava, make_prompts(reading["processor"], ROWS, side), **reading)
    assert tokens.clip_text is not None
    assert tokens.clip_text.shape == (3, 3, 20)
    assert tokens.clip_text_valid.tolist() == [[True, False, False], [True] * 3, [True] * 3]
    for image, said in enumerate(SAID):
        real = tokens.clip_text_valid[image]
        assert_close(tokens.clip_text[image, real], by_hand(clip, said), 1e-5)
    assert not tokens.clip_text[~tokens.clip_text_valid].any()
    assert torch.equal(tokens.clip_text[1], tokens.clip_text[2])


@pytest.mark.parametrize("length", [1, 74, 75, 76, 150, 151, 200])
def test_parts_fill_what_clip_can_read(llava: Any, reading: Any, clip: Any, length: int) -> None:
    said = (LONG * 2)[: length - 1] + "?"
    rows = [f"USER: <image>\n{said} ASSISTANT:"] * 2
    tokens = shown(llava, make_prompts(reading["processor"], rows), **reading)
    assert tokens.clip_text_valid is None
    assert_close(tokens.clip_text[1], by_hand(clip, said), 1e-5)
    assert len(tokens.clip_text[1]) == -(-length // 75)


def test_clips_whose_settings_name_another_eos(llava: Any, reading: Any, clip: Any) -> None:
    """As OpenAI's do: transformers then takes the highest token for it."""
    inputs = make_prompts(reading["processor"], ROWS)
    old = deepcopy(clip[0])
    old.text_model.eos_token_id = old.config.text_config.eos_token_id = 2
    tokens = shown(llava, inputs, processor=reading["processor"], text_tower=(old, clip[1]))
    assert_close(tokens.clip_text[0, :1], by_hand((old, clip[1]), SAID[0]), 1e-5)
    assert torch.equal(tokens.clip_text, shown(llava, inputs, **reading).clip_text)


@torch.no_grad()
def test_tokens_in_the_shared_space(llava: Any, reading: Any, clip: Any) -> None:
    inputs = make_prompts(reading["processor"], ROWS)
    tower = llava.model.vision_tower
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    tokens = shown(llava, inputs, **reading)
    expected = clip[0].visual_projection(tower.post_layernorm(states[-2][:, 1:]))
    assert torch.equal(tokens.clip_visual, expected)
    assert tokens.text is None
    # Of the last layer and the CLS it is CLIP's own image embedding.
    last = clip_text.load_clip_text(tower, clip).visual(tower.post_layernorm, states[-1][:, 0])
    assert_close(last, clip[0].get_image_features(inputs["pixel_values"]).pooler_output)


def test_a_layer_chosen_in_the_call(llava: Any, reading: Any, clip: Any) -> None:
    inputs = make_prompts(reading["processor"], ROWS) | {"vision_feature_layer": 3}
    tokens = shown(llava, inputs, **reading)
    norm = llava.model.vision_tower.post_layernorm
    assert torch.equal(tokens.clip_visual, clip[0].visual_projection(norm(tokens.features)))
    several = inputs | {"vision_feature_layer": [1, -2]}
    with pytest.raises(ValueError, match=r"tokens of one layer .*=\[1, -2\] are several"):
        shown(llava, several, **reading)


def test_a_batch_equals_single_rows(llava: Any, reading: Any) -> None:
    inputs = make_prompts(reading["processor"], ROWS)
    batch = shown(llava, inputs, **reading)
    alone = [shown(llava, single(inputs, row), **reading) for row in (0, 2)]
    for image, (row, number) in enumerate([(0, 0), (1, 0), (1, 1)]):
        real = batch.clip_text_valid[image]
        text = alone[row].clip_text[number]
        assert_close(batch.clip_text[image, real], text, 1e-5)
        assert_close(batch.clip_visual[image], alone[row].clip_visual[number], 1e-5)


def test_both_kinds_of_text_through_generate(llava: Any, reading: Any) -> None:
    inputs = make_prompts(reading["processor"], ROWS)

    def by_text(tokens: Any) -> Selection:
        scores = (tokens.clip_visual @ tokens.clip_text[:, 0, :, None]).squeeze(2)
        return Selection(scores.topk(5).indices.sort().values)

    both = Needs(text=True, clip=True, cls=True)
    tokens = shown(llava, inputs, both, **reading)
    assert None not in (tokens.text, tokens.text_valid, tokens.cls)
    short = shorten(llava, inputs, by_text(tokens).keep_indices.tolist())
    with Scripted(wants=both, choose=by_text)(llava, **reading):
        assert torch.equal(ask(llava, inputs), short.greedy(5))
        with torch.no_grad():
            logits = llava(**inputs).logits[short.mask.bool()]
    assert_close(logits, short.logits()[short.mask.bool()])


def test_half_precision_and_offloading(llava: Any, reading: Any, clip: Any, folder: Path) -> None:
    from accelerate import cpu_offload

    inputs = make_prompts(reading["processor"], ROWS)
    exact = shown(llava, inputs, **reading)
    model = deepcopy(llava).bfloat16()
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    tokens = shown(model, inputs, **reading)  # the CLIP stays in fp32
    assert tokens.clip_visual.dtype == tokens.clip_text.dtype == torch.bfloat16
    assert_close(tokens.clip_text.float(), exact.clip_text, 0.01)
    norm = model.model.vision_tower.post_layernorm
    with torch.no_grad():
        expected = clip[0].visual_projection(norm(tokens.features).float())
    assert torch.equal(tokens.clip_visual, expected.bfloat16())
    offloaded = cpu_offload(model, execution_device="cpu")
    again = shown(offloaded, inputs, **reading)
    assert torch.equal(again.clip_visual, tokens.clip_visual)
    assert torch.equal(again.clip_text, tokens.clip_text)
    loaded = shown(offloaded, inputs, processor=reading["processor"], text_tower=folder)
    assert_close(loaded.clip_text.float(), tokens.clip_text.float(), 0.1)


# ----------------------------------------------------------------------- where the CLIP is from


def test_a_folder(llava: Any, reading: Any, folder: Path) -> None:
    inputs = make_prompts(reading["processor"], ROWS)
    expected = shown(llava, inputs, **reading)
    for name in (folder, str(folder)):
        tokens = shown(llava, inputs, processor=reading["processor"], text_tower=name)
        assert torch.equal(tokens.clip_text, expected.clip_text)
        assert torch.equal(tokens.clip_visual, expected.clip_visual)
    half = clip_text.load_clip_text(deepcopy(llava).half().model.vision_tower, folder)
    assert half.text_projection.weight.dtype == torch.float16


def test_a_model_that_knows_its_folder(llava: Any, reading: Any, folder: Path, clip: Any) -> None:
    again = type(clip[0]).from_pretrained(folder)
    inputs = make_prompts(reading["processor"], ROWS)
    tokens = shown(llava, inputs, processor=reading["processor"], text_tower=again)
    assert torch.equal(tokens.clip_text, shown(llava, inputs, **reading).clip_text)


def test_the_clip_that_is_known_to_belong_to_a_tower(
    llava: Any, reading: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"hidden_size": 32, "image_size": 56}
    monkeypatch.setattr(clip_text, "_KNOWN", ((str(folder), settings),))
    inputs = make_prompts(reading["processor"], ROWS)
    tokens = shown(llava, inputs, processor=reading["processor"])
    assert torch.equal(tokens.clip_text, shown(llava, inputs, **reading).clip_text)


@pytest.mark.parametrize(
    ("size", "name"),
    [(336, "openai/clip-vit-large-patch14-336"), (224, "openai/clip-vit-large-patch14")],
)
def test_known_clips_are_not_downloaded(
    llava: Any, size: int, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    asked: list[Any] = []

    def ask_for(name: str, **options: Any) -> None:
        asked.append((name, options))
        raise OSError("not here")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask_for)
    tower = deepcopy(llava.model.vision_tower)
    tower.config.update(
        {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096}
        | {"patch_size": 14, "image_size": size}
    )
    message = f"does not carry; pass text_tower={name!r} to load (and download)"
    with pytest.raises(ValueError, match=re.escape(message)):
        clip_text.load_clip_text(tower)
    assert asked == [(name, {"local_files_only": True})]


def test_the_tiny_random_clip() -> None:
    model, processor = load_model("random:tiny-llava")
    tower = model.model.vision_tower
    clip, tokenizer = random_clip("random:tiny")
    assert sum(p.numel() for p in clip.parameters()) < 500_000
    for name, weight in clip.vision_model.state_dict().items():
        assert torch.equal(weight, tower.state_dict()[name])
    tokens = []
    for text_tower in ("random:tiny", (clip, tokenizer)):
        pruner = Scripted(num_keep=64, wants=CLIP)
        inputs = processor.tokenizer("USER: " + "<image>" * 144 + "\nwho? ASSISTANT:")
        inputs = {"input_ids": torch.tensor([inputs["input_ids"]])}
        images = torch.zeros(1, 3, 96, 96)
        with pruner(model, processor=processor, text_tower=text_tower), torch.no_grad():
            model(**inputs, pixel_values=images)
        tokens.append(pruner.seen[0])
    assert torch.equal(tokens[0].clip_text, tokens[1].clip_text)
    assert tokens[0].clip_text.shape == (1, 1, 64)
    with pytest.raises(ValueError, match="'random:big' is unknown; .*'random:tiny'"):
        random_clip("random:big")


# ------------------------------------------------------------------------------------ refusals


def refused(model: Any, message: str, **options: Any) -> None:
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        attach(model, Scripted(wants=CLIP), **options)
    assert fingerprint(model) == before


def test_clip_without_words(llava: Any, clip: Any) -> None:
    message = (
        "without the processor the prompt's tokens cannot be turned into words; pass processor="
    )
    refused(llava, message, text_tower=clip)


def test_towers_of_no_known_clip(llava: Any, processor: Any) -> None:
    message = "which this model does not carry; pass text_tower=, the hub id or folder of the whole"
    refused(llava, message, processor=processor)


def test_names_that_cannot_be_loaded(
    llava: Any, processor: Any, folder: Path, clip: Any, tmp_path: Path
) -> None:
    reading = {"processor": processor}
    message = "text_tower='/no/such' cannot be loaded .* pass text_tower="
    refused(llava, message, **reading, text_tower="/no/such")
    refused(llava, "'random:big' is unknown", **reading, text_tower="random:big")
    (tmp_path / "llava").mkdir()
    llava.config.save_pretrained(tmp_path / "llava")
    message = "it is a llava, no whole CLIP"
    refused(llava, message, **reading, text_tower=tmp_path / "llava")
    (tmp_path / "silent").mkdir()
    clip[0].save_pretrained(tmp_path / "silent")  # no tokenizer
    message = r"the tokenizer of text_tower \(2 tokens\) knows no words: its files are missing"
    refused(llava, message, **reading, text_tower=tmp_path / "silent")
    partial = tmp_path / "partial"
    clip[1].save_pretrained(partial)
    clip[0].save_pretrained(
        partial, state_dict={k: v for k, v in clip[0].state_dict().items() if "text_p" not in k}
    )
    message = r"it lacks 1 weights, e\.g\. \['text_projection\.weight'\]"
    refused(llava, message, **reading, text_tower=partial)


def test_models_that_are_no_clip(llava: Any, processor: Any, clip: Any) -> None:
    for wrong in (clip[0].vision_model, llava, 3):
        message = f"text_tower is a {type(wrong).__name__}, no CLIPModel; pass text_tower="
        refused(llava, message, processor=processor, text_tower=wrong)
    message = r"whose tokenizer is not on this machine; pass the pair text_tower=\(CLIPModel, tok"
    refused(llava, message, processor=processor, text_tower=clip[0])
    refused(llava, message, processor=processor, text_tower=(clip[0], "no tokenizer"))


def test_tokenizers_that_do_not_fit(llava: Any, processor: Any, clip: Any) -> None:
    foreign = random_clip("random:tiny")[1]
    message = r"has 260 tokens with BOS and EOS \(1, 2\), the CLIP reads 128; pass the tokenizer"
    refused(llava, message, processor=processor, text_tower=(clip[0], foreign))
    endless = deepcopy(clip[1])
    endless.eos_token = None
    message = r"BOS and EOS \(126, None\)"
    refused(llava, message, processor=processor, text_tower=(clip[0], endless))


def test_clips_of_other_towers(llava: Any, processor: Any, clip: Any) -> None:
    message = "the vision side of text_tower is 64 wide, the model's vision tower 32; pass the CLIP"
    refused(llava, message, processor=processor, text_tower="random:tiny")
    other = deepcopy(llava.model.vision_tower)
    with torch.no_grad():
        other.post_layernorm.weight.mul_(1.2)
    wrong = tiny_clip(other)
    with pytest.warns(UserWarning, match="the vision tower's weights are not those of text_tower"):
        attach(llava, Scripted(wants=CLIP), processor=processor, text_tower=wrong).remove()
    with torch.no_grad():
        other.post_layernorm.weight.div_(1.2)
    near = tiny_clip(deepcopy(other).bfloat16().float())  # rounding is no difference
    attach(llava, Scripted(wants=CLIP), processor=processor, text_tower=near).remove()


def test_several_selected_layers(reading: Any) -> None:
    model = tiny_llava("clip", vision_feature_layer=[1, -2])
    message = r"tokens of one layer .* selects several: vision_feature_layer=\[1, -2\]; use a pru"
    refused(model, message, **reading)


def test_prompts_of_white_space(llava: Any, reading: Any) -> None:
    inputs = make_prompts(reading["processor"], ["USER: <image>\n    ASSISTANT:"])
    with pytest.raises(ValueError, match="row 0 of the batch has images and no words"):
        shown(llava, inputs, **reading)


def test_what_is_given_stays_as_it_is(llava: Any, reading: Any, clip: Any) -> None:
    before = fingerprint(llava)
    model = clip[0]
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.train()
    shown(llava, make_prompts(reading["processor"], ROWS), **reading)
    assert model.training
    model.eval()
    assert fingerprint(llava) == before
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert find_host(llava).model is llava
    llava.generate(**make_batch([(3, "image", 2)]), max_new_tokens=1)
