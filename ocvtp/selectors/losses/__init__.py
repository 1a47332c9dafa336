"""What a scorer is trained for: losses by name, each in fp32, each a value for every question."""

from ocvtp.selectors.losses.answers import CE, KL, Hidden
from ocvtp.selectors.losses.base import (
    READS,
    Loss,
    LossValue,
    Step,
    build_losses,
    list_losses,
    register_loss,
    weighed,
)
from ocvtp.selectors.losses.gates import Binary, Ratio, Reward
from ocvtp.selectors.losses.kept import Kept
from ocvtp.selectors.losses.objects import Mask
from ocvtp.selectors.losses.slots import FromSlots
from ocvtp.selectors.losses.teachers import Attention, Rank

__all__ = [
    "CE",
    "KL",
    "READS",
    "Attention",
    "Binary",
    "FromSlots",
    "Hidden",
    "Kept",
    "Loss",
    "LossValue",
    "Mask",
    "Rank",
    "Ratio",
    "Reward",
    "Step",
    "build_losses",
    "list_losses",
    "register_loss",
    "weighed",
]
