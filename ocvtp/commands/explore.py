"""`ocvtp explore`: one page of what pruners keep of images, to be opened in a browser."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ocvtp.commands import options, output
from ocvtp.commands.image_files import image_files
from ocvtp.evaluation.conditions import check_specs
from ocvtp.evaluation.runner import Subject
from ocvtp.evaluation.towers import TowerSubject
from ocvtp.explore.kept import check_prompt
from ocvtp.explore.page import policy, to_html
from ocvtp.explore.run import Wanted, explore
from ocvtp.explore.server import PageServer
from ocvtp.explore.views import ModelView, TowerView, View
from ocvtp.hosts.base import Tiling
from ocvtp.hosts.loading import check_model, load_model
from ocvtp.images import open_image
from ocvtp.pruners.budgets import budgets_of
from ocvtp.reporting.files import write_whole


def run(arguments: argparse.Namespace) -> int:
    """Look, write, say where, and serve if that is asked for."""
    path = output.file(arguments.output)
    options.check_tower(arguments)
    options.check_counts(arguments, "num_keep", "max_images", "max_new_tokens")
    budgets = budgets_of(arguments.num_keep, arguments.keep_ratio)
    pruners = check_specs(arguments.pruners, budgets, arguments.checkpoint)
    if arguments.tower is None:
        fit = [] if arguments.skip_unfit else pruners
        check_prompt(fit, arguments.prompt)
        place = (arguments.model, arguments.dtype, arguments.device)
        check_model(*place, fit, arguments.text_tower)
    named = image_files(arguments.images)
    files = named[: arguments.max_images]
    sizes = [open_image(file).size for file in files]  # what is no image is told before all
    with ExitStack() as stack:
        server = None
        if arguments.serve is not None:  # a port that is taken is told before all the work
            server = stack.enter_context(PageServer(arguments.serve))
        wanted = Wanted(arguments.pruners, budgets, arguments.checkpoint, arguments.skip_unfit)
        facts = explore(_view(arguments), wanted, files, sizes)
        page = to_html({**facts, "command": output.command(arguments)})
        write_whole(path, page.encode())
        _tell(arguments, facts, path, len(named), server)
        if server is not None:
            server.serve_page(page, policy())
    return 0


def _view(arguments: argparse.Namespace) -> View:
    if arguments.tower is not None:
        return TowerView(TowerSubject(**options.tower_settings(arguments)))
    model, processor = load_model(arguments.model, arguments.dtype, arguments.device)
    return ModelView(
        Subject(model, processor, arguments.model, arguments.text_tower),
        arguments.prompt or (),
        arguments.max_new_tokens,
        Tiling(arguments.budget),
        shares=arguments.no_times,
    )


def _tell(
    arguments: argparse.Namespace,
    facts: dict[str, Any],
    path: Path,
    num_named: int,
    server: PageServer | None,
) -> None:
    shown, size = len(facts["images"]), path.stat().st_size
    result = {"output": str(path), "images": shown, "of": num_named, "bytes": size}
    result |= {"unfit": facts["unfit"], "url": None if server is None else server.url}
    left = "" if shown == num_named else f" of {num_named} (see --max-images)"
    text = "".join(f"{one['name']} is left out: {one['why']}\n" for one in facts["unfit"])
    text += f"wrote {path}: {shown} image{'' if shown == 1 else 's'}{left}, {size / 1e6:.1f} MB"
    if server is not None:
        text += f"\nserving it on {server.url} to this machine alone; Ctrl-C ends it"
    output.emit(result, text, arguments.json)
