"""How many operations a model takes until its first answered token, with any pruner or none."""

from __future__ import annotations

from ocvtp.flops.count import Count as Count
from ocvtp.flops.count import count as count
