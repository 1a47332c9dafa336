"""`ocvtp card`: the model card of an exported network."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ocvtp.commands import output
from ocvtp.evaluation.conditions import untrained_labels
from ocvtp.evaluation.labels import RANDOM
from ocvtp.evaluation.paper_columns import columns, notes
from ocvtp.learning.artifact import CONFIG_NAME, WEIGHTS_NAME, config_of, explained
from ocvtp.learning.card import About, model_card
from ocvtp.learning.network import PrunerNetwork
from ocvtp.pruners import trainable
from ocvtp.pruners.catalog import entry
from ocvtp.reporting.chosen import Chosen
from ocvtp.reporting.paper_table import PaperTable, markdown
from ocvtp.reporting.results_files import RESULTS, read_results
from ocvtp.shipped import find_folder


@dataclass(frozen=True)
class Artifact:
    """An exported network that was read whole.

    Args:
        folder: that holds it. pruner: that takes it. network: what was read.
    """

    folder: Path
    pruner: str
    network: PrunerNetwork


def run(arguments: argparse.Namespace) -> int:
    """Check the artifact, and print or write its card."""
    path = None if arguments.output is None else output.file(arguments.output)
    artifact = checked(arguments.artifact)
    text = card_of(artifact, arguments)
    facts = {"artifact": arguments.artifact, "output": arguments.output, "card": text}
    output.print_or_write(text, path, facts, arguments.json)
    return 0


def checked(given: str) -> Artifact:
    """An artifact whose weights fit its config.json.

    Raises:
        ValueError: if it is none.
    """
    folder = Path(find_folder(given))
    if not folder.is_dir():
        raise ValueError(f"{given} is no folder; pass one that `ocvtp export` wrote.")
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{given} has no {CONFIG_NAME}; pass a folder that `ocvtp export` wrote.")
    names = trainable.readers(str(folder))
    config = config_of(folder)
    kind = trainable.of_name(names[0]) if names else trainable.of_format(config.get("format") or "")
    network = kind.network_class.from_pretrained(folder)
    return Artifact(folder, kind.name, network)


def card_of(artifact: Artifact, arguments: argparse.Namespace) -> str:
    """The card, with what the flags add to its config.json."""
    about = entry(artifact.pruner)
    weights = sha256((artifact.folder / WEIGHTS_NAME).read_bytes()).hexdigest()
    figures = "" if arguments.results is None else _figures(artifact, arguments.results)
    said = About(
        pruner=about.name,
        title=about.title,
        paper=about.paper,
        data=arguments.data,
        license=arguments.license,
        weights=weights,
        parameters=sum(p.numel() for p in artifact.network.parameters()),
        figures=figures,
    )
    with explained(
        f"{artifact.folder} has no card, as its {CONFIG_NAME} is not as exports write it"
    ):
        return model_card(config_of(artifact.folder), said)


def _figures(artifact: Artifact, given: str) -> str:
    """A table of the pruner and what it is compared with, of each metric of an evaluation."""
    path, pruner = Path(given), artifact.pruner
    path = path / RESULTS if path.is_dir() else path
    facts = read_results(path)
    own = [row["label"] for row in facts["rows"] if row["pruner"] == pruner and row["trained"]]
    if not own:
        raise ValueError(
            f"--results {given} has no row of pruner {pruner!r} with a checkpoint; pass results of"
            f" `ocvtp evaluate --pruners {pruner} --checkpoint ...`."
        )
    untrained = untrained_labels(trainable.of_name(pruner), artifact.network.config)
    known = {row["label"] for row in facts["rows"]}
    labels = [*own, *(label for label in (*untrained, RANDOM) if label in known)]
    parts = ["Beside controls of the same run:"]
    for metric in facts["metrics"]:
        chosen = Chosen(labels, [metric])
        said = list(notes(facts, None, chosen, "none"))
        table = PaperTable(columns(facts, None, chosen, "none"), said, True)
        parts.append(markdown(table).rstrip())
    return "\n\n".join(parts)


FILES = (CONFIG_NAME, WEIGHTS_NAME)
"""Of an artifact, beside its card."""
