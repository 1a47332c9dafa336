"""The demo VLM's text tower: what it is taught, that it learns it, and the folder that it makes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_demo_vlm import tiny_learner, tiny_scenes, tiny_settings, write_config
from torch import nn

from ocvtp.data.questions import ask
from ocvtp.data.scenes import draw_scene
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.clip_text import load_clip_text
from tools.demo_vlm.batches import collate
from tools.demo_vlm.captions import (
    Caption,
    described,
    object_captions,
    pair_captions,
    question_captions,
)
from tools.demo_vlm.card import _text_tower, save_model
from tools.demo_vlm.processor import text_tower_tokenizer
from tools.demo_vlm.retrieval import measure_text_tower, roc_areas
from tools.demo_vlm.settings import ModelSettings, TextTowerSettings, load_settings
from tools.demo_vlm.text_tower import (
    add_text_tower,
    build_clip,
    contrastive_loss,
    draw_captions,
    embed_images,
    embed_texts,
)

SHIPPED = Path(__file__).parents[2] / "checkpoints" / "demo-vlm"


@pytest.fixture
def settings(tmp_path):
    """Of a model of random weights that lies in its folder."""
    settings = tiny_settings(tmp_path / "model")
    save_model(tiny_learner(), settings)
    return settings


def weights(folder):
    return (Path(folder) / "clip/model.safetensors").read_bytes()


def test_captions_name_every_kind_of_object_once():
    texts = [caption.text for caption in object_captions()]
    assert len(texts) == len(set(texts)) == 6 * 7 * 3 - 1
    assert {"a small red star", "a red star", "a star", "a large object"} <= set(texts)
    assert len(pair_captions()) == 30
    one = described([Caption("a small red star", "star", "red", "small")])
    assert one.sum() == 1
    assert described([Caption("a star", "star")]).sum() == 12


def test_every_question_is_a_caption_of_what_it_asks_for():
    known = {caption.text: caption for caption in question_captions()}
    assert len(known) == 30 + 10 + 12 + 5
    for index in range(20):
        objects = draw_scene(0, index, 48).objects
        for question in ask(objects, 20, np.random.default_rng(index), distinct=True):
            caption = known[question.text]
            said = [name for name in (caption.shape, caption.colour, caption.size) if name]
            assert all(word in question.text for word in said)
            if question.kind == "existence":
                pairs = {(item.shape, item.colour) for item in objects}
                assert ((caption.shape, caption.colour) in pairs) == (question.answer == "yes")


def test_drawn_captions_are_true_and_vary():
    fits = torch.tensor([[0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]).repeat(200, 1)
    drawn = draw_captions(fits, seed=0, step=3)
    assert fits.gather(1, drawn[:, None]).all()
    counts = Counter(drawn[::2].tolist())
    assert min(counts[1], counts[3]) > 70
    assert torch.equal(drawn, draw_captions(fits, seed=0, step=3))
    assert not torch.equal(drawn, draw_captions(fits, seed=0, step=4))


def test_the_loss_is_clips_where_one_text_fits():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(5)
    expected = nn.functional.cross_entropy(logits, numbers)
    expected = (expected + nn.functional.cross_entropy(logits.T, numbers)) / 2
    torch.testing.assert_close(contrastive_loss(logits, torch.eye(5)), expected)


def test_the_loss_pulls_towards_all_that_fit():
    """Of an image that two texts fit, neither is pushed away."""
    logits = torch.zeros(3, 3, requires_grad=True)
    fits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    contrastive_loss(logits, fits).backward()
    assert ((logits.grad < 0) == (fits > 0)).all()


@pytest.mark.slow
def test_it_learns_what_scenes_hold():
    """Of the shipped tower, on eight scenes again and again; nothing of the vision tower moves."""
    tower = load_model(str(SHIPPED), "float32")[0].model.vision_tower
    tokenizer, sizes = text_tower_tokenizer(16), TextTowerSettings(steps=1)
    clip = build_clip(tower, tokenizer, sizes, 0)
    before = {name: value.clone() for name, value in clip.vision_model.state_dict().items()}
    captions = object_captions()
    tokens = tokenizer([c.text for c in captions], padding=True, return_tensors="pt")
    scenes = tiny_scenes(sizes.stage, 8, ModelSettings())
    batch = collate([scenes[index] for index in range(8)])
    fits = (batch.kinds @ described(captions).T > 0).float()
    learnt = [p for p in clip.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, 5e-3)
    gains = []
    for step in range(30):
        drawn = draw_captions(fits, 0, step)
        images, texts = embed_images(clip, batch.pixel_values), embed_texts(clip, tokens)
        loss = contrastive_loss(clip.logit_scale.exp() * images @ texts[drawn].T, fits[:, drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        near = (images @ texts.T).detach()
        gains.append(float(near[fits > 0].mean() - near[fits == 0].mean()))
    assert abs(gains[0]) < 0.02
    assert gains[-1] > 0.05
    after = clip.vision_model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_folder_is_a_whole_clip_of_the_same_tower(settings):
    from transformers import AutoTokenizer, CLIPModel

    add_text_tower(settings)
    folder = Path(settings.output) / "clip"
    model, processor = load_model(settings.output, "float32")
    clip = CLIPModel.from_pretrained(folder, dtype="float32")
    tower = model.model.vision_tower
    theirs = getattr(tower, "vision_model", tower).state_dict()
    assert all(torch.equal(theirs[n], v) for n, v in clip.vision_model.state_dict().items())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["Is there a red star in the image?", "a star"]
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    assert tokens["input_ids"].max() == tokenizer.eos_token_id  # where old CLIPs look for EOS
    with torch.no_grad():
        expected = embed_texts(clip, tokens)
    ours = load_clip_text(clip.vision_model, (clip, tokenizer)).encode(texts)[0][:, 0]
    torch.testing.assert_close(nn.functional.normalize(ours, dim=1), expected)
    assert processor.tokenizer("red")["input_ids"] != tokenizer("red")["input_ids"]


@pytest.mark.filterwarnings("error:the vision tower's weights")
def test_pruners_that_need_it_run(settings):
    from PIL import Image

    import ocvtp

    add_text_tower(settings)
    model, processor = load_model(settings.output, "float32")
    inputs = processor(
        images=Image.fromarray(draw_scene(0, 0, 48).image),
        text="USER: <image>\nIs there a red star in the image? ASSISTANT:",
        return_tensors="pt",
    )
    for name in ("trim", "cdpruner"):
        pruner = ocvtp.build_pruner(name, num_keep=5)
        handle = ocvtp.attach(
            model, pruner, processor=processor, text_tower=Path(settings.output) / "clip"
        )
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 1
        handle.remove()


@pytest.mark.slow
def test_it_is_trained_once_and_seeded(settings, tmp_path):
    add_text_tower(settings)
    before = weights(settings.output)
    with pytest.raises(ValueError, match="--resume"):
        add_text_tower(settings)
    add_text_tower(settings, resume=True)
    assert weights(settings.output) == before
    longer = replace(settings.text_tower, steps=3)
    with pytest.raises(ValueError, match="other settings"):
        add_text_tower(replace(settings, text_tower=longer), resume=True)
    again = replace(settings, output=str(tmp_path / "again"))
    save_model(tiny_learner(), again)
    add_text_tower(again)
    assert weights(again.output) == before
    save_model(tiny_learner(seed=1), again)
    with pytest.raises(ValueError, match="another vision tower"):
        add_text_tower(again, resume=True)
    add_text_tower(replace(again, output="nowhere", text_tower=None))


class KilledError(Exception):
    """In place of the signal that ends a process."""


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "last",
    [
        "tools.demo_vlm.text_tower.contrastive_loss",
        "transformers.PreTrainedTokenizerFast.save_pretrained",  # when the weights are written
    ],
)
def test_a_stopped_one_leaves_nothing_and_is_begun_again(settings, monkeypatch, last):
    def die(*arguments, **named):
        raise KilledError

    before = {path.name for path in Path(settings.output).iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(last, die)
        with pytest.raises(KilledError):
            add_text_tower(settings)
    assert {path.name for path in Path(settings.output).iterdir()} == before
    add_text_tower(settings, resume=True)
    assert (Path(settings.output) / "clip/recipe.json").is_file()


@pytest.mark.slow
def test_figures_and_card(settings):
    add_text_tower(settings)
    shown = replace(settings.report, num_images=6)
    found = measure_text_tower(replace(settings, report=shown))
    assert set(found) == {"easy", "hard"}
    for level in found.values():
        assert set(level) == {"caption", "chance", "patches"}
        assert level["caption"]["images"] == 6
        assert level["patches"]["n"] > 6
        assert all(0 <= figure["low"] <= figure["high"] <= 1 for figure in level.values())
    section = _text_tower(settings, json.loads(json.dumps({"text_tower": found})))
    assert f"{100 * found['hard']['patches']['value']:.1f} (" in section
    assert "`--text-tower FOLDER/clip`" in section
    assert not {"{", "}", "$"} & set(section)
    assert _text_tower(replace(settings, text_tower=None), {}) == ""


def test_areas_are_shares_of_ordered_pairs():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    positive = torch.tensor([[True, False, False, True], [True, False, False, False]])
    expected = [(1 + 1 + 1 + 0.5) / 4, 0.0]
    torch.testing.assert_close(roc_areas(scores, positive), torch.tensor(expected))


def test_settings_are_read_and_refused(tmp_path):
    small = tiny_settings("x")
    config = write_config(small, tmp_path / "tiny.yaml")
    assert load_settings(config).text_tower == small.text_tower
    config = write_config(replace(small, text_tower=None), config)
    assert load_settings(config).text_tower is None
    with pytest.raises(ValueError, match="told from each other"):
        TextTowerSettings(steps=1, batch_size=1)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        TextTowerSettings(steps=1, dim=30)


@pytest.mark.slow
def test_the_shipped_one_tells_scenes_apart():
    settings = load_settings("configs/demo_vlm/cpu.yaml")
    shown = replace(settings.report, num_images=40)
    figures = measure_text_tower(replace(settings, output=str(SHIPPED), report=shown))
    assert figures["easy"]["caption"]["low"] > 0.8
    assert figures["hard"]["caption"]["low"] > figures["hard"]["chance"]["high"]
    sizes = [path.stat().st_size for path in (SHIPPED / "clip").iterdir()]
    assert sum(sizes) < 1.5e6
