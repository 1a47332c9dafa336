"""What the demo VLM learns boxes, conversations and pairs of images with."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_demo_vlm import MODEL, generator, tiny_learner

from ocvtp.data.scenes import draw_scene
from ocvtp.hosts.loading import load_model
from tools.demo_grounding.__main__ import save
from tools.demo_grounding.batches import CYCLE, Batch, draw_batch, draw_tower_batch
from tools.demo_grounding.conversations import (
    ConversationEncoder,
    Turn,
    box_answer,
    coordinates,
    grounding_tokenizer,
)
from tools.demo_grounding.learner import GroundingReader, TowerTeacher, tower_features
from tools.demo_grounding.training import GroundingSettings, train
from tools.demo_vlm.batches import IGNORE, to_pixels
from tools.demo_vlm.processor import build_processor, llava_processor, word_tokenizer

TALK = [
    Turn("Is there a red star in the image?", "no"),
    Turn("Where is the red star?", "4 6 12 20", True),
]


@pytest.fixture(scope="module")
def tokenizer():
    return grounding_tokenizer()


@pytest.fixture(scope="module")
def reader(tokenizer):
    reader = GroundingReader(tiny_learner().model, tokenizer, 0).eval()
    reader.fold()
    return reader


def test_old_words_keep_their_numbers_and_all_new_ones_are_known(tokenizer):
    old = word_tokenizer().get_vocab()
    assert old.items() <= tokenizer.get_vocab().items()
    encoder = ConversationEncoder(tokenizer)
    for kind in set(CYCLE):
        read = draw_batch(encoder, kind, 3, 0, 96, 8).read
        assert not (read.words == tokenizer.unk_token_id).any()
        assert (read.targets != IGNORE).any(dim=2).all()
        assert read.boxes.any() == (kind != "several")
    assert coordinates()[-1] == "96"
    assert box_answer((4.9, 6, 12.2, 21)) == "4 6 12 20"


def test_every_answer_is_learnt_where_it_is_said(tokenizer):
    read = ConversationEncoder(tokenizer)([TALK, TALK[:1]])
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in read.words]
    said = "is there a red star in the image ? assistant : no user : where is the"
    assert " ".join(words[0]).startswith(said)
    learnt = read.targets[0] != IGNORE
    targets = tokenizer.convert_ids_to_tokens(read.targets[0][learnt].tolist())
    assert targets == ["no", "</s>", "4", "6", "12", "20", "</s>"]
    assert read.boxes[0][learnt].tolist() == [False] * 2 + [True] * 4 + [False]
    before = [words[0][place] for place in learnt.nonzero()[:, 0].tolist()]
    assert before == [":", "no", ":", "4", "6", "12", "20"]
    assert (read.targets[1] != IGNORE).sum() == 2


@torch.no_grad()
def test_the_loss_is_that_of_the_model_on_the_prompt(reader, tokenizer):
    """Two images in one prompt, and a conversation after them."""
    images = [draw_scene(3, number, 48).image for number in range(2)]
    read = ConversationEncoder(tokenizer)([TALK])
    read = replace(read, **{name: value[None] for name, value in vars(read).items()})
    pixels = torch.stack([to_pixels(image) for image in images])[None]
    shown = torch.zeros(1, 2, MODEL.side**2, dtype=torch.bool)
    found = reader.loss(Batch(pixels, shown, read), 0.0, 0.0, generator())
    processor = llava_processor(build_processor(MODEL).image_processor, tokenizer, MODEL.patch_size)
    text = "USER: <image>\n<image>\nIs there a red star in the image? ASSISTANT: no USER: Where"
    text += " is the red star? ASSISTANT: 4 6 12 20"
    inputs = processor(images=[[*map(Image.fromarray, images)]], text=[text], return_tensors="pt")
    logs = reader.model(**inputs).logits[0].log_softmax(dim=-1)
    ids = tokenizer.convert_tokens_to_ids
    total, weight = 0.0, 0.0
    answers = [(-1, "</s>"), (-2, "20"), (-3, "12"), (-4, "6"), (-5, "4"), (-15, "</s>")]
    for place, word in [*answers, (-16, "no")]:
        if word == "</s>":
            total, weight = total - 0.1 * logs[place, ids(word)], weight + 0.1
        elif word == "no":
            total, weight = total - logs[place, ids(word)], weight + 1
        else:
            near = np.array([math.exp(-((int(word) - int(c)) ** 2) / 8) for c in coordinates()])
            near = torch.tensor(near / near.sum(), dtype=torch.float)
            total, weight = total - near @ logs[place, ids(coordinates())], weight + 1
    assert float(found) == pytest.approx(float(total / weight), abs=1e-4)


@torch.no_grad()
def test_a_tower_is_told_places_before_it_learns_them():
    """Linearly, in two directions of its own, whatever the patches are."""
    tower = tiny_learner().model.model.vision_tower
    teacher = TowerTeacher(tower, MODEL.side)
    embedding = next(m for m in tower.modules() if isinstance(m, torch.nn.Embedding))
    before = embedding.weight.clone()
    teacher.begin(generator())
    added = embedding.weight - before
    assert (added[0] == 0).all()  # the CLS has no place
    centred = 2 * teacher.places - 1
    assert torch.linalg.matrix_rank(added[1:], atol=1e-4) == 2
    torch.testing.assert_close(added[1:] @ added[1:].T, 9 * centred @ centred.T)


def misses(tower, places):
    """Pixels by which a linear reading of tokens misses the place of their patch, on new images."""
    first, second = (
        (features - features.mean((0, 1))) / features.std((0, 1))
        for features in (
            tower_features(tower, draw_tower_batch(step, 0, 96, 8).pixel_values) for step in (7, 8)
        )
    )
    known, right = first.flatten(0, 1), (places - 0.5).repeat(len(first), 1)
    reading = torch.linalg.solve(known.T @ known + 0.1 * torch.eye(known.shape[1]), known.T @ right)
    return 96 * float((second.flatten(0, 1) @ reading - right).abs().mean())


@pytest.mark.slow
@torch.no_grad()
def test_the_shipped_tower_does_not_tell_places_until_it_is_told_them():
    """A guess of the middle misses by 24 of the 96 pixels of an edge."""
    tower = load_model("checkpoints/demo-vlm", "float32")[0].model.vision_tower
    teacher = TowerTeacher(tower, 12)
    assert misses(tower, teacher.places) > 20
    teacher.begin(generator())
    assert misses(tower, teacher.places) < 8


def test_patches_are_told_the_edges_of_their_object():
    batch = draw_tower_batch(0, 0, 48, 8)
    where, patches = batch.boxes * 48, torch.arange(36)
    x, y = 8 * (patches % 6), 8 * (patches // 6)
    shown = batch.shown
    inside = (where[..., 0] < x + 8) & (where[..., 2] > x)
    inside &= (where[..., 1] < y + 8) & (where[..., 3] > y)
    assert inside[shown].all()
    assert 0 < shown.float().mean() < 0.7


@pytest.mark.slow
def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path, monkeypatch):
    base = tmp_path / "base"
    tiny_learner().model.save_pretrained(base)
    build_processor(MODEL).save_pretrained(base)
    monkeypatch.setattr("tools.demo_grounding.batches.PROMPTS", dict.fromkeys(CYCLE, 2))
    settings = GroundingSettings(
        str(tmp_path / "whole"),
        str(base),
        tower_steps=2,
        steps=3,
        terse_steps=2,
        checkpoint_every=2,
    )
    whole = train(settings).state_dict()
    halves = replace(settings, output=str(tmp_path / "halves"))
    with monkeypatch.context() as patch:
        steps = iter([None] * 3)
        step = torch.optim.AdamW.step

        def stop(self, *args, **options):
            if next(steps, "stop") == "stop":
                raise KeyboardInterrupt
            return step(self, *args, **options)

        patch.setattr(torch.optim.AdamW, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            train(halves)
    with pytest.raises(ValueError, match="holds a training; pass --resume"):
        train(halves)
    with pytest.raises(ValueError, match="other settings"):
        train(replace(halves, drop=0.1), resume=True)
    reader = train(halves, resume=True)
    again = reader.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    before, _ = load_model(str(base), "float32")
    tower = {f"model.{k}": v for k, v in before.state_dict().items() if "vision_tower" in k}
    assert any(not torch.equal(value, whole[name]) for name, value in tower.items())
    save(reader, halves)
    model, processor = load_model(halves.output, "float32")
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert processor.decode(processor.tokenizer("24 96 0 2").input_ids[1:]) == "24 96 0 2"
    assert "2 steps of the vision tower" in (tmp_path / "halves" / "README.md").read_text()
