"""What comes with the package: settings, the demo model with its pruners, and one for photographs.

They lie at the top of the repository, in `configs/` and `checkpoints/`; a wheel holds copies inside
the package.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

_PACKAGE = Path(__file__).parent
ROOT = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent
"""Where `configs/` and `checkpoints/` are."""

Kind = Literal["train", "demo_vlm"]
_FLAGS = ("--config", "-c")


def config_names(kind: Kind) -> list[str]:
    """Names of the files of settings for `ocvtp train` or `ocvtp demo-vlm`, sorted."""
    folder = ROOT / "configs" / kind
    files = (path.relative_to(folder) for path in folder.rglob("*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in files)


def find_config(name: str, kind: Kind) -> str:
    """The path of a file of settings.

    Args:
        name: a path, which wins where it exists; or a name that comes with the package, e.g.
            `scenes` (or, from any folder, its path in the repository: `configs/train/scenes.yaml`).
        kind: whose settings.

    Raises:
        ValueError: if there is neither; lists the names.
    """
    if Path(name).is_file():
        return name
    known = config_names(kind)
    plain = Path(name).as_posix().removeprefix(f"configs/{kind}/").removesuffix(".yaml")
    if plain in known:
        return str(ROOT / "configs" / kind / f"{plain}.yaml")
    close = get_close_matches(plain, known, n=1)
    hint = f"did you mean {close[0]!r}? Pass" if close else "pass"
    raise ValueError(
        f"--config {name} is no file, and no settings of that name come with ocvtp; {hint} the path"
        f" of a YAML file, or one of {', '.join(known)}."
    )


def with_configs(words: Sequence[str], kind: Kind) -> list[str]:
    """The words of a command line, with `find_config` of every `--config`.

    What has a colon is left as it is: it is YAML, or a URL.

    Raises:
        ValueError: as `find_config`.
    """
    found: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if before in _FLAGS and ":" not in word:
            word = find_config(word, kind)
        elif flag in _FLAGS and equals and ":" not in value:
            word = f"{flag}={find_config(value, kind)}"
        found.append(word)
    return found


def find_folder(name: str) -> str:
    """A folder by its path in the repository, e.g. `checkpoints/demo-vlm`, from any place.

    Args:
        name: a path, which wins where it exists; what is not shipped, say a hub id, is returned
            unchanged.
    """
    path = Path(name)
    if path.exists() or path.is_absolute() or path.parts[:1] != ("checkpoints",):
        return name
    return str(ROOT / path) if (ROOT / path).is_dir() else name


def find_weights(name: str) -> str:
    """`find_folder` of weights that a hub may have instead.

    Where the hub cannot be reached, what was downloaded before is all that there is: it is set
    offline, as it would be asked again and again for minutes.

    Raises:
        ValueError: for what can only be a folder and is none.
    """
    found = find_folder(name)
    if Path(found).exists() or ":" in name:
        return found
    parts = Path(name).parts
    is_an_id = len(parts) == 2 and parts[0] not in ("..", "~", "checkpoints")
    if "/" in name and not (is_an_id and not Path(parts[0]).is_dir()):
        raise ValueError(f"{name!r} does not exist; pass a folder that does, or a hub id.")
    _set_hub_offline_where_it_is()
    return found


def _set_hub_offline_where_it_is() -> None:
    """By its name, which is looked up here unless a proxy does it."""
    from huggingface_hub import constants

    can = getproxies() or _is_known(constants.ENDPOINT)
    constants.HF_HUB_OFFLINE = _is_to_be_offline() or not can


@cache
def _is_to_be_offline() -> bool:
    """What the environment said at first."""
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _is_known(address: str) -> bool:
    try:
        socket.getaddrinfo(urlsplit(address).hostname, None)
    except OSError:
        return False
    return True
