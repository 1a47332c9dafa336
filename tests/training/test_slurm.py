"""Tasks as `srun` starts them, on features: they learn as one process does, and run again."""

from __future__ import annotations

import csv
import json
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from test_training import scenes, settings_file

from ocvtp.cli import main
from ocvtp.training.resume import read_checkpoint, requeued_checkpoint

__all__ = ["scenes"]

# Starts the tasks of a job, each with what SLURM sets. Where a step is given, the first is sent
# SIGUSR1 in it; the other one later, while both write where they are. Forks have all imports.
SRUN = """
import json
import os
import signal
import sys
from pathlib import Path

from transformers import CLIPImageProcessor, CLIPVisionModel

import ocvtp.training.run
from ocvtp.cli import main
from ocvtp.training.module import PrunerModule

def spied(rank, at, seen):
    step, save = PrunerModule.training_step, PrunerModule.on_save_checkpoint
    def training_step(self, batch, batch_idx):
        seen.append(batch["image_ids"])
        if self.trainer.global_step == at and rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return step(self, batch, batch_idx)
    def on_save_checkpoint(self, checkpoint):
        if at is not None and rank == 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGUSR1)
        save(self, checkpoint)
    sent = []
    PrunerModule.training_step, PrunerModule.on_save_checkpoint = training_step, on_save_checkpoint

def task(name, rank, ranks, words, at):
    file = os.open(folder / f"{name}.{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    job = {"NTASKS": ranks, "NTASKS_PER_NODE": ranks, "NNODES": 1, "JOB_ID": 7, "JOB_NAME": "night"}
    job |= {"PROCID": rank, "LOCALID": rank, "NODEID": 0}
    os.environ |= {f"SLURM_{key}": str(value) for key, value in job.items() if ranks > 1}
    status, seen = 99, []
    spied(rank, at, seen)
    try:
        status = main(["train", *words])
    finally:
        (folder / f"{name}.{rank}.json").write_text(json.dumps([status, seen]))
        sys.stdout.flush()
        os._exit(0)

folder = Path.cwd()
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "OMP_NUM_THREADS": "1"}
os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
for name, ranks, words, at in json.loads(sys.argv[2]):
    tasks = [0] * ranks
    for rank in range(ranks):
        tasks[rank] = os.fork()
        if tasks[rank] == 0:
            task(name, rank, ranks, words, at)
    for one in tasks:
        os.waitpid(one, 0)
"""


def logged(folder: Path, name: str) -> dict[int, float]:
    """A figure by the step, of all parts of a run."""
    rows = [row for log in folder.rglob("metrics.csv") for row in csv.DictReader(log.open())]
    return {int(row["step"]): float(row[name]) for row in rows if row.get(name)}


@pytest.mark.slow
def test_tasks_of_a_job_learn_as_one_process_and_run_again(tmp_path, scenes):
    path = settings_file(tmp_path, scenes, max_epochs=2, log_every_n_steps=1, accelerator="cpu")
    settings = yaml.safe_load(path.read_text())
    objective = {"class_path": "ocvtp.slots.kept.KeptObjective", "init_args": {"weights": "none"}}
    # What is drawn in a step is drawn for each process: here nothing is.
    network = {"standardize": True, "choice": "one_to_one", "truncation": "none"}
    network |= {"dropout": 0.0, "frozen_queries": True}
    settings["model"] |= {"objective": objective, "network": settings["model"]["network"] | network}
    settings["trainer"]["enable_progress_bar"] = False
    path.write_text(yaml.safe_dump(settings))
    words, features = ["--config", str(path)], str(tmp_path / "features")
    shards = ["--dtype", "float32", "--shard-size", "7"]
    assert main(["extract", *words, "--output", features, *shards]) == 0
    words += ["--data", "ocvtp.data.features.FeatureDataModule", "--data.root", features]
    words += ["--data.mixed_shards", "2"]
    alone = [*words, "--output", str(tmp_path / "alone"), "--data.batch_size", "4"]
    words += ["--output", str(tmp_path / "job"), "--data.batch_size", "2"]
    words += ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    steps = [["alone", 1, alone, None], ["first", 2, words, 2], ["second", 2, words, None]]
    (tmp_path / "srun.py").write_text(SRUN)
    words = [sys.executable, "srun.py", port, json.dumps(steps)]
    subprocess.run(words, cwd=tmp_path, check=True, timeout=300)
    said = {log.stem: log.read_text() for log in tmp_path.glob("*.log")}
    left = {one.stem: json.loads(one.read_text()) for one in tmp_path.glob("*.[01].json")}
    assert left["alone.0"][0] == 0, said["alone.0"]
    assert [left[f"first.{rank}"][0] for rank in (0, 1)] == [138, 138], said
    assert [left[f"second.{rank}"][0] for rank in (0, 1)] == [0, 0], said
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert "SLURM runs the job again" in said["first.0"]
    assert [said[f"second.{rank}"].count("best checkpoint:") for rank in (0, 1)] == [1, 0]
    assert not list((tmp_path / "job").glob("hpc_ckpt_*"))
    # Every image once an epoch, in the steps of one process, whose losses they have.
    ranks = [left[f"first.{rank}"][1] + left[f"second.{rank}"][1] for rank in (0, 1)]
    together = [sorted(a + b) for a, b in zip(*ranks, strict=True)]
    assert [len(rank) for rank in left["first.0"][1:]] == [3]
    assert together == [sorted(batch) for batch in left["alone.0"][1]]
    for epoch in (together[:6], together[6:]):
        images = [image for step in epoch for image in step]
        assert len(images) == len(set(images)) == 24
    for name, steps in (("train/loss", {*range(12)} - {2}), ("val/loss", {5, 11})):
        found, wanted = (logged(tmp_path / run, name) for run in ("job", "alone"))
        assert found.keys() == steps  # of the one that it ended after, nothing is logged
        assert found == pytest.approx({step: wanted[step] for step in steps}, rel=1e-4)


def test_what_a_job_left_may_be_a_folder_or_gone(tmp_path, monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.setenv(name, "1")
    left = tmp_path / "hpc_ckpt_1.ckpt"
    trainer = SimpleNamespace(_checkpoint_connector=SimpleNamespace(_hpc_resume_path=str(left)))
    assert requeued_checkpoint(trainer, tmp_path) is None
    left.mkdir()
    found = requeued_checkpoint(trainer, tmp_path)
    assert found == str(left)
    with pytest.raises(ValueError, match="is a folder; pass the path of a file"):
        read_checkpoint(found)
