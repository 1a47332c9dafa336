"""Batches of questions and answers in the templates of every family."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from ocvtp.choices import FAMILIES
from ocvtp.data.module import QuestionDataModule
from ocvtp.hosts.loading import load_model
from ocvtp.hosts.prompt.chat_template import with_template, with_turns
from ocvtp.training.prompts import PromptTransform

pytestmark = pytest.mark.sampled(3)

NAMES = [*(f"random:tiny-{name}" for name in FAMILIES), "checkpoints/demo-vlm"]
SIZES = [(96, 96), (120, 70), (50, 99)]
QUESTIONS = ["Is there a red star in the image?", "How many stars?", "What colour is the star?"]
ANSWERS = ["no", "12", "purple"]


@cache
def host(name):
    return load_model(name)


def items(before=((), (), ())):
    random = np.random.default_rng(0)
    made = []
    for number, (width, height) in enumerate(SIZES):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        masks = np.zeros((2, height, width), np.bool_)
        masks[0, :9, :5] = masks[1, 30:, 20:] = True
        made.append(
            {
                "image": Image.fromarray(pixels),
                "question": QUESTIONS[number],
                "answer": ANSWERS[number],
                "before": before[number],
                "masks": masks,
                "key": f"key {number}",
            }
        )
    return made


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_prompt_of_inference_then_the_answer_and_its_end(name):
    _, processor = host(name)
    batch = PromptTransform(processor)(items())
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"].bool()
    assert batch["answers"].shape == ids.shape == mask.shape
    end = processor.tokenizer.convert_tokens_to_ids(
        "<|im_end|>" if "qwen" in name or "internvl" in name else "</s>"
    )
    for row, item in enumerate(items()):
        prompt = with_template(processor, item["question"], 1)
        alone = processor(images=[[item["image"]]], text=[prompt], return_tensors="pt")
        length, answered = alone["input_ids"].shape[1], batch["answers"][row]
        assert ids[row, :length].equal(alone["input_ids"][0])
        own = ids[row][answered]
        assert answered.nonzero()[:, 0].equal(torch.arange(length, length + len(own)))
        assert processor.tokenizer.decode(own[:-1]).strip() == item["answer"]
        assert int(own[-1]) == end
        assert mask[row].equal(torch.arange(len(mask[row])) < length + len(own))
        assert bool((ids[row][~mask[row]] == processor.tokenizer.pad_token_id).all())


@pytest.mark.parametrize("name", NAMES)
def test_models_read_batches_as_single_questions(name):
    model, processor = host(name)
    transform = PromptTransform(processor)
    together = transform(items())
    with torch.no_grad():
        logits = model(**together["inputs"]).logits
        for row, item in enumerate(items()):
            alone = transform([item])
            expected = model(**alone["inputs"]).logits[alone["answers"]]
            torch.testing.assert_close(
                logits[row][together["answers"][row]], expected, atol=2e-4, rtol=1e-3
            )


@pytest.mark.parametrize("name", NAMES)
def test_turns_before_the_question_are_part_of_the_prompt(name):
    _, processor = host(name)
    said = ("Is there a blue cross?", "yes")
    batch = PromptTransform(processor)(items([said, (), ()]))
    text = processor.tokenizer.decode(batch["inputs"]["input_ids"][0])
    assert text.lower().index("blue cross") < text.lower().index("red star")
    assert processor.tokenizer.decode(
        batch["inputs"]["input_ids"][0][batch["answers"][0]]
    ).startswith(("no", " no"))


def test_processors_without_a_template_are_asked_as_llava_was():
    class Plain:
        chat_template, image_token = None, "<image>"

    assert with_turns(Plain(), ("What?",), 1) == "USER: <image>\nWhat? ASSISTANT:"
    assert with_template(Plain(), "What?", 1) == "USER: <image>\nWhat? ASSISTANT:"
    turns = ("What?", "That.", "Why?")
    expected = "USER: <image>\nWhat? ASSISTANT: That. USER: Why? ASSISTANT:"
    assert with_turns(Plain(), turns, 1) == expected
    assert with_turns(Plain(), turns[:2], 1) == "USER: <image>\nWhat? ASSISTANT: That."


def test_masks_sizes_keys_and_errors_come_along():
    _, processor = host("checkpoints/demo-vlm")
    given = items()
    given[1]["masks"] = None
    given[2]["masks"] = np.zeros((0, 99, 50), np.bool_)
    batch = PromptTransform(processor)([given[0], {"error": "a.png: torn"}, *given[1:]])
    assert batch["errors"] == ["a.png: torn"]
    assert batch["keys"] == ["key 0", "key 1", "key 2"]
    assert batch["sizes"] == [(96, 96), (70, 120), (99, 50)]
    first, second, third = batch["objects"]
    assert first.shape == (96, 96)
    assert first.sum() == 9 * 5 + 66 * 76
    assert second is None
    assert third.shape == (99, 50)
    assert not third.any()
    assert len(batch["inputs"]["input_ids"]) == 3


def test_a_batch_may_have_no_readable_item():
    _, processor = host("checkpoints/demo-vlm")
    batch = PromptTransform(processor)([{"error": "a.png: torn"}])
    assert batch["inputs"] == {}
    assert batch["answers"].shape == (0, 0)
    assert batch["errors"] == ["a.png: torn"]


@pytest.mark.parametrize("place", ["question", "answer", "before"])
def test_placeholders_of_images_in_a_text_are_refused(place):
    _, processor = host("checkpoints/demo-vlm")
    given = items()
    given[1][place] = ("a <image>", "b") if place == "before" else "a <image>"
    with pytest.raises(ValueError, match=r"question key 1 has '<image>' in its text"):
        PromptTransform(processor)(given)


class Noting(pl.LightningModule):
    """Notes what each step is asked."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.keys, self.val_keys = [], []

    def training_step(self, batch, batch_idx):
        self.keys.append(batch["keys"])
        assert batch["answers"].any(dim=1).all()
        return self.layer(batch["inputs"]["pixel_values"].mean().view(1, 1)).sum()

    def validation_step(self, batch, batch_idx):
        self.val_keys += batch["keys"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, steps, resume=None):
    _, processor = host("checkpoints/demo-vlm")
    sizes = {"num_train": 5, "num_val": 2, "questions": 4, "batch_size": 6, "scene_seed": 2}
    data = QuestionDataModule(str(folder / "scenes"), **sizes)
    data.transform = PromptTransform(processor)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Noting()
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module


def test_a_run_goes_on_inside_of_an_epoch_and_of_an_image(tmp_path):
    whole, first = fit(tmp_path, 8), fit(tmp_path, 5)
    assert first.keys == whole.keys[:5]
    second = fit(tmp_path, 8, tmp_path / "5.ckpt")
    assert second.keys == whole.keys[5:]
    assert len({tuple(keys) for keys in whole.keys}) > 3  # more than the batches of one epoch
    validated = [f"{level}/val/1/{n}" for level in ("easy", "hard") for n in range(4)]
    assert second.val_keys[-8:] == validated


def test_the_processor_stays_as_it_was():
    _, processor = host("checkpoints/demo-vlm")
    before = processor.tokenizer.padding_side
    PromptTransform(processor)(items())
    assert processor.tokenizer.padding_side == before == "left"


def test_a_processor_without_text_is_refused():
    _, processor = host("checkpoints/demo-vlm")
    with pytest.raises(ValueError, match="has no tokenizer"):
        PromptTransform(processor.image_processor)
