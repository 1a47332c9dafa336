"""From training checkpoints and official weights to artifacts."""

from ocvtp.export.checkpoint import export_checkpoint
from ocvtp.export.official import export_official
from ocvtp.export.official_selector import export_official_selector

__all__ = ["export_checkpoint", "export_official", "export_official_selector"]
