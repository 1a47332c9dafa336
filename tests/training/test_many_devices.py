"""What must be the same on any number of devices, with two processes over gloo."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pytest
import torch
from fresh_process import RUN, TRAINS, in_two_processes, outputs
from test_training import damage, data, module, scenes, settings_file, trainer
from torch.testing import assert_close

from ocvtp.data.loader import InOrder
from ocvtp.export import export_checkpoint
from ocvtp.training.figures import Figures, share_of_gradient
from ocvtp.training.run import build, train
from ocvtp.training.schedule import warmup_cosine

__all__ = ["scenes"]

# Uneven shares of seven images, one after the other: of the second step one process has none.
SPY = """
import os
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel
from ocvtp.data.loader import InOrder, ResumableLoader
from ocvtp.training.figures import Figures, gathered, share_of_gradient

rank = int(os.environ["LOCAL_RANK"])
distributed.init_process_group("gloo", rank=rank, world_size=2)
torch.manual_seed(0)
images, network = torch.randn(7, 5), DistributedDataParallel(nn.Linear(5, 1, bias=False))
steps = [[images[:4], images[4:5]], [images[5:7], images[:0]]]
gradients, figures = [], Figures()
for step in steps:
    own = step[rank]
    network.zero_grad()
    loss = network(own).square().mean() if len(own) else network(images[:1]).sum() * 0.0
    (loss * share_of_gradient(len(own), torch.device("cpu"))).backward()
    gradients.append(network.module.weight.grad.clone())
    if len(own):
        figures.add({"loss": loss}, len(own))
        figures.add({f"only{rank}": 1.0 + rank}, 1)
def two_epochs(images):
    loader = ResumableLoader(range(images), 2, whole=True, collate_fn=list)
    return [loader, loader]

torch.save({
    "gradients": gradients, "pooled": figures.pooled(), "nothing": figures.pooled(),
    "whole": [[list(batch) for batch in loader] for loader in two_epochs(9)],
    "parts": [list(InOrder(range(n))) for n in (7, 2, 1)], "ranks": gathered(rank),
}, f"uneven{rank}.pt")
"""
TWO = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, scenes):
    """Where two processes have run what tests look at, what they said, words of a run."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "uneven").mkdir()
    words = words_of_uneven(folder, scenes)
    uneven = [*words, *TWO, "--trainer.max_epochs", "2"]
    (folder / "skips").mkdir()
    skips = settings_file(folder / "skips", damage(scenes, folder / "damaged"), accelerator="cpu")
    skips = ["--config", str(skips), "--data.on_error", "skip", "--data.batch_size", "1", *TWO]
    runs = [RUN.format(words=["train", *words]) for words in (uneven, skips)]
    codes = [in_two_processes(code) for code in (SPY, *runs)]
    said = outputs(codes, first=TRAINS, folders=[folder] * 3)
    return folder, said, words


@pytest.mark.slow
def test_two_processes(made):
    """DDP over gloo: each rank trains on its share; a rank without images does not stall."""
    folder, (_, _, said), _ = made
    assert "000000000002" in said
    content = torch.load(folder / "skips/checkpoints/last.ckpt", weights_only=True)
    assert content["global_step"] == 12  # 24 images, 2 ranks, one image each
    assert content["ocvtp"]["training"]["devices"] == 2
    assert any(row["val/loss"] for row in rows(folder / "skips"))
    export_checkpoint(folder / "skips/checkpoints/best.ckpt", folder / "out")


@pytest.mark.slow
def test_uneven_shares_count_by_their_images(made):
    ranks = [torch.load(made[0] / f"uneven{rank}.pt", weights_only=True) for rank in (0, 1)]
    torch.manual_seed(0)
    images, network = torch.randn(7, 5), torch.nn.Linear(5, 1, bias=False)
    for number, seen in enumerate((images[:5], images[5:])):
        network.zero_grad()
        network(seen).square().mean().backward()
        for rank in ranks:
            assert_close(rank["gradients"][number], network.weight.grad)
    mean = float(network(images).detach().square().mean())
    assert ranks[0]["pooled"] == ranks[1]["pooled"]
    assert ranks[0]["pooled"] == pytest.approx({"loss": mean, "only0": 1.0, "only1": 2.0})
    assert [rank["nothing"] for rank in ranks] == [{}, {}]
    assert [rank["parts"] for rank in ranks] == [[[0, 1, 2], [0], [0]], [[3, 4, 5, 6], [1], [0]]]
    assert ranks[0]["ranks"] == [0, 1]
    for epoch in (0, 1):  # nine images in steps of four: every one once, and one step of one image
        shares = [rank["whole"][epoch] for rank in ranks]
        assert [[len(batch) for batch in share] for share in shares] == [[2, 2, 1], [2, 2, 0]]
        assert sorted(image for share in shares for batch in share for image in batch) == [
            *range(9)
        ]


def test_figures_of_one_process():
    figures = Figures()
    figures.add({"loss": torch.tensor(1.0), "share": 0.5}, 3)
    figures.add({"loss": torch.tensor(4.0)}, 1)
    figures.add_sum("ari", torch.tensor(float(0)), torch.tensor(0))
    found = figures.pooled()
    assert found.pop("ari") != 0  # NaN: no image counted
    assert found == {"loss": 1.75, "share": 0.5}
    assert figures.pooled() == {}
    assert share_of_gradient(3, torch.device("cpu")) == 1.0
    assert list(InOrder(range(3))) == [0, 1, 2]


def words_of_uneven(folder, scenes):
    """24 training images, and five of validation, of which the second process can read none."""
    root = folder / "scenes"
    shutil.copytree(scenes, root)
    for victim in sorted((root / "val2017").iterdir())[2:5]:
        victim.write_bytes(victim.read_bytes()[:300])
    path = settings_file(folder / "uneven", root, accelerator="cpu", log_every_n_steps=1)
    words = ["--config", str(path), "--data.on_error", "skip", "--data.batch_size", "2"]
    return [*words, "--data.limit_val", "5", "--trainer.enable_progress_bar", "false"]


def rows(folder: Path, version: int = 0) -> list[dict[str, str]]:
    return list(csv.DictReader(open(folder / f"csv/version_{version}/metrics.csv")))


@pytest.mark.slow
def test_a_run_that_goes_on_with_one_device(made):
    """Validation, schedule and length of two processes are those of one; see each assertion."""
    folder, (_, said, _), words = made
    folder = folder / "uneven"
    assert said.count("best checkpoint:") == 1  # one process speaks
    last = folder / "checkpoints/last.ckpt"
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 12
    # Images that a process cannot read neither stop it nor count; the figure is that of one device.
    cli = build([*words, "--trainer.logger", "false"])
    cli.model.load_state_dict(kept["state_dict"])
    alone = cli.trainer.validate(cli.model, cli.datamodule, verbose=False)[0]
    logged = [row for row in rows(folder) if row["val/loss"]][-1]
    for name in ("loss", "coverage_residual", "mbo_i"):
        assert float(logged[f"val/{name}"]) == pytest.approx(alone[f"val/{name}"], rel=1e-5)
    assert float(logged["skipped_images"]) == 3 * 2  # of both processes, in two validations
    assert len([row for row in rows(folder) if row["train/loss"]]) == 12
    # 6 steps an epoch were taken; now it is 12, and the rate ends where it should.
    train([*words, "--resume", str(last), "--trainer.max_epochs", "4"])
    kept = torch.load(last, weights_only=True)
    assert kept["global_step"] == 12 + 24
    assert kept["ocvtp"]["training"]["epochs"] == 4
    rates = [float(row["lr-AdamW"]) for row in rows(folder, 1) if row["lr-AdamW"]]
    assert len(rates) == 24
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == pytest.approx(1e-3 * warmup_cosine(24, round(48 * 4 / 30), 48, 1e-5))
    assert kept["optimizer_states"][0]["param_groups"][0]["lr"] == pytest.approx(1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_an_epochs_last_step_ends_it_on_any_layout(tmp_path, scenes, before, after):
    """A checkpoint written there, before the validation, is continued with whole epochs."""
    from pytorch_lightning.callbacks import ModelCheckpoint

    def fit(batch_size, epochs, resume=None):
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        model = module()
        run = trainer(tmp_path, max_epochs=epochs, callbacks=[saver], limit_val_batches=1)
        images = data(scenes, model, batch_size=batch_size)
        run.fit(model, images, ckpt_path=resume, weights_only=True)
        rate = run.optimizers[0].param_groups[0]["lr"]
        return run.global_step, run.current_epoch, rate

    steps = 24 // before
    fit(before, 1)
    found = fit(after, 3, tmp_path / f"step={steps}.ckpt")
    assert found == (steps + 2 * 24 // after, 3, pytest.approx(1e-8))
