"""Settings that do not parse: one line in place of the many of the parser's message."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import pytorch_lightning as pl
from jsonargparse import ArgumentParser

_ENCODERS = ("clip.CLIPEncoder", "tiles.TiledEncoder", "qwen.QwenEncoder", "timm.TimmEncoder")
_DATA = (
    *("module.CocoDataModule", "module.SceneDataModule", "folder.FolderDataModule"),
    *("features.FeatureDataModule", "module.QuestionDataModule"),
    *("conversations.ConversationDataModule", "coco_questions.CocoQuestionDataModule"),
)
_SCORERS = (
    *("pointwise.Pointwise", "qk_mean.QKMean", "local_global.LocalGlobal"),
    *("prompted.Prompted", "vip.VIP", "slots.Slots"),
)
_RELAXATIONS = ("SoftTopK", "HardST", "GumbelTopK", "GumbelBinary", "KeptST", "Sample")
_GATES = ("KeyBias", "PolicySoftmax", "Scale", "Noise", "Gather")
CLASSES = {
    "model": ["ocvtp.training.selector.SelectorModule"],
    "model.encoder": [f"ocvtp.encoders.{name}" for name in _ENCODERS],
    "model.objective": ["ocvtp.slots.objectives.SlotsObjective", "ocvtp.slots.kept.KeptObjective"],
    "model.scorer": [f"ocvtp.selectors.scorers.{name}" for name in _SCORERS],
    "model.relaxation": [f"ocvtp.selectors.relaxations.{name}" for name in _RELAXATIONS],
    "model.gate": [f"ocvtp.hosts.gating.{name}" for name in _GATES],
    "data": [f"ocvtp.data.{name}" for name in _DATA],
    "trainer.logger": [f"pytorch_lightning.loggers.{name}" for name in pl.loggers.__all__],
    "trainer.callbacks": [f"pytorch_lightning.callbacks.{name}" for name in pl.callbacks.__all__],
}
"""What a setting that is a class can be given."""
_NO_SIZES = "ocvtp.learning.network.Sizes"

_KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
_KINDS |= {"NoneType": "null", "list": "a list", "dict": "a mapping", "Iterable": "a list"}

_KEY = re.compile(r'Parser key "([^"]+)":\s*')
_CLASS = re.compile(r"Problem with given class_path '([^']+)':")
_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_GROUP = re.compile(r"Group '([^']+)' does not accept option '([^']+)'")
_MISSING = re.compile(r"the following arguments are required: (.+)")
_UNKNOWN = re.compile(r"unrecognized arguments: (.+)")
_TYPE = re.compile(r"Expected a (?!path)(.+?)(?:\. Got value: (.*))?$")
_NO_CLASS = re.compile(r"Expected a dot import path string: (.+)")
_BASE = re.compile(r"Import path .*does not correspond to a subclass of (\S+)")
_GIVEN = re.compile(r"Given value: (.*)")
_NO_GROUP = re.compile(r"Unable to load config '(.*)'")
_NO_FILE = re.compile(r"File does not exist: '(.+)'")


def explain(parser: ArgumentParser, message: str) -> str:
    """What is wrong, what is allowed, what to do.

    Args:
        parser: of `ocvtp train`.
        message: the parser's own.
    """
    keys: list[str] = []
    kind: str | None = None
    allowed: list[str] = []
    for line in (text.strip().removeprefix("- ") for text in message.splitlines()):
        while found := _KEY.match(line):
            keys.append(found[1])
            line = line[found.end() :]
        key = ".".join(keys)
        if found := _CLASS.match(line):
            kind = found[1]
        elif _of_no_sizes(key, kind, line):
            continue
        elif found := _OPTION.match(line):
            return _unknown(parser, f"{key}.{found[1]}".removeprefix("."), kind)
        elif found := _GROUP.match(line):
            return _in_group(parser, key, kind, f"{found[1]}.{found[2]}")
        elif (found := _UNKNOWN.match(line)) and kind:
            option = found[1].split("=")[0].removeprefix("--")
            return _in_group(parser, key, kind, option)
        elif found:
            return _unrecognized(parser, found[1])
        elif found := _MISSING.match(line):
            return _missing(key, found[1])
        elif found := _NO_CLASS.match(line):
            return _no_class(key, found[1])
        elif found := _BASE.match(line):
            return f"{key} is a class that is no {found[1]}; {_choice(key, '')}"
        elif line.startswith(("No module named", "module '")) and kind:
            return _no_class(key, kind)
        elif found := _TYPE.match(line):
            allowed.append(found[1])
            if found[2] is not None:
                return _wrong_value(key, found[2], allowed)
        elif (found := _GIVEN.match(line)) and allowed:
            return _wrong_value(key, found[1], allowed)
        elif (found := _NO_GROUP.match(line)) and kind:
            return _wrong_value(key, found[1], ["dict"])
        elif found := _NO_FILE.match(line):
            return _no_file(key, found[1])
    return _as_it_is(parser, message)


def _of_no_sizes(key: str, kind: str | None, line: str) -> bool:
    """Whether it says that plain sizes are no `Sizes`; the next line says what is wrong."""
    if kind == _NO_SIZES:
        return _OPTION.match(line) is not None
    return key == "model.network" and "NetworkSizes does not correspond to a subclass" in line


def _as_it_is(parser: ArgumentParser, message: str) -> str:
    text = " ".join(message.split())
    if text.startswith(("Problems parsing config", "Unexpected config", 'Parser key "config"')):
        files = [w.split("=", 1)[1] for w in parser.args if w.startswith("--config=")]
        files += [w for flag, w in pairwise(parser.args) if flag in ("-c", "--config")]
        text = text.replace('in "<unicode string>", ', "")
        return f"--config {', '.join(files)} is no file of settings: {text}"[:400]
    return text[:400]


def _unknown(parser: ArgumentParser, key: str, kind: str | None) -> str:
    key = key.replace(".init_args", "")
    if kind == "pytorch_lightning.LightningDataModule":
        return (
            f"{key} is set, but data names no class; pass --config FILE, or --data"
            f" {' or '.join(CLASSES['data'])} before it."
        )
    if kind is None:
        near = _nearest(key, _known(parser))
        owner = ""
    else:
        group, name = key.rsplit(".", 1)
        names = parameters(kind)
        near = [f"{group}.{match}" for match in get_close_matches(name, names, n=1)]
        owner = f" of {kind.rsplit('.', 1)[-1]}"
        if not near:
            return f"{key} is no setting{owner}, which has {', '.join(sorted(names))}."
    hint = f"did you mean --{' or --'.join(near)}?" if near else "see `ocvtp train --help all`."
    return f"{key} is no setting{owner}; {hint}"


def _in_group(parser: ArgumentParser, key: str, kind: str | None, option: str) -> str:
    """Of a group of settings, also of one inside of a class: `host.modle` of a SelectorModule."""
    group = option.rpartition(".")[0]
    if kind is None or not group:
        return _unknown(parser, f"{key}.{option}".removeprefix("."), kind)
    module, _, owner = kind.rpartition(".")
    hints = get_type_hints(getattr(importlib.import_module(module), owner).__init__)
    held = hints.get(group)
    if not isinstance(held, type):
        return _unknown(parser, f"{key}.{group.split('.')[0]}", kind)
    return _unknown(parser, f"{key}.{option}", f"{held.__module__}.{held.__qualname__}")


def _unrecognized(parser: ArgumentParser, words: str) -> str:
    word = next((w for w in words.split() if w.startswith("--")), None)
    if word is not None:
        return _unknown(parser, word.removeprefix("--").split("=")[0], None)
    return (
        f"{words.split()[0]!r} follows no setting; a file of settings is --config FILE, and every"
        " other one --NAME VALUE."
    )


def _missing(key: str, names: str) -> str:
    flags = ", ".join(f"--{f'{key}.{name}'.removeprefix('.')}" for name in names.split(", "))
    if key:
        return f"{flags} must be set, as it has no default."
    return f"{flags} must be set, here or in a file: --config FILE, e.g. one of configs/train."


def _no_class(key: str, name: str) -> str:
    return f"{key} is {name!r}, which is no class that can be imported; {_choice(key, name)}"


def _choice(key: str, name: str) -> str:
    if key not in CLASSES:
        return "pass the path of a class, e.g. package.module.Class."
    short = {path.rsplit(".", 1)[-1].lower(): path for path in CLASSES[key]}
    near = get_close_matches(name.rsplit(".", 1)[-1].lower(), short, n=1)
    if near:
        return f"did you mean {short[near[0]]}?"
    return f"pass one of {', '.join(CLASSES[key])}, or a class of your own."


def _wrong_value(key: str, value: str, allowed: Iterable[str]) -> str:
    if found := re.match(r"NestedArg\(key='([^']+)', val=(.*)\)", value):
        key, value = f"{key}.{found[1]}", found[2]
    kinds = dict.fromkeys(text for kind in allowed for text in _kind(kind))
    value = value.strip("'")
    shown = value if len(value) <= 80 else f"{value[:77]}..."
    return f"{key.replace('.init_args', '')} is {shown!r}; pass {' or '.join(kinds)}."


def _kind(text: str) -> Iterator[str]:
    if text.startswith("typing.Literal["):
        yield from text.removeprefix("typing.Literal[").removesuffix("]").split(", ")
        return
    name = re.sub(r"^<class '(.*)'>$", r"\1", text).rsplit(".", 1)[-1]
    yield _KINDS.get(name, name)


def _no_file(key: str, path: str) -> str:
    folder = Path(path).parent
    names = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
    near = get_close_matches(Path(path).name, names, n=1)
    hint = f"did you mean {folder / near[0]}?" if near else "pass the path of a YAML file."
    return f"--{key} {path} does not exist; {hint}"


def _known(parser: ArgumentParser) -> set[str]:
    """All settings by their full names, and those of the data that comes with the library."""
    names = {option.removeprefix("--") for option in parser._option_string_actions}
    names = {name for name in names if not name.endswith((".help", "+", "-"))}
    return names | {f"data.{name}" for path in CLASSES["data"] for name in parameters(path)}


def _nearest(key: str, known: set[str]) -> list[str]:
    """Neighbours of the first part that is unknown; else names with the same last part."""
    parts = key.split(".")
    for depth, part in enumerate(parts):
        before = ".".join(parts[:depth])
        inside = [name for name in known if name.startswith(f"{before}." if before else "")]
        beside = {name.split(".")[depth] for name in inside}
        if part not in beside:
            near = get_close_matches(part, sorted(beside), n=1, cutoff=0.7)
            found = [".".join([*parts[:depth], match, *parts[depth + 1 :]]) for match in near]
            return found or _same_last_part(parts[-1], known)
    return []


def _same_last_part(name: str, known: set[str]) -> list[str]:
    ends = {key.rsplit(".", 1)[-1] for key in known}
    near = [name] if name in ends else get_close_matches(name, sorted(ends), n=2, cutoff=0.7)
    return sorted(key for key in known if key.rsplit(".", 1)[-1] in near)[:2]


def parameters(path: str) -> list[str]:
    """Settings of a class, with those that it passes to its base."""
    module, name = path.rsplit(".", 1)
    names: dict[str, None] = {}
    for base in getattr(importlib.import_module(module), name).__mro__:
        if "__init__" not in vars(base):
            continue
        own = list(inspect.signature(base.__init__).parameters.values())[1:]  # without self
        names |= dict.fromkeys(
            p.name for p in own if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        )
        if all(p.kind is not p.VAR_KEYWORD for p in own):
            break
    return list(names)
