"""From training checkpoints and official weights to artifacts."""

from ocvtp.export.checkpoint import export_checkpoint
from ocvtp.export.official import export_official

__all__ = ["export_checkpoint", "export_official"]
