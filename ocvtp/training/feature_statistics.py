"""Measuring a network's feature statistics before it trains.

B images, N visual tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_lightning.utilities import move_data_to_device
from torch.utils.data import DataLoader, Dataset, Subset

from ocvtp.encoders.base import FrozenEncoder
from ocvtp.slots.network import OCPruner
from ocvtp.slots.statistics import Moments

_BATCH = 16  # images encoded at once


def measure_statistics(
    network: OCPruner,
    encoder: FrozenEncoder,
    dataset: Dataset[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    num_images: int,
) -> None:
    """Measure every `FeatureStatistics` of a network that is not measured yet.

    Every process reads the same images, so that all agree without a word.

    Args:
        network: whose `inputs` are of `config.layer` and `targets` of `config.target_layer`.
        encoder: loaded with both layers.
        dataset: images; `num_images` of them at equal steps are read.
        collate: how they become a batch.
        num_images: how many, all if there are fewer.

    Raises:
        ValueError: if no image could be read, or for less than one.
    """
    layers = (network.config.layer, network.inputs), (network.config.target_layer, network.targets)
    wanted = [
        (layer, statistics, Moments())
        for layer, statistics in layers
        if layer is not None and statistics is not None and not int(statistics.num_tokens)
    ]
    if not wanted:
        return
    if num_images < 1:
        raise ValueError(f"statistics_images={num_images}; pass at least 1.")
    total = len(dataset)  # type: ignore[arg-type]
    count = min(num_images, total)
    images = Subset(dataset, [i * total // count for i in range(count)])
    device = wanted[0][1].mean.device
    for batch in DataLoader(images, _BATCH, collate_fn=collate):
        if not len(batch["pixel_values"]):
            continue
        pixel_values = move_data_to_device(batch["pixel_values"], device)
        tokens = encoder(pixel_values, batch["image_sizes"])
        for layer, _, moments in wanted:
            moments.add(tokens.hidden[layer], tokens.valid)
    for _, statistics, moments in wanted:
        statistics.measure(moments)
