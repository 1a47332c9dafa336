"""The command line: finds the command, lets it parse its flags, and reports wrong input."""

from __future__ import annotations

import argparse
import importlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ocvtp import __version__
from ocvtp.commands.flags import FLAGS
from ocvtp.reporting.command_line import as_typed, in_flags, typed_before
from ocvtp.reporting.plain_text import terminal

_COMMANDS = {
    "train": "train the network of a pruner (--config YAML [--resume CKPT])",
    "extract": "the tower of a training run, run once: features in files (--config YAML)",
    "teacher": "what a frozen model says of training questions, stored (--config YAML)",
    "runs": "training runs side by side: settings, curves, best figures",
    "export": "checkpoint or official weights to an artifact",
    "card": "the model card of an exported network",
    "push": "an exported network and its card to the Hugging Face Hub",
    "resize": "a folder of images, pre-resized for training",
    "list": "every pruner: stage, needs, paper, status",
    "answer": "one answer, tokens before and after",
    "show": "draw kept tokens and slot masks",
    "explore": "one page to look at: kept tokens, slots, answers and times of many pruners",
    "evaluate": "accuracy against budget, of any pruners on any task",
    "recommend": "which pruner at which budget, for a model and a task of evaluate",
    "lmms-task": "a task of evaluate, written for lmms-eval",
    "bench": "time and memory of pruners, side by side with the bare model",
    "serve": "`vllm serve` with a pruner (flags of vLLM come after)",
    "serve-check": "whether vLLM with a pruner answers as transformers does",
    "table": "a table for a paper, of what evaluate and bench wrote: Markdown, LaTeX or CSV",
    "plot": "their plots again, as wide as a column, of the pruners that are named",
    "merge": "two evaluations of one task and model, as one",
    "compare": "two benchmarks, and what changed beyond noise",
    "flops": "operations of a prompt, by three conventions, with any pruner",
    "probe": "whether soft gates in a model stand in for dropping, by how far they are open",
    "demo-vlm": "train a small VLM from nothing on drawn scenes (--config YAML [--resume])",
}


_ASKS_A_TASK = {"evaluate": False, "recommend": False, "lmms-task": True}
"""Whether lmms-eval is to ask it."""
_SETTINGS_OF_TRAINING = ("train", "extract", "teacher")
"""Commands that take the settings of a training run."""
_HANDS_ON = ("serve",)
"""Commands that hand on the flags that they do not know, as `further`."""
_CONTINUES = ("evaluate", "recommend", "bench", "extract", "teacher")
"""Commands that write down what is done as they go."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `ocvtp COMMAND ...`; returns the exit status (2 for wrong input, 130 when stopped)."""
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # ours says it
    handler = _Stderr()
    handler.setFormatter(_Plain("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _run(words), words)


def _run(words: list[str]) -> int:
    typed = list(words)
    words[:] = _before_command(words)
    with typed_before(typed[: len(typed) - len(words)]):
        return _command(words)


def _command(words: list[str]) -> int:
    if words and words[0] in _SETTINGS_OF_TRAINING:  # LightningCLI has a parser of its own
        command = importlib.import_module(f"ocvtp.commands.{words[0]}")
        return int(command.run_words(words[1:]))
    parser = _parser(words)
    if words and words[0] in _HANDS_ON:
        arguments, further = parser.parse_known_args(words)
        arguments.further = [word for word in further if word != "--"]
    else:
        arguments = parser.parse_args(words)
    arguments.words = words
    command = importlib.import_module(f"ocvtp.commands.{arguments.command.replace('-', '_')}")
    with in_flags(_flag_names(arguments), words):
        return int(command.run(arguments))


def _flag_names(arguments: argparse.Namespace) -> list[str]:
    """The arguments that are flags of a command, those of its task too."""
    found = list(arguments.flags)
    if getattr(arguments, "task", None) is not None:
        from ocvtp.commands.tasks import names_of_settings

        found += names_of_settings(arguments.task)
    return found


def guarded(work: Callable[[], int], words: Sequence[str] = ()) -> int:
    """Do something as a command does it: what a user can mend is told in one line.

    Args:
        work: returns the exit status.
        words: of the command line, which say what continues when it is repeated.
    """
    try:
        return work()
    except (Exception, KeyboardInterrupt) as error:
        if (status := _told(error, words)) is None:
            raise
        return status


def _told(error: BaseException, words: Sequence[str]) -> int | None:
    """Say what a user can mend, and the exit status of that; None for what is a fault of ours."""
    if _is_stop(error):
        again = "; the same command continues after what is done" if _continues(words) else ""
        sys.stderr.write(f"ocvtp: stopped{again}\n")
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of stdout has seen enough
        sys.stdout = None  # nothing is left to be flushed there
        return 1
    if not isinstance(error, ValueError | OSError):
        return None
    sys.stdout.flush()
    problem = _of_a_file(error) if isinstance(error, OSError) else str(error)
    sys.stderr.write(f"ocvtp: error: {_shown(problem)}\n")
    return 2


def _shown(problem: str) -> str:
    """Without what a terminal would obey, and with a beginning alone of words that are no words."""
    return re.sub(r"(\S{200})\S{200,}", r"\1...", terminal(problem))


class _Stderr(logging.StreamHandler[Any]):
    """What `sys.stderr` is at the time: a bar stands in for it, to write above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


class _Plain(logging.Formatter):
    """Names of files are in messages too."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(as_typed(super().format(record)))


def _is_stop(error: BaseException | None) -> bool:
    """Whether it is Ctrl-C, or what Python or a library made of that, e.g. during an import."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _of_a_file(error: OSError) -> str:
    """What the system refused, and of which file."""
    if error.filename is None or error.strerror is None:
        return " ".join(str(error).split())
    return f"{error.filename}: {error.strerror}; pass a file or folder that can be used so."


def _continues(words: Sequence[str]) -> bool:
    return bool(words) and words[0] in _CONTINUES


def _before_command(words: list[str]) -> list[str]:
    """The words without `--import FILE` and `--max-pixels N` before the command, which are done."""
    while words:
        flag, is_one_word, value = words[0].partition("=")
        if flag not in _BEFORE or not (is_one_word or words[1:]):
            break
        _BEFORE[flag](value if is_one_word else words[1])
        words = words[1 if is_one_word else 2 :]
    return words[1:] if words[:1] == ["--"] else words


def _import(file: str) -> None:
    from ocvtp.plugins import import_file

    import_file(file)


def _limit_pixels(count: str) -> None:
    from ocvtp.images import limit_pixels

    if not count.isdecimal():
        raise ValueError(f"--max-pixels {count!r}; pass a whole number, e.g. 200000000.")
    limit_pixels(int(count))


_BEFORE = {"--import": _import, "--max-pixels": _limit_pixels}


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as commands do, without all flags before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ocvtp: error: {message}; see `{self.prog} --help`.\n")


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ocvtp",
        description="Train, export, plug in and measure visual-token pruners.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--import",
        metavar="FILE",
        help="a Python file that registers pruners, tasks or hosts of your own; may be given again",
    )
    parser.add_argument(
        "--max-pixels",
        metavar="N",
        help="how many pixels an image may have (default: 67108864); larger ones are refused",
    )
    parser.add_argument("--version", action="version", version=f"ocvtp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if words[:1] == [name]:
            FLAGS[name](command)
            if name in _ASKS_A_TASK:
                from ocvtp.commands.tasks import add_task

                add_task(command, words[1:], lmms=_ASKS_A_TASK[name])
            flags = [one.dest for one in command._actions if one.option_strings]
            command.set_defaults(flags=flags)  # what is given by its place alone is none
    return parser


if __name__ == "__main__":
    sys.exit(main())
