"""A loader whose order is one stream that a checkpoint can continue.

Batch k of a run depends on the seed and on k alone: not on how often the run was stopped, nor on
how Lightning counts the epoch in which it was.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import DataLoader, Dataset, DistributedSampler, get_worker_info

_MMAP_THRESHOLD = -3
"""M_MMAP_THRESHOLD of malloc.h."""


class StreamSampler(DistributedSampler[int]):
    """This process's share of each epoch's order, which depends on seed and epoch alone.

    A DistributedSampler, so that Lightning leaves it in place. Where the processes do not divide
    the images, the last ones of an order are left out of its epoch, unless it is to be `whole`.

    Args:
        dataset: with a length.
        seed: of the orders, not negative.

    Attributes:
        whole: whether every image is in every epoch; shares may then differ by one.
    """

    def __init__(self, dataset: Dataset[Any], seed: int = 0) -> None:
        self.whole = False
        together = distributed.is_available() and distributed.is_initialized()
        num_replicas = distributed.get_world_size() if together else 1
        rank = distributed.get_rank() if together else 0
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.num_images = len(dataset)  # type: ignore[arg-type]
        self._next = (0, 0)

    def seek(self, epoch: int, first: int) -> None:
        """The next pass is over `epoch`, without the first `first` images of this process."""
        self._next = (epoch, first)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """All images in the order of an epoch, for all processes together."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_images)

    def layout(self) -> dict[str, int]:
        """What the orders and this process's share of them depend on, beside the epoch."""
        shares = {"num_images": self.num_images, "num_processes": self.num_replicas}
        whole = {"whole": 1} if self.whole else {}
        return {**shares, "seed": self.seed, **whole}

    def __iter__(self) -> Iterator[Any]:
        epoch, first = self._next
        end = self.num_images if self.whole else self.total_size
        share = self.order(epoch)[:end][self.rank :: self.num_replicas]
        return iter(share[first:].tolist())


class GroupedSampler(StreamSampler):
    """An order of groups, e.g. of the questions on an image, whose members stay side by side.

    Args:
        dataset: with a length.
        groups: [len(dataset)] number of the group of each item, ascending.
        seed: of the orders, not negative.
    """

    def __init__(self, dataset: Dataset[Any], groups: NDArray[np.int64], seed: int = 0) -> None:
        super().__init__(dataset, seed)
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        self._members = np.split(np.arange(len(groups)), starts[1:])

    def order(self, epoch: int) -> NDArray[np.int64]:
        drawn = np.random.default_rng([self.seed, epoch]).permutation(len(self._members))
        return np.concatenate([self._members[group] for group in drawn])

    def layout(self) -> dict[str, int]:
        return {**super().layout(), "num_groups": len(self._members)}


class ShardSampler(StreamSampler):
    """An order that reads few files at a time.

    An epoch goes through the files in a random order, `mixed_shards` of them at a time, whose
    images are shuffled among each other. With no more files than that, it is the order of
    `StreamSampler`: all images are shuffled.

    Args:
        dataset: with a length.
        starts: [files + 1] number of the first image of every file, and of all.
        seed: of the orders.
        mixed_shards: how many are read at a time, by all processes together.
    """

    def __init__(
        self, dataset: Dataset[Any], starts: NDArray[np.int64], seed: int, mixed_shards: int
    ) -> None:
        super().__init__(dataset, seed)
        self._starts, self._mixed = starts, mixed_shards

    def order(self, epoch: int) -> NDArray[np.int64]:
        count = len(self._starts) - 1
        if count <= self._mixed:
            return super().order(epoch)
        draws = np.random.default_rng([self.seed, epoch])
        shards = draws.permutation(count)
        groups = [shards[i : i + self._mixed] for i in range(0, count, self._mixed)]
        ranges = [[np.arange(*self._starts[s : s + 2]) for s in group] for group in groups]
        return np.concatenate([draws.permutation(np.concatenate(own)) for own in ranges])

    def layout(self) -> dict[str, int]:
        shards = {"num_shards": len(self._starts) - 1, "mixed_shards": self._mixed}
        return {**super().layout(), **shards}


class InOrder(DistributedSampler[int]):
    """This process's part of all items, in their order: each is in one process, and in it once.

    Parts are of one size, or differ by one item. Where there are more processes than items, each
    has all of them, so that means over all processes stay what they are.

    Args:
        dataset: with a length.
    """

    def __init__(self, dataset: Dataset[Any]) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        ranks, rank = (distributed.get_world_size(), distributed.get_rank()) if together else (1, 0)
        super().__init__(dataset, ranks, rank, shuffle=False)
        total = len(dataset)  # type: ignore[arg-type]
        first, end = (rank * total // ranks, (rank + 1) * total // ranks)
        self.part = range(first, end) if total >= ranks else range(total)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.part)

    def __len__(self) -> int:
        return len(self.part)


class ResumableLoader(DataLoader[Any]):
    """A loader over an endless stream of shuffled epochs that knows how far it was read.

    A pass yields `len(loader)` batches from where the last one ended; the first pass after
    `load_state_dict` ends with the epoch that was interrupted. A loader that was never read and got
    no state starts with the epoch that `sampler.set_epoch` named, as Lightning does.

    Args:
        dataset: with a length.
        batch_size: per process; what is left over at the end of an epoch is dropped.
        seed: of the orders, not negative.
        stream: of the dataset, with the orders; None for whole permutations by `seed`.
        whole: whether what is left over is a last, smaller batch of all processes together: every
            image is then in every epoch once, and a process may have none in that batch.
        options: of `torch.utils.data.DataLoader`.

    Raises:
        ValueError: if there is not one whole batch.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        seed: int = 0,
        stream: StreamSampler | None = None,
        whole: bool = False,
        **options: Any,
    ) -> None:
        self.stream = StreamSampler(dataset, seed) if stream is None else stream
        self.stream.whole = whole
        if not 1 <= batch_size <= len(self.stream):
            raise ValueError(
                f"batch_size={batch_size} does not fit the {len(self.stream)} training images of a "
                "process; pass more images, or a batch_size from 1 to their number."
            )
        options.setdefault("sampler", self.stream)
        options.setdefault("generator", own_generator(seed))
        super().__init__(dataset, batch_size, **{"drop_last": not whole, **options})
        self._batches: int | None = None
        self._loaded = False

    def __len__(self) -> int:
        """Batches of an epoch, in every process."""
        if not self.stream.whole:
            return super().__len__()
        return -(-self.stream.num_images // (self.stream.num_replicas * (self.batch_size or 1)))

    def state_dict(self) -> dict[str, int]:
        """Where the stream stands, and what that number depends on."""
        epoch, batch = divmod(self._batches or 0, len(self))
        return {"epoch": epoch, "batch": batch, **self._layout()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the loader of `state_dict` stood.

        Raises:
            ValueError: if that was inside an epoch that other settings made.
        """
        layout = self._layout()
        saved = {name: state[name] for name in state if name not in ("epoch", "batch")}
        if state["batch"] and saved != layout:
            raise ValueError(
                f"the checkpoint was written inside an epoch with {saved}, but now there is "
                f"{layout}, so the batches that were left do not exist; resume with the same data "
                "settings, or from a checkpoint written at the end of an epoch."
            )
        self._batches = state["epoch"] * len(self) + state["batch"]
        self._loaded = True

    def _layout(self) -> dict[str, int]:
        return {"batch_size": self.batch_size or 0, **self.stream.layout()}

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """One pass; reads nothing before the first batch, as Lightning names the epoch late."""
        if self._batches is None:
            self._batches = self.stream.epoch * len(self)
        left = len(self) - (self._batches % len(self) if self._loaded else 0)
        self._loaded = False
        while left:
            epoch, batch = divmod(self._batches, len(self))
            self.stream.seek(epoch, batch * (self.batch_size or 0))
            for item in super().__iter__():
                self._batches += 1
                left -= 1
                yield item
                if not left:
                    break
            if left and self._batches // len(self) == epoch:  # others have images left
                self._batches += 1
                left -= 1
                yield self.collate_fn([])


def keep_memory_small() -> None:
    """In a loading process, give what batches took back to the system; elsewhere nothing happens.

    Until version 2.38 glibc does not reuse aligned memory, which tensors take, and a process grows
    by every batch (https://sourceware.org/bugzilla/show_bug.cgi?id=14581). Blocks of more than
    128 KB are apart from the heap at first, which ends when one is freed; now they stay so.
    """
    if get_worker_info() is not None and sys.platform == "linux":
        _keep_blocks_apart()


@cache  # of a loading process, which nothing is forked from
def _keep_blocks_apart() -> None:
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # musl has none
        library.mallopt(_MMAP_THRESHOLD, 2**17)


def own_generator(seed: int) -> torch.Generator:
    """Seeds workers without a draw from the global generator, which belongs to the model."""
    return torch.Generator().manual_seed(seed)


def ends(counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """[R + 1] where each of R runs starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
