"""The network of `surprise`: against a loop, what it may see, how it is trained and saved."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_networks import network_setting
from torch.nn import functional
from torch.testing import assert_close

import ocvtp
from ocvtp.cli import main
from ocvtp.data.scenes import draw_scene, write_scenes
from ocvtp.learning import NetworkConfig
from ocvtp.pruners import trainable
from ocvtp.slots.statistics import relative_log
from ocvtp.structures import Needs, VisualTokens
from ocvtp.surprise.network import (
    SurpriseNetwork,
    SurpriseObjective,
    SurpriseSizes,
)
from ocvtp.training.resume import read_checkpoint

WIDTH, GRID = 6, (3, 4)
COUNT = GRID[0] * GRID[1]


@pytest.fixture
def network():
    """Of random weights in float64, whose statistics are not those of tokens as they are."""
    torch.manual_seed(0)
    sizes = SurpriseSizes(hidden_dim=5, reach=1)
    made = SurpriseNetwork(NetworkConfig(sizes=sizes, feature_dim=WIDTH, layer=3, tower="t"))
    made.inputs.mean.copy_(torch.randn(WIDTH))
    made.inputs.scale.copy_(torch.rand(WIDTH) + 0.5)
    return made.eval()


def tokens_of(hidden, grid_hw=GRID, valid=None, **more):
    return VisualTokens(hidden, grid_hw, valid, hidden={3: hidden}, **more)


def draw(batch=2, count=COUNT):
    return torch.randn(batch, count, WIDTH, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def errors_by_hand(network, hidden, real):
    """Token by token of one image: the eight around it, through the layers one after another."""
    given = [(token - network.inputs.mean) / network.inputs.scale for token in hidden]
    weight, bias = network.look.weight, network.look.bias
    errors = []
    for n in range(COUNT):
        row, column = divmod(n, GRID[1])
        seen = bias.clone()
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                y, x = row + down, column + across
                inside = 0 <= y < GRID[0] and 0 <= x < GRID[1]
                if (down, across) == (0, 0) or not inside or not real[y * GRID[1] + x]:
                    continue
                token = network.reduce.weight @ given[y * GRID[1] + x]
                seen = seen + weight[:, :, 1 + down, 1 + across] @ token
        first, second = network.foretell[1], network.foretell[3]
        inner = first.weight @ functional.gelu(seen) + first.bias
        foretold = second.weight @ functional.gelu(inner) + second.bias
        errors.append((foretold - given[n]).square().mean() if real[n] else torch.zeros(()))
    return torch.stack(errors)


# ---------------------------------------------------------------- what it computes


def test_errors_are_those_of_a_loop(network):
    hidden = draw()
    valid = torch.ones(2, COUNT, dtype=torch.bool)
    valid[1, [2, 9, 10, 11]] = False
    for given in (None, valid):
        found = network.errors(tokens_of(hidden, valid=given))
        for b in range(2):
            real = torch.ones(COUNT, dtype=torch.bool) if given is None else given[b]
            assert_close(found[b], errors_by_hand(network, hidden[b], real))


def test_a_token_is_not_seen_where_it_is_foretold(network):
    """What is foretold for a token is another one's error at that place; neighbours do see it."""
    hidden, place = draw(1), 5
    changed = hidden.clone()
    changed[0, place] += 3.0
    given = [network.inputs(h)[0, place] for h in (hidden, changed)]
    hidden.requires_grad_()
    error = network.errors(tokens_of(hidden))
    # with the foretold token f held: d error / d token = 2 (given - f) / (D scale), nothing else
    [slope] = torch.autograd.grad(error[0, place], hidden, retain_graph=True)
    foretold = given[0] - slope[0, place] * network.inputs.scale * WIDTH / 2
    wanted = (foretold - given[1]).square().mean()
    after = network.errors(tokens_of(changed))
    assert_close(after[0, place], wanted)
    apart = {5 - 5, 4, 1, 2, 6, 8, 9, 10}  # the eight around it
    moved = (after - error).abs()[0] > 1e-5
    assert {n for n in range(COUNT) if moved[n]} == apart | {place}


def test_padding_is_the_mean_token_and_has_no_error(network):
    hidden = draw(1)
    valid = torch.ones(1, COUNT, dtype=torch.bool)
    valid[0, 8:] = False
    found = network.errors(tokens_of(hidden, valid=valid))
    other = torch.where(valid[:, :, None], hidden, torch.full_like(hidden, 1e3))
    assert_close(network.errors(tokens_of(other, valid=valid)), found)
    alone = network.errors(tokens_of(hidden[:, :8], (2, 4)))
    assert_close(found[:, :8], alone)
    assert not found[:, 8:].any()
    surprise = network.surprise(tokens_of(hidden, valid=valid))
    assert_close(surprise[:, :8], network.surprise(tokens_of(hidden[:, :8], (2, 4))))
    assert not surprise[:, 8:].any()


def test_surprise_is_half_the_logarithm_of_the_error_about_its_mean(network):
    tokens = tokens_of(draw())
    logs = network.errors(tokens).log() / 2
    assert_close(network.surprise(tokens), logs - logs.mean(dim=1, keepdim=True))
    assert relative_log(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (tokens_of(torch.zeros(1, COUNT, 5)), r"\[1, 12, 5\] on a grid of 3 x 4; .* columns, 6\]"),
        (tokens_of(torch.zeros(1, 11, WIDTH)), r"\[1, 11, 6\] on a grid of 3 x 4"),
        (
            tokens_of(torch.zeros(1, COUNT, WIDTH), grids=torch.tensor([[[4, 3]]])),
            r"on grids of their own; .* all images on one grid: hidden_states\[3\] of t\.",
        ),
    ],
)
def test_other_tokens_are_refused(network, tokens, message):
    with pytest.raises(ValueError, match=message):
        network.errors(tokens)


@pytest.mark.parametrize("sizes", [{"hidden_dim": 0}, {"reach": 0}])
def test_sizes_below_one_are_refused(sizes):
    with pytest.raises(ValueError, match=r"hidden_dim=.*, reach=.*; pass whole numbers above 0"):
        SurpriseSizes(**sizes)


@pytest.mark.parametrize(("reach", "fits"), [(4, True), (5, False), (30, False)])
def test_no_token_is_read_from_beyond_the_grid(reach, fits):
    origin = {"feature_dim": 4, "layer": 3, "grid_hw": (3, 5)}
    sizes = SurpriseSizes(hidden_dim=2, reach=reach)
    if fits:
        assert SurpriseNetwork.build(sizes, None, **origin).config.sizes.reach == reach
        return
    with pytest.raises(ValueError, match=rf"reach={reach}; of the tower's 3 x 5 .*; pass 1 to 4\."):
        SurpriseNetwork.build(sizes, None, **origin)


def test_the_objective_is_the_mean_error_of_real_tokens(network):
    valid = torch.ones(2, COUNT, dtype=torch.bool)
    valid[1, 4:] = False
    tokens, objective = tokens_of(draw(), valid=valid), SurpriseObjective()
    outcome = objective(network, tokens, 4)
    errors = network.errors(tokens)
    assert_close(outcome.loss, errors[valid].mean())
    assert_close(outcome.logs["foretold"], 1 - errors[valid].mean())
    assert objective.needs(3) == Needs(hidden=(3,))


# ---------------------------------------------------------------- the pruner


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_power": -1.0}, "pass powers of at least 0"),
        ({"surprise_power": -0.1}, "pass powers of at least 0"),
        ({"balance": 1.5}, "a balance of 0 to 1"),
        ({"head": "sharp"}, "pass sharpest or mean"),
        ({"likeness_power": 0.0}, "pass numbers above 0"),
        ({"spread": 0.0}, "pass numbers above 0"),
        ({"penalty": -0.3}, "pass numbers above 0"),
    ],
)
def test_wrong_settings_of_the_pruner_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ocvtp.build_pruner("surprise", num_keep=4, **network_setting("surprise", WIDTH), **settings)


def test_it_needs_no_cls_where_the_attention_has_no_power():
    own = network_setting("surprise", WIDTH)
    pruner = ocvtp.build_pruner("surprise", num_keep=4, attention_power=0.0, **own)
    assert pruner.needs == Needs(hidden=(3,))
    tokens = tokens_of(draw())
    assert pruner.select(tokens).keep_indices.shape == (2, 4)
    with pytest.raises(ValueError, match="reads the grid of the tokens"):
        pruner.select(replace(tokens, grid_hw=(5, 5)))


def test_what_surprises_and_what_the_cls_attends_to_is_kept():
    """Flat images of one odd token, and of one that the CLS looks at."""
    own = network_setting("surprise", WIDTH)
    torch.nn.init.zeros_(own["network"].foretell[3].weight)
    torch.nn.init.zeros_(own["network"].foretell[3].bias)
    hidden = torch.randn(1, COUNT, WIDTH, generator=torch.Generator().manual_seed(3))
    hidden[0, 7] *= 20  # all are foretold to be the mean one
    looked = torch.full((1, COUNT), 0.01)
    looked[0, 2] = 0.9
    attention = {(-2, "cls_sharpest"): looked, (-2, "cls"): looked.roll(2, 1)}
    tokens = replace(tokens_of(hidden), attention=attention)
    asked = (((0.0, 3.0), "mean", 7), ((3.0, 0.0), "sharpest", 2), ((3.0, 0.0), "mean", 4))
    for powers, head, wanted in asked:
        pruner = ocvtp.build_pruner(
            "surprise",
            num_keep=1,
            balance=0.0,
            attention_power=powers[0],
            surprise_power=powers[1],
            head=head,
            likeness_power=20.0,
            **own,
        )
        assert pruner.select(tokens).keep_indices.tolist() == [[wanted]]


def test_how_far_a_token_covers_hangs_on_its_own_image_alone():
    """Beside an image of more rows, on a padded grid, an image keeps what it keeps alone."""
    own = network_setting("surprise", WIDTH, (6, 3))
    pruner = ocvtp.build_pruner(
        "surprise", num_keep=4, attention_power=0.0, balance=0.0, likeness_power=0.1, **own
    )
    hidden = torch.randn(24, 18, WIDTH, generator=torch.Generator().manual_seed(7))
    short = torch.arange(24) % 2 == 1
    valid = ~short[:, None] | (torch.arange(18) < 9)
    padded = VisualTokens(hidden, (6, 3), valid, hidden={3: hidden})
    cut = hidden[short, :9]
    alone = pruner.select(VisualTokens(cut, (3, 3), hidden={3: cut}))
    assert torch.equal(pruner.select(padded).keep_indices[short], alone.keep_indices)


# ---------------------------------------------------------------- training


SETTINGS = """
model:
  encoder:
    class_path: ocvtp.encoders.clip.CLIPEncoder
    init_args: {tower: "random:tiny", layer: 2}
  network:
    class_path: ocvtp.surprise.network.SurpriseSizes
    init_args: {hidden_dim: 16, reach: 1}
  num_slots: [8, 16]
  lr: 1.0e-2
  statistics_images: 32
data:
  class_path: ocvtp.data.module.SceneDataModule
  init_args: {root: scenes, num_train: 64, num_val: 8, batch_size: 8}
trainer:
  max_epochs: 3
  accelerator: cpu
  enable_progress_bar: false
  log_every_n_steps: 1
"""


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Trains in a folder of its own; returns what was saved."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "surprise.yaml").write_text(SETTINGS)

    def train(output, *more):
        words = ["train", "--config", "surprise.yaml", "--output", output, *more]
        assert main(words) == 0
        return read_checkpoint(f"{output}/checkpoints/last.ckpt")

    return train


@pytest.mark.slow
def test_training_lowers_the_loss_and_a_second_run_is_the_same(trained):
    first, second = (trained(output) for output in ("a", "b"))
    for name, value in first["state_dict"].items():
        assert_close(value, second["state_dict"][name], rtol=0, atol=0)
    assert first["ocvtp"]["format"] == "ocvtp.surprise"
    assert first["state_dict"]["network.inputs.num_tokens"] == 32 * 144
    assert not first["state_dict"]["network.inputs.mean"].equal(torch.zeros(64))
    rows = csv.DictReader(Path("a/csv/version_0/metrics.csv").open())
    losses = [float(row["val/loss"]) for row in rows if row["val/loss"]]
    assert losses[2] < 0.97 * losses[1] < 0.9 * losses[0]
    found = first["ocvtp"]["training"]["validation"]
    assert found["loss"] == pytest.approx(losses[2], abs=1e-3)
    assert found["foretold"] == pytest.approx(1 - losses[2], abs=1e-3)


@pytest.mark.slow
def test_the_commands_know_it(trained, capsys):
    """Trained, exported, evaluated on the tower alone beside its untrained self, and drawn."""
    trained("run", "--trainer.max_epochs", "1")
    words = ["export", "--checkpoint", "run/checkpoints/last.ckpt", "--output", "exported"]
    assert main(words) == 0
    assert "hidden_states[2]" in capsys.readouterr().out
    assert trainable.readers("exported") == ["surprise"]
    exported = SurpriseNetwork.from_pretrained("exported")
    assert exported.config.sizes == SurpriseSizes(16, 1)
    assert exported.config.objective == "surprise"
    write_scenes("drawn", num_train=1, num_val=3, size=96, seed=0)
    files = ["--images", "drawn/val2017"]
    files += ["--instances", "drawn/annotations/instances_val2017.json"]
    chosen = ["--num-keep", "9", "--checkpoint", "exported", "--json"]
    words = ["evaluate", "--tower", "random:tiny", "--task", "coverage", *files, "--seeds", "1"]
    assert main([*words, "--pruners", "surprise", "--output", "evaluated", *chosen]) == 0
    rows = {row["label"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["surprise"]["trained"]
    assert rows["untrained:surprise"]["control"]
    assert rows["surprise"]["visual_tokens"] == rows["untrained:surprise"]["visual_tokens"] == 9
    Image.fromarray(draw_scene(0, 0).image).save("picture.png")
    words = ["show", "--tower", "random:tiny", "--pruner", "surprise", "--image", "picture.png"]
    assert main([*words, "--output", "kept.png", *chosen]) == 0
    assert json.loads(capsys.readouterr().out)["kept"] == {"surprise": 9}
    assert Image.open("kept.png").size[0] > 96


def test_a_saved_network_is_read_as_it_was(network, tmp_path):
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["format"] == "ocvtp.surprise"
    again = SurpriseNetwork.from_pretrained(tmp_path)
    assert again.config == network.config
    tokens = tokens_of(draw())
    assert_close(again.errors(tokens), network.errors(tokens), rtol=0, atol=0)
    pruner = ocvtp.build_pruner("surprise", num_keep=4, checkpoint=str(tmp_path))
    assert_close(pruner.network.inputs.mean, network.inputs.mean, rtol=0, atol=0)
    with pytest.raises(ValueError, match="pruner 'ocvtp' got .* a network of pruner 'surprise'"):
        ocvtp.build_pruner("ocvtp", num_keep=4, checkpoint=str(tmp_path))
