"""The order of the rows: a function of seed and epoch alone, however the rows are then divided.

Upstream's samplers depend on the number of processes, the batch size and the accumulation (and repeat rows to fill the
last batch), so that the same recipe trains on other batches on another machine. Here an epoch is one permutation of the
rows; a step takes the next `global batch` of it, and only then are these rows divided among accumulation and processes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

NO_ROW = -1
"""Stands in a batch for a row that is not there, where every process must take part in the last, incomplete step."""

_BLOCK, _BLOCKS = 64, 64
"""Length grouping: rows are sorted by length within windows of _BLOCK * _BLOCKS rows of the permutation and cut into
blocks of _BLOCK, whose order is drawn again. Constants, so that the order depends on neither batch size nor processes."""


def epoch_order(lengths: NDArray[np.integer], *, seed: int, epoch: int, strategy: str = "random") -> NDArray[np.int64]:
    """The order of the rows in one epoch: each row once.

    `lengths` has one entry a row; `strategy` is TrainingArguments' train_sampling_strategy (random, sequential or
    group_by_length), or longest_first, which is for evaluation.
    """
    rows = len(lengths)
    if strategy == "sequential":
        return np.arange(rows)
    if strategy == "longest_first":
        longest = int(lengths.max(initial=0))
        width = np.uint16 if longest < 2**16 else np.int64  # of 16 bits numpy sorts in linear time
        shorter = (longest - lengths).astype(width)
        return np.argsort(shorter, kind="stable")
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = generator.permutation(rows)
    if strategy == "random":
        return order
    window = _BLOCK * _BLOCKS
    blocks: list[NDArray[np.int64]] = []
    for start in range(0, rows, window):
        part = order[start : start + window]
        part = part[np.argsort(lengths[part], kind="stable")]
        blocks += [part[i : i + _BLOCK] for i in range(0, len(part), _BLOCK)]
    return np.concatenate([blocks[i] for i in generator.permutation(len(blocks))]) if blocks else order


def token_batches(lengths: NDArray[np.integer], *, tokens: int) -> Iterator[NDArray[np.int64]]:
    """All rows, longest first, in batches of at most so many tokens with their padding, or of the one row that has more."""
    order = epoch_order(lengths, seed=0, epoch=0, strategy="longest_first")
    start = 0
    while start < len(order):
        rows = max(1, tokens // max(1, int(lengths[order[start]])))
        yield order[start : start + rows]
        start += rows


class StepBatches:
    """The micro-batches of one process: a batch sampler over lists of row numbers.

    Step s takes rows s*G .. (s+1)*G of the epoch's order, G = batch_size * accumulation * processes; micro-batch a of
    process r takes the r-th slice of its a-th part. The last step holds what is left: no row is repeated, none left out
    (unless drop_last), and a process left without rows gets NO_ROW so that all take the same number of micro-batches.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],
        *,
        batch_size: int,
        accumulation: int = 1,
        processes: int = 1,
        process: int = 0,
        seed: int = 0,
        strategy: str = "random",
        drop_last: bool = False,
        fill: bool = False,
    ) -> None:
        """`fill` completes every micro-batch with NO_ROW, for gathering needs equal shapes on all processes."""
        self.lengths, self.batch_size, self.accumulation = lengths, batch_size, accumulation
        self.num_processes, self.process, self.seed, self.strategy = processes, process, seed, strategy
        self.drop_last, self.fill, self.epoch = drop_last, fill, 0

    @property
    def global_batch(self) -> int:
        """Rows per optimizer step over all processes."""
        return self.batch_size * self.accumulation * self.num_processes

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch over all processes: all of them, unless drop_last leaves out those of an incomplete step."""
        rows = len(self.lengths)
        return rows - rows % self.global_batch if self.drop_last else rows

    def rows_after(self, steps: int) -> int:
        """Rows trained on after so many optimizer steps, over all processes."""
        per_epoch = -(-self.rows_per_epoch // self.global_batch)
        epochs, rest = divmod(steps, per_epoch)
        return epochs * self.rows_per_epoch + min(rest * self.global_batch, self.rows_per_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration runs."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of this process in an epoch, the same for every process."""
        steps, rest = divmod(len(self.lengths), self.global_batch)
        last = 0 if self.drop_last else -(-rest // (self.batch_size * self.num_processes))
        return steps * self.accumulation + last

    def __iter__(self) -> Iterator[list[int]]:
        order = epoch_order(self.lengths, seed=self.seed, epoch=self.epoch, strategy=self.strategy)
        part = self.batch_size * self.num_processes
        for index in range(len(self)):
            start = index * part + self.process * self.batch_size
            batch = order[start : start + self.batch_size].tolist()
            missing = self.batch_size - len(batch) if self.fill else int(not batch)
            yield batch + [NO_ROW] * missing

    def padding_waste(self) -> float:
        """The share of an epoch's tokens that are padding when each micro-batch is padded to its longest row."""
        order = self.lengths[epoch_order(self.lengths, seed=self.seed, epoch=self.epoch, strategy=self.strategy)]
        edges = np.arange(0, len(order), self.batch_size)
        longest = np.maximum.reduceat(order, edges) if len(order) else order
        counts = np.diff(np.append(edges, len(order)))
        padded = int((longest * counts).sum())
        return 1 - int(order.sum()) / padded if padded else 0.0
