"""What the demo VLM learns boxes and conversations with."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_demo_vlm import MODEL, generator, tiny_learner
from torch.nn import functional as F

from ocvtp.data.scenes import draw_scene
from ocvtp.hosts.loading import load_model
from tools.demo_grounding.__main__ import save
from tools.demo_grounding.batches import (
    SCENES,
    Batch,
    Kind,
    PatchLabels,
    draw_batch,
    draw_tower_batch,
)
from tools.demo_grounding.conversations import (
    STEP,
    ConversationEncoder,
    Turn,
    box_answer,
    coordinates,
    grounding_tokenizer,
)
from tools.demo_grounding.learner import (
    BLUR,
    LOOK,
    LOOKING,
    PLACE,
    PLACE_WAVES,
    GroundingReader,
    TowerTeacher,
    tower_features,
)
from tools.demo_grounding.training import GroundingSettings, train
from tools.demo_vlm.batches import IGNORE, to_pixels
from tools.demo_vlm.learner import Learner
from tools.demo_vlm.processor import build_processor, llava_processor, word_tokenizer

TALK = [
    Turn("Is there a red star in the image?", "no"),
    Turn("Where is the red star?", "4 8 12 20", 1),
]


def deeper_learner():
    """Names look in the second layer, and coordinates at names in the third."""
    return Learner(replace(MODEL, text_layers=3), word_tokenizer(), 0)


@pytest.fixture(scope="module")
def tokenizer():
    return grounding_tokenizer()


@pytest.fixture(scope="module")
def reader(tokenizer):
    reader = GroundingReader(deeper_learner().model, tokenizer, 0).eval()
    reader.fold()
    return reader


def test_old_words_keep_their_numbers_and_all_new_ones_are_known(tokenizer):
    old = word_tokenizer().get_vocab()
    assert old.items() <= tokenizer.get_vocab().items()
    encoder = ConversationEncoder(tokenizer)
    for kind in get_args(Kind):
        read = draw_batch(encoder, 3, 0, 96, 8, kind).read
        assert not (read.words == tokenizer.unk_token_id).any()
        learnt, told = read.targets != IGNORE, read.about != IGNORE
        assert learnt.any(dim=2).all()
        assert (told <= learnt).all()
        turns = (read.targets == tokenizer.eos_token_id).sum()
        assert 0.3 < told.sum() / 4 / turns < 0.7
    assert coordinates()[-1] == "96"
    assert box_answer((4.9, 6.1, 12.2, 21)) == "4 8 12 20"


def test_every_answer_is_learnt_where_it_is_said(tokenizer):
    read = ConversationEncoder(tokenizer)([TALK, TALK[:1]])
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in read.words]
    said = "is there a red star in the image ? assistant : no user : where is the"
    assert " ".join(words[0]).startswith(said)
    learnt = read.targets[0] != IGNORE
    targets = tokenizer.convert_ids_to_tokens(read.targets[0][learnt].tolist())
    assert targets == ["no", "</s>", "4", "8", "12", "20", "</s>"]
    assert read.about[0][learnt].tolist() == [IGNORE] * 2 + [1] * 4 + [IGNORE]
    before = [words[0][place] for place in learnt.nonzero()[:, 0].tolist()]
    assert before == [":", "no", ":", "4", "8", "12", "20"]
    assert (read.targets[1] != IGNORE).sum() == 2
    (name,) = (read.names[0] != IGNORE).nonzero()[:, 0].tolist()
    assert words[0][name - 1 : name + 1] == ["red", "star"]
    assert words[0][name + 1] == "?"
    assert read.names[0, name] == 1
    assert (read.names[1] == IGNORE).all()


def blurred(word):
    """[C] what counts as right where a coordinate is."""
    apart = [(int(word) - int(other)) / STEP / BLUR for other in coordinates()]
    near = np.array([math.exp(-(steps**2) / 2) for steps in apart])
    return torch.tensor(near / near.sum(), dtype=torch.float)


@torch.no_grad()
def test_the_loss_is_that_of_the_model_on_the_prompt(reader, tokenizer):
    """A conversation about an image, whose second object is on its patches 3, 4 and 9."""
    image = draw_scene(3, 0, 48).image
    read = ConversationEncoder(tokenizer)([TALK])
    read = replace(read, **{name: value[None] for name, value in vars(read).items()})
    owner = torch.full((1, MODEL.side**2), IGNORE)
    owner[0, [3, 4, 9]], owner[0, 12] = 1, 0
    batch = Batch(
        to_pixels(image)[None],
        owner,
        torch.arange(4).expand(1, len(owner[0]), -1),
        PatchLabels(*(torch.where(owner < 0, fill, owner) for fill in (0, IGNORE, IGNORE))),
        read,
    )
    found = reader.loss(batch, 0.0, 0.0, generator())
    processor = llava_processor(build_processor(MODEL).image_processor, tokenizer, MODEL.patch_size)
    text = "USER: <image>\nIs there a red star in the image? ASSISTANT: no USER: Where"
    text += " is the red star? ASSISTANT: 4 8 12 20"
    inputs = processor(images=[Image.fromarray(image)], text=[text], return_tensors="pt")
    out = reader.model(**inputs, output_attentions=True)
    logs = out.logits[0].log_softmax(dim=-1)
    ids = tokenizer.convert_tokens_to_ids
    total, weight = 0.0, 0.0
    answers = [(-1, "</s>"), (-2, "20"), (-3, "12"), (-4, "8"), (-5, "4"), (-15, "</s>")]
    for place, word in [*answers, (-16, "no")]:
        if word == "</s>":
            total, weight = total - 0.1 * logs[place, ids(word)], weight + 0.1
        elif word == "no":
            total, weight = total - logs[place, ids(word)], weight + 1
        else:
            total, weight = total - blurred(word) @ logs[place, ids(coordinates())], weight + 1
    assert float(found["words"]) == pytest.approx(float(total / weight), abs=1e-4)
    first = inputs["input_ids"][0].tolist().index(ids("<image>"))
    shown = [first + place for place in (3, 4, 9)]
    name = (
        len(inputs["input_ids"][0]) - 1 - inputs["input_ids"][0].tolist()[::-1].index(ids("star"))
    )
    mass = out.attentions[LOOK][0, :LOOKING, name, shown].sum(-1)
    assert float(found["look"]) == pytest.approx(float(-mass.log().mean()), abs=1e-3)
    mass = out.attentions[LOOK - 1][0, -1, name, name - 1]
    assert float(found["bind"]) == pytest.approx(float(-mass.log()), abs=1e-3)
    mass = out.attentions[LOOK + 1][0, :, -5:-1, name].mean(0)
    assert float(found["copy"]) == pytest.approx(float(-mass.log().mean()), abs=1e-3)
    shown = reader.project(reader.encode(batch.pixel_values))[0, owner[0] != IGNORE]
    words = reader.model.get_input_embeddings().weight[ids(coordinates())]
    near = F.rms_norm(reader.edges(shown).reshape(-1, 4, words.shape[1]), words.shape[1:])
    logs = (near @ words.T).log_softmax(dim=-1).mean(0)
    right = sum(blurred(str(STEP * edge)) @ logs[edge] for edge in range(4)) / 4
    assert float(found["edges"]) == pytest.approx(-float(right), abs=1e-4)
    nowhere = replace(batch, owner=torch.full_like(owner, IGNORE))
    assert float(reader.loss(nowhere, 0.0, 0.0, generator())["look"]) == 0


@torch.no_grad()
def test_a_tower_is_told_places_before_it_learns_them():
    """As waves in directions of their own, whatever the patches are: neighbours are alike."""
    tower = tiny_learner().model.model.vision_tower
    teacher = TowerTeacher(tower, MODEL.side)
    embedding = next(m for m in tower.modules() if isinstance(m, torch.nn.Embedding))
    before = embedding.weight.clone()
    teacher.begin(generator())
    added = embedding.weight - before
    assert (added[0] == 0).all()  # the CLS has no place
    apart = teacher.places[:, None] - teacher.places
    waves = torch.arange(1, PLACE_WAVES + 1)
    alike = (math.pi * apart[..., None] * waves).cos().sum((2, 3))
    torch.testing.assert_close(added[1:] @ added[1:].T, PLACE**2 * alike, atol=1e-3, rtol=1e-3)


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
    deeper_learner().model.save_pretrained(base)
    build_processor(MODEL).save_pretrained(base)
    monkeypatch.setattr("tools.demo_grounding.batches.SCENES", dict.fromkeys(SCENES, 2))
    settings = GroundingSettings(
        str(tmp_path / "whole"),
        str(base),
        tower_steps=2,
        sight_steps=1,
        steps=2,
        alone_steps=1,
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
