"""Scorers that learn with a frozen model in the loop: every recipe, what it computes, its files."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import ocvtp
from ocvtp.cli import main
from ocvtp.export import export_checkpoint
from ocvtp.hosts.asking import attention_rows
from ocvtp.hosts.loading import load_model
from ocvtp.images import most_pixels
from ocvtp.selectors.choices import parse_choice
from ocvtp.selectors.losses import build_losses
from ocvtp.selectors.network import SelectorNetwork
from ocvtp.training import selector
from ocvtp.training.run import TrainingStopped, build, train
from ocvtp.training.selector import SelectorModule
from ocvtp.training.teacher import Teacher

RECIPES = ("mask", "distil", "kl", "visionselector", "noise")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of drawn scenes, filled by the first run."""
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture
def words(scenes, tmp_path):
    """Of a short run of a recipe."""

    def make(recipe, *more, steps=2):
        few = {
            "data.root": scenes, "data.num_train": 6, "data.num_val": 2, "data.questions": 4,
            "data.batch_size": 4, "model.scorer.dim": 16, "trainer.max_steps": steps,
            "trainer.val_check_interval": 2, "trainer.enable_progress_bar": False,
            "trainer.enable_model_summary": False, "model.statistics_questions": 8,
            "output": tmp_path / "run",
        }  # fmt: skip
        if recipe == "kl":
            few["model.warm_start"] = "null"
        found = ["--config", f"configs/train/selector/{recipe}.yaml"]
        return [*found, *(f"--{name}={value}" for name, value in few.items()), *more]

    return make


def module_of(words):
    """A module with a batch of questions and its answers."""
    built = build(words)
    data = built.datamodule
    data.prepare_data()
    data.setup("fit")
    return built.model, next(iter(data.train_dataloader()))


def logged(folder: Path) -> dict[str, float]:
    """The last figure of each name."""
    found: dict[str, float] = {}
    for path in sorted(folder.rglob("metrics.csv")):
        for row in csv.DictReader(path.open()):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_trains_the_scorer_alone_and_is_plugged_in(recipe, words, tmp_path):
    result = train(words(recipe))
    content = torch.load(result.last, weights_only=True)
    held = {name.split(".")[0] for name in content["state_dict"]}
    assert held <= {"network", "gate"}
    figures = logged(tmp_path / "run")
    for name in ("ce", "kl", "agreement", "accuracy"):
        for num_keep in (16, 8):
            for ending in ("", "_random", "_untrained"):
                assert f"val/{name}_{num_keep}{ending}" in figures
    shared = {
        f"val/overlap_layer0_{k}{end}" for k in (16, 8) for end in ("", "_random", "_untrained")
    }
    assert (shared <= figures.keys()) == (recipe == "distil")
    gates = {f"val/{name}_{k}" for k in (16, 8) for name in ("gates_between", "gate_error")}
    assert (gates <= figures.keys()) == (recipe in ("kl", "visionselector", "noise"))
    assert all(0 <= figures[name] <= 1 for name in gates & figures.keys())
    assert all(0 <= figures[name] <= 1 for name in shared & figures.keys())
    assert figures["val/loss"] == pytest.approx(
        (figures["val/ce_16"] + figures["val/ce_8"]) / 2, rel=1e-5
    )
    assert len(list((tmp_path / "run").rglob("pictures/*.png"))) == 1
    network = export_checkpoint(result.last, tmp_path / "artifact")
    assert network.config.objective == recipe
    assert network.config.training["steps"] == 2
    pruner = ocvtp.build_pruner("learned", checkpoint=str(tmp_path / "artifact"), num_keep=9)
    assert pruner.network.config == network.config


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["distil", "visionselector"])
def test_shares_are_budgets_and_the_artifact_says_so(recipe, words, tmp_path):
    shares = ["--model.budgets=[0.055,0.11,16]", "--model.val_budgets=[0.11,8]"]
    shares.append("--trainer.log_every_n_steps=1")
    result = train(words(recipe, *shares))
    figures = logged(tmp_path / "run")
    assert {"val/ce_0.11", "val/ce_8_random", "val/accuracy_0.11_untrained"} <= figures.keys()
    assert figures["train/num_keep"] in (8, 16)  # of 144
    network = export_checkpoint(result.last, tmp_path / "artifact")
    assert network.config.num_slots == (0.055, 0.11, 16)
    assert SelectorNetwork.from_pretrained(tmp_path / "artifact").config == network.config
    assert network.config.training["validation"]["num_slots"] == 0.11


@pytest.mark.slow
def test_images_of_other_sizes_keep_a_share_of_their_own_tokens(words):
    model = ["--model.host.model=random:tiny-llava-next", "--model.scorer.budget=film"]
    module, batch = module_of(words("kl", *model, "--model.losses={kl: {}, ce: {}}"))
    with module_ready(module):
        asked = module.ask(batch)
        valid = asked.tokens.real.clone()
        valid[1:, -7:] = False  # as of an image that is smaller
        columns = asked.columns.masked_fill(~valid, -1)
        mixed = replace(asked, tokens=replace(asked.tokens, valid=valid), columns=columns)
        found = module._step(batch, mixed, 0.3, 0.5, module.losses)
        sum(loss(found).mean() for loss in module.losses).backward()
    wanted = [max(1, round(0.3 * int(row.sum()))) for row in valid]
    assert len(set(wanted)) > 1
    assert found.num_keep.tolist() == wanted == found.gates.hard.sum(dim=1).tolist()
    assert_close(found.gates.soft.sum(dim=1), torch.tensor(wanted).float(), atol=1e-3, rtol=1e-4)
    assert found.most == max(wanted)
    assert all(p.grad.isfinite().all() for p in module.network.parameters() if p.grad is not None)
    for choice in ("topk", "restore", "maxmin"):
        module.choice = parse_choice(choice)
        kept = module._chosen(mixed, found.scores.detach(), 0.3, batch["keys"])
        for keep in kept.values():
            assert keep.sum(dim=1).tolist() == wanted
            assert not (keep & ~valid).any()


@pytest.mark.slow
def test_deposition_is_the_mean_of_the_training_questions_and_part_of_a_checkpoint(words):
    settings = ("--model.losses.attention.deposition=true", "--model.statistics_questions=24")
    result = train(words("distil", *settings))
    content = torch.load(result.last, weights_only=True)
    assert content["ocvtp"]["config"]["losses"]["attention"] == {"deposition": True}
    kept = content["state_dict"]["deposition.layer0"]
    module, _ = module_of(words("distil"))
    data = build(words("distil")).datamodule
    data.prepare_data()
    data.transform = module.transform
    data.setup("fit")
    rows = []
    for batch in data.train_dataloader():
        found = attention_rows(module.frozen_host, module.ask(batch), [0])
        rows.append(found[0])
    assert len(torch.cat(rows)) == 24
    assert_close(kept, torch.cat(rows).mean(dim=0))


def test_deposition_is_of_one_grid(words):
    settings = ("--model.host.model=random:tiny-llava-next",)
    with pytest.raises(
        ValueError, match=r"deposition: true, .*'llava_next' differ .*; leave it out"
    ):
        build(words("distil", *settings, "--model.losses.attention.deposition=true"))


@pytest.mark.slow
def test_a_scorer_learns_before_a_layer_what_attention_and_tower_say(words, tmp_path):
    result = train(words("glimpse"))
    network = export_checkpoint(result.last, tmp_path / "artifact")
    assert (network.config.stage, network.config.layer) == ("llm_layers", 1)
    assert network.scorer.attended.in_features == 4  # heads
    assert network.scorer.added.shape == (2, 128)
    assert all(int(own.num_tokens) for _, own in network.statistics())
    model, processor = load_model("checkpoints/demo-vlm", "float32")
    pruner = ocvtp.build_pruner(
        "learned_layers", checkpoint=str(tmp_path / "artifact"), stages=((1, 20),), threshold=0.3
    )
    inputs = processor(images=Image.new("RGB", (96, 96), "red"), text="<image>what is it?",
                       return_tensors="pt")  # fmt: skip
    with pruner(model, processor=processor):
        model.generate(**inputs, max_new_tokens=2)


def test_a_column_of_its_own_learns_from_answers_and_from_masks(words):
    module, batch = module_of(words("glimpse"))
    scorer = module.network.scorer
    own = {f"scorer.{part}" for part in ("added", "to_column", "norm_column")}
    asked = module.ask(batch)
    found = module._step(batch, asked, 8, 0.5, module.losses)
    for loss in module.losses:
        module.network.zero_grad()
        loss(found).mean().backward(retain_graph=True)
        learns = {n for n, p in module.network.named_parameters() if p.grad is not None}
        of_column = {n for n in learns if any(n.startswith(part) for part in own)}
        assert of_column == {n for n, _ in module.network.named_parameters()
                             if any(n.startswith(part) for part in own)}, loss.name  # fmt: skip
        assert (learns == of_column) == (loss.name == "column_ce")
    assert all(p.grad is None for p in module.vlm.parameters())
    with torch.no_grad():
        chosen = module._chosen(asked, found.scores, 8, batch["keys"])
        assert chosen[""].equal(chosen["untrained"])  # which reads a column of its own
        scorer.added += 1.0
        scores = module.network(asked.tokens).values
        after = module._chosen(asked, scores, 8, batch["keys"])
    assert not scores.allclose(found.scores, atol=1e-3)
    assert after["untrained"].equal(chosen["untrained"])


@pytest.mark.slow
def test_masks_are_those_of_the_tokens_before_a_layer(words):
    """Between which some hosts end lines, which show nothing."""
    module, batch = module_of(words("mask", "--model.host.model=random:tiny-llava-next"))
    before, known = module._shown(batch["objects"], module.ask(batch).tokens)
    module.host = replace(module.host, stage="llm_layers", layer=1)
    tokens = module.ask(batch).tokens
    inside, as_before = module._shown(batch["objects"], tokens)
    assert inside.shape[1] > before.shape[1]
    assert as_before.equal(known)
    for row, places in enumerate(tokens.places):
        ends = places < 0
        assert ends.any()
        assert not inside[row][ends].any()
        assert inside[row][~ends].equal(before[row][places[~ends]])


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("scorer", "more", "told"),
    [
        ("vip.VIP", (), r"model\.scorer 'vip' \(block=20, .*hidden=\[23.*pass -6 to 5"),
        ("slots.Slots", (), r"model\.scorer 'slots' \(layer=9, .*hidden_states\[9\].*pass -6 to 5"),
        ("vip.VIP", ("stage=llm_layers", "layer=2"), r"layer 2: .*block=20.* of layer 1 or 2"),
    ],
)
def test_layers_that_there_are_not_are_named_with_their_settings(words, scorer, more, told):
    found = [word for word in words("mask") if not word.startswith("--model.scorer.dim")]
    found.append(f"--model.scorer=ocvtp.selectors.scorers.{scorer}")
    found += [f"--model.host.{setting}" for setting in more]
    with pytest.raises(ValueError, match=told):
        build(found)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_learns_and_what_does_not(recipe, words):
    module, batch = module_of(words(recipe))
    torch.manual_seed(0)
    frozen = [p.requires_grad for p in module.vlm.parameters()]
    assert not any(frozen)
    with module_ready(module):
        found = module._step(batch, module.ask(batch), 8, 0.5, module.losses)
        sum(loss(found).mean() for loss in module.losses).backward()
    assert all(p.grad is None for p in module.vlm.parameters())
    assert any(float(p.grad.abs().max()) > 0 for p in module.network.parameters())
    assert all(torch.isfinite(p.grad).all() for p in module.network.parameters())


class module_ready:
    """A module as its training finds it: measured, with gates in the model."""

    def __init__(self, module):
        self.module = module

    def __enter__(self):
        built = self.module
        for source, own in built.network.statistics():
            assert source == "projected"
            own.num_tokens.fill_(1)
        for name, value in built.gate.named_buffers():
            value.fill_(float(name == "std"))
        built.on_fit_start()

    def __exit__(self, *error):
        self.module.teardown("fit")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("recipe", RECIPES)
def test_nothing_is_computed_that_no_loss_reads(recipe, words, monkeypatch):
    calls = []
    for name in ("read", "attention_rows", "drop"):
        own = getattr(selector, name)

        def counted(*args, name=name, own=own, **kwargs):
            calls.append(name)
            return own(*args, **kwargs)

        monkeypatch.setattr(selector, name, counted)
    module, batch = module_of(words(recipe))
    with module_ready(module):
        module._step(batch, module.ask(batch), 8, 0.5, module.losses)
    expected = {
        "mask": [], "distil": ["attention_rows"], "kl": ["read"] * 2,
        "visionselector": ["read"], "noise": ["read"] * 2,
    }  # fmt: skip
    assert calls == expected[recipe]


def test_the_model_is_left_as_it_was(words):
    module, batch = module_of(words("kl", "--model.host.checkpointing=true"))
    before = module.vlm.config._attn_implementation, module.vlm.training
    training = [m.training for m in module.vlm.modules()]
    with module_ready(module):
        assert module.vlm.config.get_text_config()._attn_implementation != before[0]
    assert (module.vlm.config.get_text_config()._attn_implementation, module.vlm.training) == before
    assert [m.training for m in module.vlm.modules()] == training


@pytest.mark.slow
def test_checkpointing_changes_no_gradient(words):
    found = []
    for checkpointing in ("false", "true"):
        module, batch = module_of(words("kl", f"--model.host.checkpointing={checkpointing}"))
        with module_ready(module):
            step = module._step(batch, module.ask(batch), 8, 0.5, module.losses)
            sum(loss(step).mean() for loss in module.losses).backward()
        found.append([p.grad for p in module.network.parameters()])
    assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["kl", "noise", "glimpse"])
def test_a_stopped_run_continues_bit_for_bit(recipe, words, tmp_path, monkeypatch):
    straight = train(words(recipe, f"--output={tmp_path / 'straight'}", steps=4)).last
    stopped = words(recipe, f"--output={tmp_path / 'stopped'}", steps=4)
    step = SelectorModule.training_step

    def interrupted(self, batch, number):
        if self.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch, number)

    with monkeypatch.context() as patched:
        patched.setattr(SelectorModule, "training_step", interrupted)
        with pytest.raises(TrainingStopped) as stop:
            train(stopped)
    assert "stopped after 3 steps" in str(stop.value)
    resumed = train([*stopped, "--resume", "last"]).last
    one, other = (torch.load(path, weights_only=True) for path in (straight, resumed))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, values in one["state_dict"].items():
        assert torch.equal(values, other["state_dict"][name]), name


REWARD = ("--model.losses={reward: {}}", "--model.relaxation", "ocvtp.selectors.relaxations.Sample")


@pytest.mark.slow
def test_settings_that_make_no_sense_are_refused(words):
    for more, told in (
        (("kl", "--model.gate=null"), "model.gate is none"),
        (("kl", "--model.relaxation=null"), "model.relaxation is none"),
        (("mask", "--model.losses={reward: {}}"), "relaxation is none"),
        (("kl", "--model.losses={reward: {}}"), "Sample"),
        (("mask", "--model.budgets=[8,0]"), r"budgets=\[8, 0\]; pass .*whole numbers"),
        (("mask", "--model.budgets=[8,1.5]"), r"budgets=\[8, 1.5\]; pass .*shares"),
        (("mask", "--model.budgets=[]"), r"budgets=\[\]; pass at least one"),
        (("mask", "--model.val_budgets=[]"), r"val_budgets=\[\]; pass at least one"),
        (("mask", "--model.samples=0"), "samples=0; pass at least 1"),
        (("kl", *REWARD, "--model.samples=1"), "samples=1; pass at least 2"),
        (("mask", "--model.statistics_questions=0"), "statistics_questions=0; pass at least 1"),
        (("mask", "--model.lr=0"), "lr=0.0; pass a number above 0"),
        (("mask", "--model.lr=.nan"), "lr=nan; pass a number above 0"),
        (("mask", "--model.lr=.inf"), "lr=inf; pass a number above 0"),
        (("mask", "--model.min_lr=-1"), "min_lr=-1.0, lr=0.002; .*pass 0 to 0.002"),
        (("mask", "--model.min_lr=1"), "min_lr=1.0, lr=0.002; .*pass 0 to 0.002"),
        (("mask", "--model.weight_decay=-1"), "weight_decay=-1.0; pass a number of at least 0"),
        (("mask", "--model.warmup_fraction=2"), "warmup_fraction=2.0; pass a share"),
        (("mask", "--model.losses={maks: {}}"), "did you mean 'mask'"),
        (("kl", "--model.teacher=nowhere"), "run `ocvtp teacher"),
        (("mask", "--model.losses={column_ce: {}}"), "'prompted' has none; pass .*VIP with learnt"),
        (("glimpse", "--model.host.checkpointing=true"), "leave model.host.checkpointing out"),
        (("kl", "--model.relaxation.floor={geometric: [1.0e-3, 1.0e-4]}"), "floor=0.0001 or less"),
    ):
        with pytest.raises(ValueError, match=told):
            build(words(*more))


@pytest.mark.slow
def test_slots_learn_from_the_papers_loss_beside_answers(words, tmp_path):
    sizes = {"layer": 3, "hidden_dim": 32, "slot_dim": 16, "ffn_dim": 32, "noise_rows": 32}
    more = [f"--model.scorer.{name}={value}" for name, value in sizes.items()]
    decoder = "{kind: mlp, num_layers: 1, ffn_dim: 32}"
    more.append(f"--model.losses={{slots: {{decoder: {decoder}}}, kl: {{}}}}")
    scorer = "--model.scorer=ocvtp.selectors.scorers.slots.Slots"
    chosen = [word for word in words("kl", scorer, *more) if "scorer.dim" not in word]
    result = train(chosen)
    figures = logged(tmp_path / "run")
    assert {"val/slots", "val/kl_16_untrained"} <= figures.keys()
    state = torch.load(result.last, weights_only=True)["state_dict"]
    first = build(chosen).model.learning_losses.state_dict()
    learnt = {k.removeprefix("learning_losses."): v for k, v in state.items() if "losses" in k}
    assert first.keys() == learnt.keys()
    assert not any(torch.equal(learnt[name], values) for name, values in first.items())
    network = export_checkpoint(result.last, tmp_path / "artifact")
    assert network.config.losses["slots"]["decoder"]["kind"] == "mlp"
    assert not any("decode" in name for name in network.state_dict())
    assert ocvtp.build_pruner("learned", checkpoint=str(tmp_path / "artifact"), num_keep=9)
    with pytest.raises(ValueError, match="the scorer 'prompted' has none"):
        build(words("mask", "--model.losses={slots: {}}"))


@pytest.mark.slow
def test_masks_are_wanted_where_a_loss_reads_them(words, tmp_path):
    Image.new("RGB", (60, 60)).save(tmp_path / "a.png")
    said = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    samples = [{"image": "a.png", "conversations": said}] * 4
    (tmp_path / "plain.json").write_text(json.dumps(samples))
    samples[-1] = samples[-1] | {"boxes": [[1, 1, 30, 30]]}
    (tmp_path / "boxes.json").write_text(json.dumps(samples))
    short = [word for word in words("mask") if not word.startswith("--data.")]
    data = "--data=ocvtp.data.conversations.ConversationDataModule", f"--data.root={tmp_path}"
    short += [*data, "--data.batch_size=4", "--data.train_file"]
    with pytest.raises(ValueError, match=r"losses \['mask'\] read masks .*leave these losses out"):
        train([*short, "plain.json"])
    assert not (tmp_path / "run").exists()
    assert train([*short, "boxes.json"]).last


@pytest.mark.slow
def test_a_warm_start_is_of_the_same_scorer(words, tmp_path):
    network = build(words("mask")).model.network
    network.save_pretrained(tmp_path / "artifact")
    begun = build(words("kl", f"--model.warm_start={tmp_path / 'artifact'}", "--seed_everything=5"))
    assert_close(begun.model.network.state_dict(), network.state_dict(), rtol=0, atol=0)
    other = words("kl", f"--model.warm_start={tmp_path / 'artifact'}", "--model.scorer.blocks=1")
    with pytest.raises(ValueError, match="warm_start=.* has sizes=.*'blocks': 2.*'blocks': 1"):
        build(other)
    trained = SelectorNetwork.from_pretrained("checkpoints/demo-pruner/0")  # an OC-pruner
    slots = [word for word in words("mask") if not word.startswith("--model.scorer")]
    slots += ["--model.scorer=ocvtp.selectors.scorers.slots.Slots"]
    slots += [f"--model.scorer.{name}={value}" for name, value in trained.config.sizes.items()]
    begun = build([*slots, "--model.warm_start=checkpoints/demo-pruner/0"])
    assert_close(begun.model.network.state_dict(), trained.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_a_drawn_set_is_rewarded_by_the_answer(words):
    losses = "{reward: {}, mask: {}, kl: {}, attention: {}}"  # which look at every set, too
    more = f"--model.losses={losses}", "--model.samples=3", "--model.relaxation"
    sample = "ocvtp.selectors.relaxations.Sample"
    module, batch = module_of(words("kl", *more, sample))
    with module_ready(module):
        torch.manual_seed(0)
        step = module._step(batch, module.ask(batch), 8, 0.0, module.losses)
    assert step.reward.shape == step.groups.shape == (12,)
    assert step.groups.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert (step.reward < 0).all()
    assert all(len(loss(step).values) == 12 for loss in module.losses)
    for values in (step.scores, step.objects, step.teacher[0]):
        assert_close(values[::3].repeat_interleave(3, dim=0), values)
    asked = module.ask(batch)
    short = selector.drop(asked, step.gates.hard[::3], module.positions)
    answered = selector.read(module.frozen_host, short)
    by_hand = torch.nn.functional.cross_entropy(answered.logits, answered.targets, reduction="none")
    means = [-by_hand[answered.owner == row].mean() for row in range(4)]
    assert_close(step.reward[::3], torch.stack(means), rtol=1e-4, atol=1e-5)
    module.losses = build_losses({"reward": {"earned": "right"}})
    correct = answered.logits.argmax(dim=1) == answered.targets
    whole = [bool(correct[answered.owner == row].all()) for row in range(4)]
    assert len(set(whole)) == 2
    assert module._reward(asked.repeat(3), step.gates)[::3].tolist() == whole


# ---------------------------------------------------------------- the stored teacher


BEFORE = ["--max-pixels", str(most_pixels())]


def stored(words, recipe, folder, *more):
    flags = ["--output", str(folder), "--shard-size", "10"]
    return main([*BEFORE, "teacher", *words(recipe, *more), *flags])


@pytest.mark.parametrize("recipe", ["distil", "kl"])
@pytest.mark.slow
def test_a_stored_teacher_says_what_the_model_says(recipe, words, tmp_path, capsys):
    folder = tmp_path / "teacher"
    assert stored(words, recipe, folder) == 0
    said, again = capsys.readouterr().out.split("train on them with:")
    assert "24 questions" in said
    own = [word for word in words(recipe) if not word.startswith("--output=")]
    expected = ["ocvtp", *BEFORE, "train", *own, "--model.teacher", str(folder)]
    assert shlex.split(again) == expected
    steps = []
    for more in ((), (f"--model.teacher={folder}",)):
        module, batch = module_of(words(recipe, *more))
        with module_ready(module):
            steps.append(module._step(batch, module.ask(batch), 8, 0.5, module.losses))
    one, other = steps
    if recipe == "kl":
        assert_close(other.full_logits, one.full_logits, rtol=2e-2, atol=2e-2)
        assert torch.equal(other.owner, one.owner)
        assert torch.equal(other.targets, one.targets)
    else:
        assert_close(other.teacher[0], one.teacher[0], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
def test_layers_are_ranked_by_answers_with_their_own_top_k(words, capsys):
    given = [word for word in words("distil", "--json") if not word.startswith("--output")]
    assert main(["teacher", *given, "--rank"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["questions"] == 8
    *layers, random = facts["rows"]
    assert {(row["layer"], row["rows"]) for row in layers} == {
        (layer, rows) for layer in range(3) for rows in ("text", "last")
    }
    means = [row["accuracy_16"] + row["accuracy_8"] for row in layers]
    assert means == sorted(means, reverse=True)
    assert (random["layer"], random["rows"]) == (None, "random")
    module, _ = module_of(words("distil"))
    kept, right = [row for row in layers if (row["layer"], row["rows"]) == (1, "last")], []
    with torch.no_grad():
        for batch in module_data(words("distil")):
            asked = module.ask(batch)
            values = attention_rows(module.frozen_host, asked, [1], "last")[1]
            keep = torch.zeros_like(values, dtype=torch.bool)
            keep.scatter_(1, values.topk(8, dim=1).indices, True)
            answered = selector.read(module.frozen_host, selector.drop(asked, keep))
            hits = answered.logits.argmax(dim=1) == answered.targets
            right += [bool(hits[answered.owner == row].all()) for row in range(len(values))]
    assert kept[0]["accuracy_8"] == pytest.approx(sum(right) / len(right))


def module_data(words):
    """Batches of its validation."""
    data = build(words).datamodule
    data.prepare_data()
    data.setup("fit")
    return data.val_dataloader()


@pytest.mark.slow
def test_a_stopped_teacher_continues_to_the_same_files(words, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        assert stored(words, "distil", folder) == 0
    files = sorted(path.name for path in whole.iterdir())
    assert files == ["extraction.json", *(f"teacher-0000{n}.safetensors" for n in range(3)),
                     "teacher.json"]  # fmt: skip
    for name in ("teacher-00001.safetensors", "teacher.json"):
        (part / name).unlink()
    assert stored(words, "distil", part) == 0
    for name in files:
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.slow
def test_another_teacher_is_refused(words, tmp_path, capsys):
    folder = tmp_path / "teacher"
    assert stored(words, "distil", folder) == 0
    assert stored(words, "kl", folder) == 2
    assert "was begun with other settings" in capsys.readouterr().err
    with pytest.raises(ValueError, match="lacks answers"):
        build(words("kl", f"--model.teacher={folder}"))
    with pytest.raises(ValueError, match=r"lacks attention|lacks layer 1"):
        build(words("distil", f"--model.teacher={folder}", "--model.losses={rank: {layer: 1}}"))
    module, batch = module_of(words("distil", f"--model.teacher={folder}"))
    batch["keys"][0] = "another"
    with pytest.raises(ValueError, match="question another is not in"):
        module._step(batch, module.ask(batch), 8, 0.0, module.losses)
    module, batch = module_of(words("distil", f"--model.teacher={folder}"))
    asked = module.ask(batch)
    asked.columns[1, -1] = -1  # as of a smaller image
    with pytest.raises(ValueError, match=r"has 144 visual tokens in .*, and 143 here"):
        module._step(batch, asked, 8, 0.0, module.losses)
    module.processor.image_processor.image_mean = [0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match=r"prepared in another way: processor\.image_mean is"):
        Teacher(folder, module.says(), module.vlm, module.processor)
    told = json.loads((folder / "teacher.json").read_text())
    del told["processor"]  # as it was before there was one
    (folder / "teacher.json").write_text(json.dumps(told))
    assert Teacher(folder, module.says(), module.vlm, module.processor)
    assert stored(words, "mask", tmp_path / "other") == 2
    assert "nothing to store" in capsys.readouterr().err


@pytest.mark.slow
def test_a_damaged_teacher_is_one_error(words, tmp_path):
    whole = tmp_path / "teacher"
    assert stored(words, "distil", whole) == 0
    for number, damage in enumerate(
        (
            lambda d: (d / "teacher.json").write_text('{"shards": 3}'),
            lambda d: (d / "teacher.json").write_text("[]"),
            lambda d: (d / "teacher-00001.safetensors").unlink(),
            lambda d: (d / "teacher-00001.safetensors").write_bytes(b"123"),
            lambda d: save_file({"x": torch.zeros(2)}, d / "teacher-00001.safetensors"),
            lambda d: _without(d / "teacher-00001.safetensors", "attention.0"),
        )
    ):
        folder = shutil.copytree(whole, tmp_path / str(number))
        damage(folder)
        with pytest.raises(ValueError, match=r"finished and whole.*run `ocvtp teacher"):
            build(words("distil", f"--model.teacher={folder}"))


def _without(path, name):
    """The same file, but for one tensor."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, told)


@pytest.mark.slow
def test_a_teacher_of_other_weights_is_refused(words, tmp_path):
    folder = tmp_path / "teacher"
    assert stored(words, "distil", folder) == 0
    with pytest.raises(ValueError, match="other weights, or of another dtype, than model.host"):
        build(words("distil", f"--model.teacher={folder}", "--model.host.dtype=bfloat16"))


# ---------------------------------------------------------------- every command


@pytest.mark.slow
def test_every_command_takes_the_artifact(words, tmp_path, capsys):
    artifact = tmp_path / "artifact"
    export_checkpoint(train(words("mask")).last, artifact)
    model = ["--model", "checkpoints/demo-vlm"]
    show = ["--pruner", "learned", "random", "--checkpoint", str(artifact), "--num-keep", "16"]
    picture = tmp_path / "kept.png"
    image = ["--image", "docs/images/scene.png", "--prompt", "Is there a red star in the image?"]
    assert main(["show", *model, *show, *image, "--output", str(picture)]) == 0
    assert picture.stat().st_size > 10_000
    few = ["--task", "scenes", "--num-images", "4", "--num-keep", "8"]
    pruners = ["--pruners", "learned", "random"]
    run = ["--output", str(tmp_path / "judged"), "--checkpoint", str(artifact), "--json"]
    capsys.readouterr()
    assert main(["evaluate", *model, "--dtype", "float32", *few, *pruners, *run]) == 0
    facts = json.loads(capsys.readouterr().out)
    rows = {row["label"]: row for row in facts["rows"] if row["num_keep"] == 8}
    assert {"learned", "random", "untrained:learned"} <= rows.keys()
    assert all(row["figures"] for row in rows.values())


def test_a_scorer_that_learns_nothing_is_told_of_once(monkeypatch, caplog):
    module = SelectorModule.__new__(SelectorModule)
    torch.nn.Module.__init__(module)
    module.val_budgets, module._warned = [8, 16], set()
    monkeypatch.setattr(SelectorModule, "trainer", SimpleNamespace(is_global_zero=True))
    monkeypatch.setattr("ocvtp.training.selector.planned_steps", lambda trainer: 100)
    worse = {"kl_8": 0.3, "kl_8_random": 0.2, "kl_16": 0.1, "kl_16_random": 0.1}
    for done, figures in (
        (20, worse),
        (30, {**worse, "kl_8": 0.1}),
        (30, {}),
        (30, worse),
        (40, worse),
    ):
        monkeypatch.setattr("ocvtp.training.selector.steps_done", lambda trainer, done=done: done)
        module.look_at(figures)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("after 30% of the run answers with the scorer's tokens")
