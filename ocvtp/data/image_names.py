"""Names of images in files of others: they may not lead out of the folder of the images."""

from __future__ import annotations

from os.path import commonpath, realpath
from pathlib import Path, PurePosixPath, PureWindowsPath

from ocvtp.field_types import shown


def check_inside(name: str, folder: str | Path, what: str = "image") -> None:
    """Refuse a name that leads out of its folder.

    Args:
        name: of a file, from the folder.
        folder: where it is.
        what: it is, for the message.

    Raises:
        ValueError: if it is absolute, goes up, or cannot be the name of a file.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\0" in name:
        raise ValueError(
            f"{what} {shown(name)} is not a name inside of its folder, {folder}; name {what}s by"
            " their paths from there."
        )


def inside(folder: str | Path, name: str, outside: bool = False) -> Path:
    """The file of an image by its name.

    Args:
        folder: of the images.
        name: from there.
        outside: whether it may lie outside: by a name that goes up, an absolute one, or a link.

    Raises:
        ValueError: as `check_inside`, and if a link leads out of the folder.
    """
    path = Path(folder, name)
    if not outside:
        check_inside(name, folder)
        real, own = realpath(path), realpath(folder)
        if commonpath([real, own]) != own:
            raise ValueError(
                f"image {shown(name)} is a link out of its folder, {folder}, to {real}; copy it, or"
                " set outside=True where you trust the folder"
            )
    return path
