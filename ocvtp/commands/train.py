"""`ocvtp train`: LightningCLI parses its settings, see `ocvtp.training.run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ocvtp.commands import output
from ocvtp.reporting import command_line
from ocvtp.shipped import with_configs

HELP = """\
usage: ocvtp train --config FILE|NAME [--output DIR] [--resume CKPT] [--SETTING VALUE ...]

Train the network of a pruner. Settings come first: a YAML file, or the name of one in
configs/train; every other word changes one of them.

the run
  --config FILE|NAME             settings: a YAML file, or a name of configs/train, e.g. scenes;
                                 may be given several times, the later ones count
  --output DIR                   folder of all that the run writes: checkpoints, logs, pictures
  --resume CKPT                  go on from a checkpoint; last or best: of the run's own folder;
                                 auto: the last one there, if there is any
  --seed_everything N            the run's one seed: weights, noise, order of the images
  --print_config                 print all settings as YAML, and train nothing
  --check                        try a few steps: images/s, memory, hours and disk of the whole run
  --ema X                        keep a moving average of the weights, e.g. 0.999
  --compile NAME                 compile the network, e.g. inductor
  --matmul_precision high        TF32 in fp32 runs on a GPU
  --last.every_minutes N         how often last.ckpt is written, besides after each epoch (30)

how long, and on what
  --trainer.max_epochs N         epochs; or
  --trainer.max_steps N          steps
  --trainer.max_time DD:HH:MM:SS end earlier than that
  --trainer.accelerator NAME     cpu, gpu, ... (auto: what is there)
  --trainer.devices N            processes, one a device; --trainer.num_nodes N machines
  --trainer.precision NAME       32-true, bf16-mixed, ...
  --trainer.logger false         no logs
  --trainer.fast_dev_run true    try one step and one validation batch, keep nothing

the data (CocoDataModule, FolderDataModule, SceneDataModule; FeatureDataModule of `ocvtp extract`)
  --data.root DIR                folder of the images and annotations
  --data.train_annotations null  images without annotations; --data.val_annotations likewise
  --data.batch_size N            images of a step, of each device
  --data.num_workers N           processes that load
  --data.on_error skip           leave out images that cannot be read, and name them

the network (of the OC-pruner, of surprise, of a pruner of yours)
  --model.encoder.tower NAME     hub id or folder of the frozen vision tower
  --model.encoder.layer N        number of its hidden states that the pruner reads
  --model.num_slots [N,...]      slot counts; each step draws one
  --model.val_num_slots N        slot count of the validation
  --model.network.slot_dim N     and other sizes
  --model.lr X                   peak of the learning rate
  --model.warmup_fraction X      share of the steps in which it climbs
  --model.weight_decay X

a scorer with a frozen model in the loop (configs selector/NAME)
  --model.host.model NAME        the model: a folder or hub id
  --model.scorer.dim N           and other sizes of model.scorer.class_path
  --model.budgets [N,...]        K, or shares as 0.11; each step draws one
  --model.warm_start DIR         artifact to begin from
  --model.teacher DIR            what `ocvtp teacher` stored
  --model.losses.NAME.weight X   of a loss

more
  --help all                     every setting
  --model.encoder.help CLASS     those of a class, e.g. ocvtp.encoders.clip.CLIPEncoder
  --model.objective.help CLASS   e.g. ocvtp.slots.kept.KeptObjective
  --data.help CLASS              e.g. ocvtp.data.module.SceneDataModule
"""
"""The settings that people change first. All of them take seconds of imports to list."""


def run_words(words: Sequence[str]) -> int:
    """Train and say where the checkpoints are."""
    if "--help" in words or "-h" in words:
        if "all" not in words:
            sys.stdout.write(HELP)
            return 0
        words = ["--help"]
    try:
        return _train(words)
    except KeyboardInterrupt as stop:
        said = str(stop) or "stopped before the first step; there is no checkpoint"
        if getattr(stop, "is_main", True):
            sys.stderr.write(f"ocvtp: {said}\n")
        return int(getattr(stop, "exit_status", 130))


def _train(words: Sequence[str]) -> int:
    words = with_configs(words, "train")
    from ocvtp.training.run import check, train

    if "--check" in words:
        found = check(words)
        if found.is_main:
            output.emit({}, "\n".join(found.lines()), as_json=False)
        return 0
    result = train(words)
    lines = [result.note] if result.note else []
    if result.best:
        lines += [f"best checkpoint: {result.best}", f"last checkpoint: {result.last}"]
        export = command_line.command("export", "--checkpoint", result.best, "--output", "DIR")
        lines += [f"export it with:  {export}"]
    if result.is_main:
        output.emit({}, "\n".join(lines), as_json=False)
    return 0
