"""Settings that have several names: one seed, one folder for all that a run writes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import yaml
from jsonargparse import Namespace
from pytorch_lightning.cli import LightningArgumentParser

from ocvtp.field_types import shown
from ocvtp.plain_yaml import refuse_bomb
from ocvtp.training.wrong_settings import parameters

SEED = ("seed_everything", "model.seed", "model.init_args.seed", "data.init_args.seed")
_NETWORK = "model.network"
OUTPUT = ("output", "trainer.default_root_dir")
_DEFAULT_OUTPUT = "outputs/train"
_LOGGERS = {"CSVLogger": "csv", "TensorBoardLogger": "tensorboard"}
_MOST_BYTES = 4 * 1024**2
_FOLDERS = ("save_dir", "dirpath", "log_dir", "root_dir", "dir")
"""Settings of loggers, callbacks and profilers that name a folder to write to."""


def settle(parser: LightningArgumentParser, words: Sequence[str], config: Namespace) -> None:
    """Give all names of the seed one value, and all that a run writes one folder.

    Args:
        parser: of `ocvtp train`.
        words: of the command line.
        config: what they were parsed to; changed in place.

    Raises:
        ValueError: if two names of one setting disagree, or sizes are of two networks.
    """
    said = parser.parse_args(list(words), defaults=False)
    if "network" in config.model:
        _refuse_two_networks(words, config)
    _settle_seed(words, said, config)
    _settle_output(parser, words, said, config)


def names_module(words: Sequence[str]) -> bool:
    """Whether settings choose the LightningModule, by `model.class_path`.

    Args:
        words: of the command line.
    """
    return any("class_path" in model for model in _given_models(words))


def refuse_bombs(words: Sequence[str]) -> None:
    """Refuse settings, in files and on the command line, that stand for far more than they say.

    Args:
        words: of the command line.

    Raises:
        ValueError: names the file or the flag.
    """
    for word, after in zip_longest(words, words[1:]):
        flag, is_one_word, value = word.partition("=")
        value = value if is_one_word else after
        if value is None or not flag.startswith("-"):
            continue
        try:
            refuse_bomb(_text_of(value))
        except ValueError as error:
            raise ValueError(f"{flag} {shown(value)} is refused: {error}.") from error


def _text_of(value: str) -> str:
    """What a file of settings holds, where it names one; else itself."""
    path = Path(value)
    try:
        if path.suffix not in (".yaml", ".yml", ".json") or not path.is_file():
            return value
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # which the parser says
        return ""


def _refuse_two_networks(words: Sequence[str], config: Namespace) -> None:
    """A class and plain sizes (the OC-pruner's) would be mixed, or one of them lost."""
    given = [_kind_of_network(value) for value in _given_networks(words)]
    named = next((kind for kind in reversed(given) if kind), None)
    if named is None:
        if (config.model.network or {}).get("class_path") is not None:  # an empty mapping
            config.model.network = None
        return
    own = f"{named.rpartition('.')[2]} (it has {', '.join(parameters(named))})"
    if "" in given:
        raise ValueError(
            f"model.network is {own} and plain sizes, which are those of the OC-pruner, in another"
            " place; pass settings of one network alone."
        )
    if "class_path" not in (config.model.network or {}):
        flag = next(word for word in words if word.startswith(f"--{_NETWORK}."))
        raise ValueError(f"{flag.split('=')[0].removeprefix('--')} is no setting of {own}.")


def _given_networks(words: Sequence[str]) -> Iterator[Any]:
    """What files and the command line say for `model.network`, in their order."""
    for model in _given_models(words):
        if "network" in model:
            yield model["network"]


def _given_models(words: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """What files and the command line say for `model`, in their order.

    Of flags, those that name classes: `--model`, `--model.class_path`, `--model.network`.
    """
    for word, after in zip_longest(words, words[1:]):
        flag, is_one_word, value = word.partition("=")
        value = value if is_one_word else after
        if flag in ("--config", "-c") and Path(str(value)).is_file():
            yield _model_of(Path(value))
        elif value is not None and flag in (f"--{_NETWORK}", f"--{_NETWORK}.class_path"):
            yield {"network": yaml.safe_load(value)}
        elif value is not None and flag in ("--model", "--model.class_path"):
            yield {"class_path": value}


def _model_of(file: Path) -> Mapping[str, Any]:
    """Nothing where the file is none of settings, which the parser says."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return {}
    model = content.get("model") if isinstance(content, Mapping) else None
    return model if isinstance(model, Mapping) else {}


def _kind_of_network(value: Any) -> str | None:
    """The path of a class, nothing for plain sizes, None where nothing is said."""
    if isinstance(value, Mapping):
        return str(value.get("class_path", "")) if value else None
    return value if isinstance(value, str) else None


def _settle_seed(words: Sequence[str], said: Namespace, config: Namespace) -> None:
    seed = _one_value(words, said, SEED)
    if seed is None:
        seed = pl.seed_everything(workers=True) if config.seed_everything is True else 0
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed_everything={seed}; pass 0 to {2**32 - 1}.")
    if config.seed_everything is not False:  # False leaves the global generators alone
        config.seed_everything = seed
    for name in SEED[1:3]:
        if name in config:
            config[name] = seed
    if "data.init_args.seed" in config:
        config.data.init_args.seed = seed


def _settle_output(
    parser: LightningArgumentParser, words: Sequence[str], said: Namespace, config: Namespace
) -> None:
    output = str(_one_value(words, said, OUTPUT) or _DEFAULT_OUTPUT)
    named = list(_folders(config.trainer))
    if not _commanded(words, "checkpoint.dirpath"):
        named += _folders(config.checkpoint)
    if named:  # another parse takes long
        _move(named, parser.parse_args(_without(words, OUTPUT), defaults=False), words, output)
    config.output = config.trainer.default_root_dir = output
    if config.checkpoint.dirpath is None:
        config.checkpoint.dirpath = str(Path(output) / "checkpoints")
    if config.trainer.logger in (None, True):
        config.trainer.logger = [
            Namespace(  # type: ignore[no-untyped-call]
                class_path=f"pytorch_lightning.loggers.{kind}",
                init_args=Namespace(save_dir=output, name=name),  # type: ignore[no-untyped-call]
            )
            for kind, name in _LOGGERS.items()
        ]


def _move(
    named: Sequence[tuple[Any, str, Path]], files: Namespace, words: Sequence[str], output: str
) -> None:
    """Folders below the one of the files go below the one of the run."""
    bases = [Path(files[name]).absolute() for name in OUTPUT if files.get(name) is not None]
    if not bases and any(_commanded(words, name) for name in OUTPUT):
        bases = [path.parent if name == "dirpath" else path for _, name, path in named]
    for holder, name, path in named:
        if base := next((base for base in bases if path.is_relative_to(base)), None):
            holder[name] = str(Path(output) / path.relative_to(base))


def _one_value(words: Sequence[str], said: Namespace, names: Sequence[str]) -> Any:
    """What the names of one setting were given: on the command line, or else in files."""
    given = {name: said[name] for name in names if said.get(name) is not None}
    given = {name: value for name, value in given.items() if not isinstance(value, bool)}
    given = {n: v for n, v in given.items() if _commanded(words, n)} or given
    if len({str(value) for value in given.values()}) > 1:
        which = ", ".join(f"{_short(name)}={value}" for name, value in given.items())
        raise ValueError(
            f"{which} are one setting of a run, and disagree; pass --{names[0]} alone."
        )
    return next(iter(given.values()), None)


def _short(name: str) -> str:
    return name.replace(".init_args", "")


def _flags(word: str, names: Sequence[str]) -> bool:
    return word.split("=")[0] in {f"--{form}" for name in names for form in (name, _short(name))}


def _commanded(words: Sequence[str], name: str) -> bool:
    return any(_flags(word, [name]) for word in words)


def _without(words: Sequence[str], names: Sequence[str]) -> list[str]:
    """The words without these flags and their values."""
    left: list[str] = []
    rest: Iterator[str] = iter(words)
    for word in rest:
        if not _flags(word, names):
            left.append(word)
        elif "=" not in word:
            next(rest, None)
    return left


def _folders(settings: Any) -> Iterator[tuple[Any, str, Path]]:
    """Each folder in the settings of loggers, callbacks, profilers: holder, name, path."""
    if isinstance(settings, list):
        for item in settings:
            yield from _folders(item)
    if not isinstance(settings, Namespace | dict):
        return
    items = settings if isinstance(settings, dict) else vars(settings)
    for name, value in items.items():
        if name in _FOLDERS and isinstance(value, str | os.PathLike):
            yield settings, name, Path(value).absolute()
        else:
            yield from _folders(value)
