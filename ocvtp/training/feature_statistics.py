"""Measuring a network's feature statistics before it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning.utilities import move_data_to_device
from torch.utils.data import DataLoader, Dataset, Subset

from ocvtp.learning.network import PrunerNetwork
from ocvtp.slots.statistics import Moments
from ocvtp.structures import VisualTokens
from ocvtp.training.features import count_images

_BATCH = 16  # images encoded at once


def measure_statistics(
    network: PrunerNetwork,
    tokens_of: Callable[[dict[str, Any]], VisualTokens],
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    num_images: int,
) -> None:
    """Measure every `FeatureStatistics` of a network that is not measured yet.

    Every process reads the same images, so that all agree without communication.

    Args:
        network: see `PrunerNetwork.statistics`.
        tokens_of: what makes the tokens of a batch, with their layers.
        dataset: images, or their features; `num_images` of them at equal steps are read.
        collate: how they become a batch.
        num_images: how many, all if there are fewer.

    Raises:
        ValueError: if no image could be read, or for less than one.
    """
    wanted = [
        (layer, statistics, Moments())
        for layer, statistics in network.statistics()
        if not int(statistics.num_tokens)
    ]
    if not wanted:
        return
    if num_images < 1:
        raise ValueError(f"statistics_images={num_images}; pass at least 1.")
    images = at_equal_steps(dataset, num_images)
    device = wanted[0][1].mean.device
    for batch in DataLoader(images, _BATCH, collate_fn=collate):
        if not count_images(batch):
            continue
        tokens = tokens_of(move_data_to_device(batch, device))
        for layer, _, moments in wanted:
            moments.add(tokens.hidden[layer], tokens.valid)
    for _, statistics, moments in wanted:
        statistics.measure(moments)


def at_equal_steps(dataset: Dataset[Any], most: int) -> Subset[Any]:
    """So many items, or all where there are fewer; the same in every process."""
    total = len(dataset)  # type: ignore[arg-type]
    count = min(most, total)
    return Subset(dataset, [i * total // count for i in range(count)])
