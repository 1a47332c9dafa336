"""TRL's trainers on the demo VLM, pruned: losses and log-probabilities are those of the short rows.

B rows, L columns of the prompt, n of the answer, V words.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForImageTextToText, AutoProcessor

from ocvtp import attach, build_pruner

# Not "trl": this folder passes for a package of that name.
pytest.importorskip("trl.trainer", reason="TRL is not installed; `make test-trl` has it")
trl: Any = importlib.import_module("trl")
DEMO = Path("checkpoints/demo-vlm")
pytestmark = [
    pytest.mark.skipif(not DEMO.is_dir(), reason="the demo VLM is not here"),
    pytest.mark.filterwarnings("ignore"),
]

ASKED = {
    "How many circles are there in the image?": "two",
    "Is there a red square in the image?": "no there is none",
}
COLOURS = ("red", "blue")


def pruner() -> Any:
    return build_pruner("divprune", num_keep=8)


def said(role: str, text: str, image: bool = False) -> dict[str, Any]:
    content = [{"type": "text", "text": text}]
    return {"role": role, "content": [{"type": "image"}, *content] if image else content}


def images() -> list[Image.Image]:
    return [Image.new("RGB", (96, 96), colour) for colour in COLOURS]


def rows(**columns: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns)


def load() -> Any:
    return AutoModelForImageTextToText.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture
def model() -> Any:
    return load()


@pytest.fixture(scope="module")
def processor() -> Any:
    return AutoProcessor.from_pretrained(DEMO)


SETTINGS = {
    "per_device_train_batch_size": 2,
    "max_steps": 1,
    "logging_steps": 1,
    "learning_rate": 1e-5,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
}


def sft(model: Any, processor: Any, folder: Path) -> Any:
    data = rows(
        images=[[image] for image in images()],
        prompt=[[said("user", question, image=True)] for question in ASKED],
        completion=[[said("assistant", answer)] for answer in ASKED.values()],
    )
    config = trl.SFTConfig(output_dir=str(folder), max_length=None, **SETTINGS)
    return trl.SFTTrainer(model, args=config, train_dataset=data, processing_class=processor)


@pytest.mark.parametrize("order", ["pruner first", "trainer first"])
def test_supervised_training_has_the_pruned_loss(
    model: Any, processor: Any, tmp_path: Path, order: str
) -> None:
    if order == "pruner first":
        handle = attach(model, pruner(), logits="full")
        trainer = sft(model, processor, tmp_path)
    else:
        trainer = sft(model, processor, tmp_path)
        handle = attach(model, pruner(), logits="full")
    (batch,) = trainer.get_train_dataloader()
    assert int((batch["labels"] != -100).sum()) > 4
    bare = load().train()
    with torch.no_grad(), pruner()(bare):
        output = bare(**{name: value for name, value in batch.items() if name != "num_images"})
        expected = float(
            cross_entropy(output.logits[:, :-1].flatten(0, 1), output.labels[:, 1:].flatten())
        )
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(expected, abs=1e-4)
    with torch.no_grad():
        whole = float(bare(**batch).loss)
    assert abs(whole - expected) > 1e-3  # without the pruner it is another one
    handle.remove()


def answered(processor: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Prompts padded in front, answers padded behind, and which columns of these count: [B, n]."""
    processor.tokenizer.padding_side = "left"
    texts = [
        processor.apply_chat_template(
            [said("user", question, image=True)], add_generation_prompt=True
        )
        for question in ("Is it?", *list(ASKED)[:1])
    ]
    inputs = dict(processor(images=images(), text=texts, return_tensors="pt", padding=True))
    inputs.pop("token_type_ids", None)
    real = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    answer = torch.arange(10).view(2, 5) + 40
    answer = answer.masked_fill(~real, processor.tokenizer.pad_token_id)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], dim=1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], real.long()], dim=1)
    return inputs, real


def grpo(model: Any, processor: Any, folder: Path) -> Any:
    data = rows(
        image=images(),
        prompt=[[{"role": "user", "content": question}] for question in ASKED],
    )
    config = trl.GRPOConfig(
        output_dir=str(folder),
        num_generations=2,
        max_completion_length=4,
        beta=0.0,
        **SETTINGS,
    )
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(n) for n, _ in enumerate(completions)],
        args=config,
        train_dataset=data,
        processing_class=processor,
    )


@torch.no_grad()
def test_log_probabilities_are_those_of_the_rows_alone(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    inputs, real = answered(processor)
    length = real.shape[1]
    ids, mask, pixels = (inputs[n] for n in ("input_ids", "attention_mask", "pixel_values"))
    with pruner()(model, logits="full"):
        trainer = grpo(model, processor, tmp_path)
        model.eval()
        together, *_ = trainer._get_per_token_logps_and_entropies(
            model, ids, mask, length, pixel_values=pixels, num_images=[1, 1]
        )
    bare = load()
    with pruner()(bare):
        for row, count in enumerate(real.sum(dim=1).tolist()):
            own = ids[row : row + 1, mask[row].bool()]
            logits = bare(input_ids=own, pixel_values=pixels[row : row + 1]).logits
            logs = (logits / trainer.temperature)[0, -count - 1 : -1].log_softmax(dim=-1)
            expected = logs.gather(1, own[0, -count:, None])[:, 0]
            assert torch.allclose(together[row, :count], expected, atol=1e-4)


def test_a_step_of_reinforcement_learning(model: Any, processor: Any, tmp_path: Path) -> None:
    """It samples answers, scores them and trains; the policy's ratio to itself is 1."""
    kept: list[int] = []

    def count(prompt: Any) -> None:
        kept.append(int(prompt.selection.counts()[0]))

    with pruner()(model, logits="full", on_prune=count):
        trainer = grpo(model, processor, tmp_path)
        before = [parameter.clone() for parameter in model.model.language_model.parameters()]
        trainer.train()
    after = model.model.language_model.parameters()
    assert set(kept) == {8}
    assert len(kept) >= 2  # sampling, and training on the samples
    pairs = zip(before, after, strict=True)
    assert any(not torch.equal(old, new) for old, new in pairs)


def test_preferences_are_learned_with_the_pruned_loss(
    model: Any, processor: Any, tmp_path: Path
) -> None:
    data = rows(
        images=[[image] for image in images()],
        prompt=[[said("user", question, image=True)] for question in ASKED],
        chosen=[[said("assistant", answer)] for answer in ASKED.values()],
        rejected=[[said("assistant", "yes it is")] for _ in ASKED],
    )
    config = trl.DPOConfig(output_dir=str(tmp_path), max_length=None, **SETTINGS)
    with pruner()(model, logits="full"):
        trainer = trl.DPOTrainer(model, args=config, train_dataset=data, processing_class=processor)
        with pruner()(trainer.ref_model, logits="full"):  # TRL's own copy
            trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(math.log(2), abs=1e-5)  # before the first step they say the same
