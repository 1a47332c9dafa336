"""What must hold on a device holds on this CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

from benchmarks.device_checks import CHECKS

SLOW = {"a_graph_of_select_keeps_the_same", "select_waits_for_nothing"}  # in test_gpu.py on a CPU
CPU = [(name, "cpu") for name in CHECKS if name not in SLOW]
CUDA = [pytest.param(name, "cuda", marks=pytest.mark.gpu) for name in CHECKS]


@torch.no_grad()
@pytest.mark.parametrize(("name", "device"), [*CPU, *CUDA])
def test_device(name, device):
    CHECKS[name](device)
