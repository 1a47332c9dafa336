"""Which checkpoint a run continues, and whether it is one of the same run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from ocvtp.learning.artifact import explained, refuse_not_finite
from ocvtp.pruners import trainable
from ocvtp.slots.tensor_file import load_tensors
from ocvtp.training.base import CHECKPOINT_KEY, NetworkModule

_LOG = logging.getLogger(__name__)

_OF_A_RUN = (CHECKPOINT_KEY, "state_dict", "loops", "callbacks", "optimizer_states", "global_step")
_TRAINER = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")
_OF_THE_RUN = ("compile", "matmul_precision", "whole_epochs")
_SILENT = (
    *("data.num_workers", "data.val_batch_size", "model.statistics_images", "model.load_tower"),
    *("data.persistent_workers", "data.pin_memory", "data.prefetch_factor", "data.verify"),
)
"""Settings that do not change the result."""
_TOLD = (
    *("data.root", "data.batch_size", "data.on_error", "data.val_images", "data.val_annotations"),
    *("data.decoder", "data.num_val", "data.limit_val", *(f"trainer.{name}" for name in _TRAINER)),
    *_OF_THE_RUN,
)
"""Settings that may change: where the data is, how it validates, how devices share a step."""


def run_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings of a run, in plain types, that a checkpoint keeps for `refuse_another_run`.

    Args:
        config: all of them, as `ocvtp train` parsed them.
    """
    data = dict(config["data"])
    if isinstance(data.get("init_args"), Mapping):
        data["init_args"] = {k: v for k, v in data["init_args"].items() if k != "transform"}
    trainer = {name: config["trainer"].get(name) for name in _TRAINER}
    parts = {"model": config["model"], "data": data, "trainer": trainer}
    own = {name: config.get(name) for name in ("ema", *_OF_THE_RUN)}
    return {name: _plain(part) for name, part in (parts | own).items()}


def find_checkpoint(resume: str, folder: Path) -> str | None:
    """The file that `--resume` means.

    Args:
        resume: a file; `last` or `best`: that of `folder`, the run's checkpoints; `auto`: the last
            one of these, where there is any.

    Returns:
        None where a run starts from nothing.

    Raises:
        ValueError: if it is not there, or is a folder.
    """
    path = Path(resume)
    if resume == "auto" and not path.exists():
        path = folder / "last.ckpt"
        return str(path) if path.exists() else None
    if resume in ("last", "best") and not path.exists():
        path = folder / f"{resume}.ckpt"
    if path.is_dir():
        found = sorted({*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")})
        pick = next((p for p in found if p.name == "last.ckpt"), found[0] if found else None)
        advice = f"pass a file of it, e.g. {pick}" if pick else "and there is no checkpoint in it"
        raise ValueError(f"--resume {resume} is a folder; {advice}.")
    if not path.is_file():
        raise ValueError(
            f"--resume {path} does not exist; pass last.ckpt or best.ckpt of the run to continue."
        )
    return str(path)


def requeued_checkpoint(trainer: Any, folder: Path) -> str | None:
    """What a job that SLURM runs again goes on from, whatever else its command says.

    Args:
        trainer: whose folder (`default_root_dir`) the job left it in.
        folder: the run's checkpoints, of which the last one is newer where a job that was run again
            was killed later.
    """
    if not SLURMEnvironment.detect():
        return None
    left: str | None = trainer._checkpoint_connector._hpc_resume_path
    if left is None:
        return None
    there = [path for path in (Path(left), folder / "last.ckpt") if path.exists()]
    if not there:  # a link to what is gone
        return None
    path = max(there, key=lambda path: path.stat().st_mtime_ns)
    _LOG.warning("the job goes on from %s; remove %s to start over", path, left)
    return str(path)


def read_checkpoint(path: str) -> dict[str, Any]:
    """The content of a checkpoint of `ocvtp train`.

    Raises:
        ValueError: if it is damaged or anything else.
    """
    with explained(f"--resume {path} cannot be continued"):
        content = load_tensors(path)
        if missing := [name for name in _OF_A_RUN if name not in content]:
            raise ValueError(
                f"it is no whole checkpoint of `ocvtp train`, as it lacks {', '.join(missing)};"
                " pass last.ckpt or best.ckpt of a run."
            )
        _config(dict(content[CHECKPOINT_KEY]))
        refuse_not_finite(content["state_dict"])
    return content


def refuse_another_run(path: str, content: Mapping[str, Any], module: NetworkModule) -> None:
    """Compare a checkpoint with the settings of this run.

    Settings that change what the weights mean, the sizes of the network or the numbers of the run
    must be the same. How long it trains, on what, and where its files are may change.

    Args:
        path: of the checkpoint.
        content: of the file.
        module: built from the settings of this run.

    Raises:
        ValueError: with every setting that differs, and both values.
    """
    kept = content[CHECKPOINT_KEY]
    with explained(f"--resume {path} cannot be continued"):
        found = dict(_differences("", dict(kept.get("settings") or {}), module.run_settings))
        for name in _SILENT:
            found.pop(name, None)
        told = {name: found.pop(name) for name in _TOLD if name in found}
        found = found or _of_the_network(kept, module)
    if found:
        which = "; ".join(
            f"{name} is {_show(b)}, there {_show(a)}" for name, (a, b) in found.items()
        )
        raise ValueError(
            f"--resume {path} is of a run with other settings: {which}. Pass the settings of that"
            " run (its config.yaml has them), or start a new one without --resume."
        )
    if told:
        which = "; ".join(f"{name}: {_show(a)} -> {_show(b)}" for name, (a, b) in told.items())
        _LOG.warning("the run continues with other settings than before: %s", which)
    with explained(f"--resume {path} does not hold the weights of this network"):
        module.load_state_dict(content["state_dict"])


def _config(kept: Mapping[str, Any]) -> Any:
    """The config of the network, of the kind that the checkpoint names."""
    network_class = trainable.of_format(kept.get("format")).network_class
    return network_class.read_config(dict(kept["config"]))


def _of_the_network(kept: Mapping[str, Any], module: NetworkModule) -> dict[str, tuple[Any, Any]]:
    """By the artifact's own entries; checkpoints of older versions have no others."""
    before, now = (_entries(config) for config in (_config(kept), module.network.config))
    pairs = {name: (before.get(name), value) for name, value in now.items()}
    training = kept.get("training") or {}
    run = {"lr": module.lr, "weight_decay": module.weight_decay, "seed": module.seed}
    for key, value in run.items():
        name = "seed_everything" if key == "seed" else f"model.{key}"
        pairs[name] = (training.get(key, value), value)
    found = (_differences(name, *pair) for name, pair in pairs.items())
    return dict(chain.from_iterable(found))


_PROVENANCE = {
    **{"tower": "model.encoder.tower", "layer": "model.encoder.layer"},
    **{"preprocessing": "model.encoder.processor", "num_slots": "model.num_slots"},
    **{"feature_dim": "model.encoder (feature_dim)", "layout": "model.encoder (layout)"},
    **{"grid_hw": "model.encoder (grid_hw)", "decoder": "model.objective.decoder"},
    **{"objective": "model.objective", "target_layer": "model.objective.target_layer"},
}
"""Entries of a config that are no sizes, and the settings that they come from."""


def _entries(config: Any) -> dict[str, Any]:
    """Those of a config, by the names of the settings that they come from."""
    values = _plain(asdict(config))
    del values["training"]
    values |= values.pop("sizes", {})
    return {_PROVENANCE.get(key, f"model.network.{key}"): value for key, value in values.items()}


def _differences(name: str, old: Any, new: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Settings that both have and that differ, by their names on the command line."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        if old.get("class_path") != new.get("class_path"):
            yield name, (old.get("class_path"), new.get("class_path"))
            return
        for key in (key for key in new if key in old):
            inner = name if key == "init_args" else f"{name}.{key}".removeprefix(".")
            yield from _differences(inner, old[key], new[key])
    elif old != new:
        yield "seed_everything" if name in ("model.seed", "data.seed") else name, (old, new)


def _show(value: Any) -> str:
    text = value["class_path"] if isinstance(value, Mapping) and "class_path" in value else value
    return repr(text) if len(repr(text)) <= 100 else f"{repr(text)[:97]}..."


def _plain(value: Any) -> Any:
    """Dictionaries, lists and what is neither, as text where it is no plain value."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
