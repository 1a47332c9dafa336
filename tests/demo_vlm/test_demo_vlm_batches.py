"""What the stages of the demo VLM learn from: labels, words and pixels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_demo_vlm import CONFIG, MODEL, tiny_batch, tiny_scenes

from ocvtp.data.drawing import COLOURS, SHAPES
from ocvtp.data.questions import SIZES, Question, ask
from ocvtp.data.scenes import LEVELS, draw_scene, split_seed
from tools.demo_vlm.batches import (
    IGNORE,
    QuestionEncoder,
    batches,
    image_labels,
    patch_labels,
    to_pixels,
)
from tools.demo_vlm.processor import build_processor, word_tokenizer
from tools.demo_vlm.settings import StageSettings, load_settings

STAGE = StageSettings("read", 3, answer=1.0, questions=5)


@pytest.fixture(scope="module")
def processor():
    return build_processor(MODEL)


def test_every_question_is_known_to_the_tokenizer(processor):
    tokenizer = processor.tokenizer
    encoders = [QuestionEncoder(tokenizer, english) for english in (False, True)]
    for index in range(60):
        scene = draw_scene(9, index, 48, style=LEVELS["hard" if index % 2 else "easy"])
        for question in ask(scene.objects, 10, np.random.default_rng(index)):
            for encoder in encoders:
                numbers = encoder(question)
                assert tokenizer.unk_token_id not in numbers
                assert tokenizer.decode(numbers[-1:]) == question.answer


def test_the_chat_template_is_llavas_own_prompt(processor):
    question = "What colour is the small circle?"
    content = [{"type": "text", "text": question}, {"type": "image"}]  # the image comes first
    made = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    image = Image.fromarray(draw_scene(0, 0, 48).image)
    by_hand = processor(
        images=image, text=f"USER: <image>\n{question} ASSISTANT:", return_tensors="pt"
    )
    by_template = processor(images=image, text=made, return_tensors="pt")
    assert torch.equal(by_hand["input_ids"], by_template["input_ids"])
    words = processor.tokenizer.convert_ids_to_tokens(by_hand["input_ids"][0].tolist())
    after = "what colour is the small circle ? assistant :".split()
    assert words == ["<s>", "user", ":", *["<image>"] * 36, *after]


def test_capitals_and_marks_are_read_as_any_code_writes_them(processor):
    words = processor.tokenizer.tokenize("USER:Is there a STAR?. assistant:")
    assert words == "user : is there a star ? . assistant :".split()


def test_an_encoded_question_is_what_follows_the_image(processor):
    question = Question("count", "How many stars are there in the image?", "many stars", "2")
    found = QuestionEncoder(processor.tokenizer, english=True)(question)
    words = processor.tokenizer.convert_ids_to_tokens(found)
    assert words == "how many stars are there in the image ? assistant : 2".split()
    found = QuestionEncoder(processor.tokenizer, english=False)(question)
    assert processor.tokenizer.convert_ids_to_tokens(found) == ["many", "stars", "2"]


def test_pixels_are_those_of_the_processor(processor):
    image = draw_scene(1, 4, 48).image
    pixels = processor(images=Image.fromarray(image), text="<image>", return_tensors="pt")
    torch.testing.assert_close(to_pixels(image)[None], pixels["pixel_values"], atol=1e-6, rtol=0)


def test_patches_belong_to_the_object_that_covers_most_of_them():
    for index in range(20):
        scene = draw_scene(2, index, 48)
        labels = patch_labels(scene, 8)
        for number in range(36):
            y, x = 8 * (number // 6), 8 * (number % 6)
            covers = [o.mask[y : y + 8, x : x + 8].sum() for o in scene.objects]
            item = scene.objects[int(np.argmax(covers))]
            expected = (0, IGNORE, IGNORE)
            if max(covers) >= 0.22 * 64:
                colour = list(COLOURS).index(item.colour)
                expected = (1 + SHAPES.index(item.shape), colour, SIZES.index(item.size))
            found = [int(labels[name][number]) for name in ("shape", "colour", "size")]
            assert tuple(found) == expected


def test_image_labels_count_objects():
    for index in range(20):
        scene = draw_scene(2, index, 96, style=LEVELS["hard"])
        labels = image_labels(scene)
        kinds = labels["kinds"].reshape(len(SHAPES), len(COLOURS), len(SIZES))
        found = {tuple(place) for place in kinds.nonzero().tolist()}
        named = {(o.shape, o.colour, o.size) for o in scene.objects}
        assert {(SHAPES[s], list(COLOURS)[c], SIZES[z]) for s, c, z in found} == named
        number = [min(sum(o.shape == s for o in scene.objects), 4) for s in SHAPES]
        assert labels["counts"].tolist() == number


def test_answers_stand_where_the_batch_says():
    batch = tiny_batch(replace(STAGE, prompts="english"))
    at = batch.answer_at[..., None]
    assert torch.equal(batch.words.gather(2, at)[..., 0], batch.answer)
    tokenizer = word_tokenizer()
    colon = tokenizer.convert_tokens_to_ids(":")
    assert (batch.words.gather(2, at - 1) == colon).all()
    padded = torch.arange(batch.words.shape[2]) > at
    assert (batch.words[padded] == tokenizer.pad_token_id).all()
    assert (batch.words[~padded] != tokenizer.pad_token_id).all()


def equal(first, second):
    return all(torch.equal(value, getattr(second, name)) for name, value in vars(first).items())


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_continues_in_the_middle(num_workers):
    scenes = tiny_scenes(STAGE, num=6)
    whole = list(batches(scenes, 2))
    rest = list(batches(scenes, 2, first=1, num_workers=num_workers))
    assert len(whole) == 3
    assert [equal(a, b) for a, b in zip(whole[1:], rest, strict=True)] == [True, True]
    assert not equal(whole[0], whole[1])


def test_stages_and_splits_see_scenes_of_their_own():
    first = tiny_scenes(STAGE)
    images = [first[0], tiny_scenes(replace(STAGE))[1]]
    first.first = 10**8
    images.append(first[0])
    first.first, first.seed = 0, split_seed("val", 0)
    images.append(first[0])
    pixels = [item["pixel_values"] for item in images]
    assert not any(torch.equal(a, b) for i, a in enumerate(pixels) for b in pixels[:i])


def test_hard_scenes_are_mixed_in():
    stage = replace(STAGE, hard=0.5, num_objects=(2, 2))
    model = replace(MODEL, image_size=96)
    scenes = tiny_scenes(stage, num=40, model=model)
    numbers = [int(scenes[index]["counts"].sum()) for index in range(40)]
    assert 10 <= sum(number == 2 for number in numbers) <= 30
    assert all(number == 2 or number >= 6 - 2 for number in numbers)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_configs_are_settings_with_a_header(name):
    path = CONFIG.with_name(f"{name}.yaml")
    settings = load_settings(path)
    assert [s.name for s in settings.stages] == ["tower", "align", "read", "drop", "english"]
    assert [bool(s.drop) for s in settings.stages] == [False, False, False, True, True]
    assert settings.stages[-1].prompts == "english"
    assert settings.model.side**2 == {"cpu": 144, "gpu": 576}[name]
    assert (settings.report.split, settings.report.num_images) == ("test", 1000)
    header = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    for word in ("command:", "hardware:", "time:", "expected:", f"configs/demo_vlm/{name}.yaml"):
        assert word in header


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("patch_size: 8", "patch_size: 7", "patch_size=7"),
        ("text_dim: 128", "text_dim: 100", "text_dim=100"),
        ("text_dim: 128", "text_width: 128", "text_width"),
        ("steps: 2000", "steps: 0", "steps=0"),
        ("steps: 2000", "steps: many", "steps"),
        ("drop: 0.7", "drop: 7", "drop=7"),
        ("dense: 1.0", "hard: 0.1", "'tower' has no loss"),
        ("questions: 12", "questions: 0", "questions=0"),
        ("name: read", "name: tower", "a name of its own"),
        ("split: test", "split: dev", "split"),
    ],
)
def test_settings_that_make_no_sense_are_refused(tmp_path, old, new, message):
    text = CONFIG.read_text()
    assert old in text
    path = tmp_path / "bad.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_settings(path)


def test_a_missing_config_is_named():
    with pytest.raises(ValueError, match="nowhere.yaml"):
        load_settings("nowhere.yaml")
