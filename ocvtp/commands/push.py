"""`ocvtp push`: an exported network and its card to the Hugging Face Hub."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from ocvtp.commands import output
from ocvtp.commands.card import FILES, Artifact, card_of, checked
from ocvtp.learning.card import CARD_NAME

_FLAGS = ("data", "license", "results")
"""What changes a card."""


def run(arguments: argparse.Namespace) -> int:
    """Check the artifact, and send it, or show what would be sent."""
    try:
        validate_repo_id(arguments.repo)
    except HFValidationError as error:
        raise ValueError(f"--repo {arguments.repo}: {error} Pass OWNER/NAME.") from error
    artifact = checked(arguments.artifact)
    card = _card(artifact, arguments)
    sizes = {name: (artifact.folder / name).stat().st_size for name in FILES}
    sizes[CARD_NAME] = len(card.encode())
    facts = {"repo": arguments.repo, "private": arguments.private, "files": sizes}
    listed = "\n".join(f"{name}: {size:,} bytes" for name, size in sizes.items())
    if arguments.dry_run:
        text = f"would send to {arguments.repo}:\n{listed}\n\n{card.rstrip()}"
        output.emit({**facts, "sent": False, "card": card}, text, arguments.json)
        return 0
    url = _send(artifact, card, arguments)
    output.emit({**facts, "sent": True, "url": url}, f"{listed}\nsent to {url}", arguments.json)
    return 0


def _card(artifact: Artifact, arguments: argparse.Namespace) -> str:
    """The one in the folder if no flag asks for another, else one of its config."""
    path = artifact.folder / CARD_NAME
    if path.is_file() and not any(getattr(arguments, name) for name in _FLAGS):
        return path.read_text(encoding="utf-8", errors="replace")
    return card_of(artifact, arguments)


def _send(artifact: Artifact, card: str, arguments: argparse.Namespace) -> str:
    """The three files in one commit; other files of the folder stay here."""
    with TemporaryDirectory() as temporary:
        for name in FILES:
            shutil.copy(artifact.folder / name, temporary)
        (Path(temporary) / CARD_NAME).write_text(card, encoding="utf-8")
        try:
            api = HfApi()
            repo = api.create_repo(
                arguments.repo, private=arguments.private or None, exist_ok=True
            ).repo_id
            return str(
                api.upload_folder(
                    repo_id=repo,
                    repo_type="model",
                    folder_path=temporary,
                    commit_message=f"A network of the pruner {artifact.pruner}",
                )
            )
        except Exception as error:  # of the hub, its client, or the connection
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"nothing could be sent to {arguments.repo} ({type(error).__name__}: {reason}); see"
                " that the name is right and `hf auth login` was done, or try --dry-run."
            ) from error
