"""The flags of every command, by its name.

Nothing that takes long is imported here: `--help` and a misspelt flag are answered at once. What a
command does is in the file of its name.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import get_args

from ocvtp import choices
from ocvtp.commands import options, publishing
from ocvtp.shipped import config_names


def list_(parser: argparse.ArgumentParser) -> None:
    """A model, if any."""
    options.add_optional_model(parser)
    options.add_json(parser)


def export(parser: argparse.ArgumentParser) -> None:
    """A checkpoint or official weights, and where the artifact goes."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="best.ckpt or last.ckpt of `ocvtp train`")
    source.add_argument("--official", metavar="WEIGHTS", help="the authors' weights.pth")
    source.add_argument(
        "--official-selector",
        metavar="WEIGHTS",
        help="VisionSelector's released scorer: a file of safetensors or torch.save that holds it,"
        " alone or inside of a whole model, or a folder of the parts of one",
    )
    parser.add_argument("--output", required=True, help="folder to write")
    parser.add_argument(
        "--model",
        help="folder or hub id of the VLM that an official selector was trained in; its"
        " configuration alone is read",
    )
    parser.add_argument("--with-decoder", action="store_true", help="keep the training decoder")
    parser.add_argument("--num-heads", type=int, default=4, help="of an official decoder")
    parser.add_argument("--tower", help="hub id of the vision tower of official weights")
    parser.add_argument("--layer", type=int, default=9, help="that official weights read")
    options.add_json(parser)


def resize(parser: argparse.ArgumentParser) -> None:
    """Two folders, and the size."""
    parser.add_argument("source", help="folder of images")
    parser.add_argument("output", help="folder to write; finished files are kept")
    parser.add_argument("--size", type=int, default=336, help="shorter edge in pixels")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs")
    parser.add_argument("--num-workers", type=int, help="default: one per core")
    options.add_json(parser)


def runs(parser: argparse.ArgumentParser) -> None:
    """Folders of training runs, and what is shown of them."""
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", help="--output of a run, or a folder of such folders"
    )
    parser.add_argument(
        "--figures",
        nargs="+",
        metavar="NAME",
        help="of the validation, e.g. loss coverage_residual",
    )
    parser.add_argument("--plot", metavar="FILE", help="curves of all runs, a PNG or PDF")
    options.add_json(parser)


def answer(parser: argparse.ArgumentParser) -> None:
    """A model, a pruner, images and a question."""
    options.add_model(parser)
    options.add_pruner(parser, several=False)
    parser.add_argument("--image", required=True, nargs="+", help="image files")
    parser.add_argument("--prompt", required=True, help="plain text")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options.add_budget(parser)
    parser.add_argument(
        "--separators",
        choices=get_args(choices.Separators),
        default="rows",
        help="which tokens that end rows of tiles stay (default: %(default)s)",
    )
    options.add_json(parser)


def show(parser: argparse.ArgumentParser) -> None:
    """A model or a tower, pruners, images and the picture to write."""
    options.add_model_or_tower(parser)
    options.add_pruner(parser, several=True)
    parser.add_argument("--image", required=True, nargs="+", help="image files")
    parser.add_argument("--prompt", help="plain text, for pruners that read it")
    options.add_budget(parser)
    parser.add_argument(
        "--hide-image",
        action="store_true",
        help="draw what is kept and the slots on grey, without a pixel of the images",
    )
    parser.add_argument("--output", required=True, help="PNG or PDF to write")
    options.add_json(parser)


def explore(parser: argparse.ArgumentParser) -> None:
    """A model or a tower, pruners, budgets, images, prompts and the page to write."""
    options.add_model_or_tower(parser)
    parser.add_argument("--images", required=True, nargs="+", help="image files, or folders")
    parser.add_argument(
        "--max-images", type=int, default=20, help="of them, the first (default: %(default)s)"
    )
    parser.add_argument(
        "--pruners",
        nargs="+",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list`; the unpruned model is beside them",
    )
    options.add_budgets(parser)
    parser.add_argument(
        "--checkpoint", nargs="+", default=[], help="exported networks, for pruners that take one"
    )
    options.add_text_tower(parser)
    options.add_budget(parser)
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="plain text, one or several: each is asked about every image (default: the model is"
        " asked nothing, and of pruners before the language model that does not run)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=32, help="of an answer (default: 32)")
    parser.add_argument(
        "--no-times",
        action="store_true",
        help="do not time answers, so that the tower runs once for all pruners",
    )
    options.add_skip_unfit(parser)
    parser.add_argument("--output", required=True, help="the HTML file to write")
    parser.add_argument(
        "--serve",
        type=int,
        nargs="?",
        const=0,
        metavar="PORT",
        help="then show it to browsers of this machine, on 127.0.0.1, until Ctrl-C (default: a"
        " free port)",
    )
    options.add_json(parser)


def evaluate(parser: argparse.ArgumentParser) -> None:
    """A model or a tower, pruners and budgets; cli.py adds the task."""
    options.add_model_or_tower(parser)
    parser.add_argument(
        "--pruners",
        nargs="+",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list`; controls run beside them",
    )
    options.add_budgets(parser)
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        help="exported network; several that differ in nothing but the seed are averaged",
    )
    options.add_text_tower(parser)
    parser.add_argument("--seeds", type=int, default=3, help="of what is random (default: 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions at a time")
    parser.add_argument(
        "--no-controls", action="store_true", help="unpruned and shuffled images alone"
    )
    parser.add_argument(
        "--positions",
        nargs="+",
        choices=get_args(choices.Positions),
        help="of the tokens that are left: numbered from 0, or as in the whole prompt; or both, in"
        " rows of their own (default: contiguous, or as a pruner was trained)",
    )
    options.add_skip_unfit(parser)
    parser.add_argument(
        "--output",
        help="folder of results.json, report.md, plots and answers; the same command continues what"
        " it holds, another one of the same task adds to it (default: outputs/evaluate/TASK)",
    )
    options.add_json(parser)


def recommend(parser: argparse.ArgumentParser) -> None:
    """A model, what may be lost, and what is looked at; cli.py adds the task."""
    options.add_model(parser)
    parser.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        help="points of accuracy that may be lost (default: %(default)s)",
    )
    parser.add_argument(
        "--metric",
        help="figure of the task to choose by, e.g. all/exact; or agreement, with what the unpruned"
        " model says (default: that of all questions)",
    )
    parser.add_argument(
        "--pruners",
        nargs="+",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list --model M` (default: some without training that the model can run)",
    )
    parser.add_argument(
        "--num-keep",
        type=int,
        nargs="+",
        help="tokens kept of an image (default: 50%%, 25%%, 11%% and 5.6%% of them)",
    )
    parser.add_argument("--keep-ratio", type=float, nargs="+", help="shares of tokens kept")
    parser.add_argument("--checkpoint", help="exported network, for pruners that take one")
    options.add_text_tower(parser)
    parser.add_argument("--seeds", type=int, default=3, help="of what is random (default: 3)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions at a time")
    times = parser.add_argument_group("times; the request is a typical one of the task")
    times.add_argument("--bench-batch-size", type=int, default=1, help="requests (default: 1)")
    times.add_argument("--warmup", type=int, default=3, help="rounds (default: 3)")
    times.add_argument("--repetitions", type=int, default=20, help="rounds (default: 20)")
    options.add_skip_unfit(parser)
    parser.add_argument(
        "--output",
        help="folder of recommendation.json, recommendation.md, pareto.png, and of accuracy and"
        " speed, which the same command continues (default: outputs/recommend/TASK)",
    )
    options.add_json(parser)


def lmms_task(parser: argparse.ArgumentParser) -> None:
    """Where a task goes; cli.py adds the task."""
    parser.add_argument(
        "--model", help="folder or hub id of a VLM, for scenes: they are drawn in its size"
    )
    parser.add_argument("--output", required=True, help="folder to write; lmms-eval's include_path")
    options.add_json(parser)


def bench(parser: argparse.ArgumentParser) -> None:
    """A model, pruners, budgets and sizes."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--model",
        help="folder or hub id of a VLM; tiny random ones: " + ", ".join(choices.TINY_MODELS),
    )
    model.add_argument(
        "--random-weights",
        choices=get_args(choices.FullSizeModel),
        help="a model of real size with random weights, which has true times; no download",
    )
    options.add_place(parser)
    parser.add_argument("--attention", help="e.g. sdpa, eager, flash_attention_2; default: its own")
    parser.add_argument("--threads", type=int, help="of a CPU; default: PyTorch's own choice")
    parser.add_argument(
        "--pruners",
        nargs="+",
        required=True,
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list`; a K in settings stands for --num-keep",
    )
    options.add_counts(parser)
    parser.add_argument(
        "--checkpoint", help="exported network; without one, trained pruners run on random weights"
    )
    options.add_text_tower(parser)
    options.add_sizes(parser)
    parser.add_argument(
        "--savings",
        choices=get_args(choices.SavingRows),
        default="default",
        help="what hosts leave out: attach's own settings, all, none, or for `each` setting one"
        " more row, in which it is reversed",
    )
    options.add_skip_unfit(parser)
    parser.add_argument(
        "--accuracy",
        metavar="FILE",
        help="results.json of `ocvtp evaluate` with the same pruners and budgets, to be drawn"
        " against the time to the first token",
    )
    parser.add_argument(
        "--output",
        default="outputs/bench",
        help="folder of results.json, report.md, plots and cells; the same command continues what"
        " it holds, another one of the same model adds to it (default: %(default)s)",
    )
    options.add_json(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    """A model, the pruner of all requests, and what vLLM is told besides."""
    parser.add_argument("model", metavar="MODEL", help="folder or hub id of a VLM")
    options.add_served(parser)
    parser.add_argument(
        "--hf-overrides",
        default="{}",
        metavar="JSON",
        help="of vLLM; the pruner is added to it",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command, start nothing")
    parser.epilog = (
        "All other flags are handed to `vllm serve`, e.g. --port 8000 --max-model-len 4096"
        " --gpu-memory-utilization 0.9 --trust-request-mm-kwargs; MODEL comes before them."
    )
    options.add_json(parser)


def serve_check(parser: argparse.ArgumentParser) -> None:
    """A model, a pruner, and a small engine."""
    parser.add_argument(
        "model",
        nargs="?",
        default="checkpoints/demo-vlm",
        metavar="MODEL",
        help="folder or hub id of a VLM (default: %(default)s)",
    )
    options.add_served(parser)
    parser.add_argument("--dtype", default="float32", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--max-new-tokens", type=int, default=8, help="of an answer (default: 8)")
    parser.add_argument(
        "--chunk", type=int, default=16, help="tokens of prompts in a step (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.5,
        help="of vLLM, a share (default: %(default)s)",
    )
    options.add_json(parser)


def compare(parser: argparse.ArgumentParser) -> None:
    """Two files, and what counts as a change."""
    parser.add_argument("a", help="results.json of `ocvtp bench`: before")
    parser.add_argument("b", help="results.json of `ocvtp bench`: after")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=choices.TOLERANCE,
        help="smaller changes are not flagged (default: %(default)s)",
    )
    parser.add_argument(
        "--fail-on-regression", action="store_true", help="exit with 1 if anything is slower"
    )
    options.add_json(parser)


def flops(parser: argparse.ArgumentParser) -> None:
    """A model's configuration, a prompt, pruners and budgets."""
    parser.add_argument(
        "--model",
        required=True,
        help="folder or hub id of a VLM, of which only the configuration is read; or "
        + ", ".join(get_args(choices.FullSizeModel)),
    )
    options.add_counts(parser)
    parser.add_argument(
        "--pruners",
        nargs="+",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="see `ocvtp list`; without any, the model with so many tokens, whichever they are",
    )
    parser.add_argument("--checkpoint", help="exported network, for pruners that take one")
    parser.add_argument(
        "--text-length",
        type=int,
        default=32,
        help="tokens of the prompt that are no visual ones (default: %(default)s)",
    )
    parser.add_argument(
        "--num-visual",
        type=int,
        help="visual tokens of an image before pruning (default: all of a model with one number;"
        " those of 2 x 2 tiles and the whole, e.g. 2880 of LLaVA-NeXT; of 672 x 672 pixels, e.g."
        " 576 of Qwen2.5-VL)",
    )
    parser.add_argument("--images", type=int, default=1, help="of the prompt (default: 1)")
    parser.add_argument(
        "--newlines",
        type=int,
        default=0,
        help="tokens that end the rows of an image, which no published figure counts: 48 of"
        " LLaVA-NeXT's 2880 (default: 0)",
    )
    parser.add_argument(
        "--whole-tower",
        action="store_true",
        help="count the tower and the projector as they run without savings: all blocks, all rows",
    )
    parser.add_argument("--output", help="folder of results.json, report.md and flops.png")
    options.add_json(parser)


def probe(parser: argparse.ArgumentParser) -> None:
    """A model, gates, and what it is asked about."""
    options.add_model(parser)
    parser.add_argument(
        "--gate",
        nargs="+",
        action="extend",
        metavar="NAME[:KEY=VALUE,...]",
        help="key_bias, noise, scale, policy_softmax or gather; may be repeated (default: key_bias,"
        " noise and scale)",
    )
    parser.add_argument(
        "--num-keep",
        type=int,
        help="tokens of an image that stay open, at random (default: a ninth of them)",
    )
    parser.add_argument(
        "--layer",
        type=int,
        default=0,
        help="of the language model, before which the gates are (default: %(default)s, the first)",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        help="image files, or folders of them (default: drawn scenes and questions about them)",
    )
    parser.add_argument(
        "--prompt", help="what is asked about --images (default: What is in the image?)"
    )
    parser.add_argument(
        "--level",
        choices=get_args(choices.Level),
        help="of the drawn scenes (default: hard)",
    )
    parser.add_argument(
        "--num-images", type=int, default=8, help="of them, at most (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is random (default: 0)")
    options.add_json(parser)


def demo_vlm(parser: argparse.ArgumentParser) -> None:
    """A recipe, and where the model goes."""
    names = ", ".join(config_names("demo_vlm"))
    parser.add_argument(
        "--config", required=True, help=f"a YAML file, or what comes with ocvtp: {names}"
    )
    parser.add_argument("--output", help="folder of the model (default: the config's)")
    parser.add_argument(
        "--resume", action="store_true", help="continue what the output folder holds"
    )
    options.add_json(parser)


FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "export": export,
    "resize": resize,
    "list": list_,
    "runs": runs,
    "answer": answer,
    "show": show,
    "explore": explore,
    "evaluate": evaluate,
    "recommend": recommend,
    "lmms-task": lmms_task,
    "bench": bench,
    "serve": serve,
    "serve-check": serve_check,
    "compare": compare,
    "flops": flops,
    "probe": probe,
    "demo-vlm": demo_vlm,
    "table": publishing.table,
    "plot": publishing.plot,
    "merge": publishing.merge,
    "card": publishing.card,
    "push": publishing.push,
}
"""All commands but `train` and `extract`, whose settings Lightning parses."""
