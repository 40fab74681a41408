"""Claims about the order of the rows and its division into batches."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from scalepeft.sampler import NO_ROW, StepBatches, epoch_order, token_batches

STRATEGIES = ("random", "sequential", "group_by_length", "longest_first")


def lengths(rows: int, seed: int = 0) -> np.ndarray:
    """Lengths as of sentences: many short ones, a few long."""
    return 3 + np.random.default_rng(seed).geometric(0.05, rows)


def batches(rows: int, batch: int, accumulation: int, processes: int, **options) -> list[list[list[int]]]:
    """The micro-batches of every process."""
    division = {"batch_size": batch, "accumulation": accumulation, "processes": processes}
    return [list(StepBatches(lengths(rows), **division, process=p, seed=7, **options)) for p in range(processes)]


def steps(of_processes: list[list[list[int]]], accumulation: int) -> list[list[int]]:
    """The rows of every optimizer step, sorted."""
    count = len(of_processes[0])
    micro = [[row for process in of_processes for row in process[i]] for i in range(count)]
    return [sorted(r for m in micro[i : i + accumulation] for r in m if r != NO_ROW) for i in range(0, count, accumulation)]


def padded(length: np.ndarray, found: list[list[int]]) -> int:
    return sum(max(int(length[row]) for row in batch) * len(batch) for batch in found)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rows", [0, 1, 63, 64, 65, 5000])
def test_an_epoch_is_every_row_once(strategy, rows):
    assert sorted(epoch_order(lengths(rows), seed=3, epoch=1, strategy=strategy).tolist()) == list(range(rows))


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_order_is_a_function_of_seed_and_epoch_alone(strategy):
    def order(**given: int) -> list[int]:
        return epoch_order(lengths(300), **{"seed": 1, "epoch": 0, **given}, strategy=strategy).tolist()

    first = order()
    np.random.seed(99)  # noqa: NPY002  # the global generator must not matter
    assert order() == first
    assert len({tuple(order(seed=s, epoch=e)) for s in range(3) for e in range(3)}) == 9


def test_a_sampler_runs_the_epoch_it_is_set_to():
    sampler = StepBatches(lengths(50), batch_size=4, seed=5)
    first = list(sampler)
    sampler.set_epoch(2)
    assert [row for batch in sampler for row in batch] == epoch_order(lengths(50), seed=5, epoch=2).tolist()
    sampler.set_epoch(0)
    assert list(sampler) == first


DIVISIONS = [*itertools.product((1, 2, 15, 16, 17, 31, 48, 70), (1, 3, 4), (1, 2, 5), (1, 2, 3))]


@pytest.mark.parametrize("drop_last", [False, True])
def test_each_row_once_an_epoch_and_equally_many_micro_batches_however_divided(drop_last):
    for rows, batch, accumulation, processes in DIVISIONS:
        told = f"{rows} rows, {batch} x {accumulation} x {processes}"
        found = batches(rows, batch, accumulation, processes, drop_last=drop_last)
        total = batch * accumulation * processes
        seen = Counter(row for process in found for micro in process for row in micro if row != NO_ROW)
        assert max(seen.values(), default=0) <= 1, told
        assert len(seen) == (rows - rows % total if drop_last else rows), told
        assert len({len(process) for process in found}) == 1, told
        sampler = StepBatches(
            lengths(rows), batch_size=batch, accumulation=accumulation, processes=processes, drop_last=drop_last
        )
        assert len(found[0]) == len(sampler), told
        assert sampler.global_batch == total, told
        assert all(0 < len(micro) <= batch for process in found for micro in process), told
        assert all(micro == [NO_ROW] for process in found for micro in process if NO_ROW in micro), told


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_has_the_same_rows_however_its_global_batch_is_divided(strategy):
    for total, rows in itertools.product((8, 12, 16, 24), (7, 16, 70, 131)):
        divisions = [(b, a, total // (a * b)) for a in range(1, total + 1) for b in range(1, total + 1) if total % (a * b) == 0]
        whole = steps(batches(rows, total, 1, 1, strategy=strategy), 1)
        for batch, accumulation, processes in divisions:
            found = steps(batches(rows, batch, accumulation, processes, strategy=strategy), accumulation)
            assert found == whole, f"{rows} rows, {batch} x {accumulation} x {processes}"


def test_fill_gives_every_micro_batch_its_full_size():
    for rows, batch, processes in itertools.product((1, 7, 32, 33), (1, 4, 8), (1, 2, 3)):
        found = batches(rows, batch, 1, processes, fill=True, strategy="longest_first")
        assert {len(micro) for process in found for micro in process} == {batch}
        assert Counter(r for p in found for m in p for r in m if r != NO_ROW) == Counter(range(rows))


def test_grouping_by_length_pads_far_less_and_does_not_sort_the_epoch():
    length = lengths(5000)
    waste = {s: StepBatches(length, batch_size=16, strategy=s).padding_waste() for s in ("random", "group_by_length")}
    assert waste["random"] > 0.5
    assert waste["group_by_length"] < 0.1
    means = [length[batch].mean() for batch in StepBatches(length, batch_size=64, strategy="group_by_length")]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("rows", "batch"), [(0, 4), (1, 4), (16, 4), (70, 16), (70, 1)])
def test_the_padding_told_is_the_padding_done(strategy, rows, batch):
    sampler = StepBatches(lengths(rows), batch_size=batch, strategy=strategy)
    tokens = padded(lengths(rows), list(sampler))
    assert sampler.padding_waste() == pytest.approx(1 - int(lengths(rows).sum()) / tokens if tokens else 0.0)


@pytest.mark.parametrize("drop_last", [False, True])
def test_rows_after_a_step_are_those_its_batches_hold(drop_last):
    lengths = np.arange(1, 24)
    batches = StepBatches(lengths, batch_size=2, accumulation=2, processes=2, drop_last=drop_last)
    per_epoch = [8, 8] if drop_last else [8, 8, 7]
    seen = [0]
    for rows in per_epoch * 3:
        seen.append(seen[-1] + rows)
    assert [batches.rows_after(step) for step in range(len(seen))] == seen
    assert batches.rows_per_epoch == sum(per_epoch)


@pytest.mark.parametrize("tokens", [1, 50, 1_000, 10**9])
def test_batches_of_tokens_hold_every_row_once_the_longest_first_and_no_more_tokens_than_asked(tokens):
    of = lengths(500)
    found = [batch.tolist() for batch in token_batches(of, tokens=tokens)]
    rows = [row for batch in found for row in batch]
    assert sorted(rows) == list(range(500))
    assert of[rows].tolist() == sorted(of.tolist(), reverse=True)
    assert all(len(batch) == 1 or max(of[batch]) * len(batch) <= tokens for batch in found)
    assert all(max(of[batch]) * (len(batch) + 1) > tokens for batch in found[:-1])
