"""Rows that are read while training: sources too large to be prepared before.

Every process reads the whole stream and tokenises its own rows alone. The order depends on seed and buffer_size only, so that
each layout takes the same rows at the same step, and a resumed run goes on with the row after the last one it took.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from huggingface_hub import HfApi

from scalepeft.fetch import PREFIX, asset_path
from scalepeft.labels import Labels
from scalepeft.prepared import FORMAT, Chosen, Encoder, Integers, Part, refusal, usable
from scalepeft.recipe import Recipe, Source
from scalepeft.sources import (
    class_names,
    csv_tables,
    from_arrow,
    hub_error,
    jsonl_tables,
    parquet_tables,
)
from scalepeft.tables import Bad, Opened, Table, Wanted

_IGNORED = -100  # what torch's cross-entropy leaves out
_EDGE = 2**20
"""Bytes at each end of a file that tell it from another: hashing all of a large one would take minutes."""

_TRIED = 1_000
"""Rows among which one must be usable."""

Tables = Callable[[int], Iterator[Table]]
"""Reads a source from its beginning, as tables of so many rows."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Training rows that are read while training; stands where `prepared.Prepared` stands."""

    rows: Stream
    key: str
    name: str = "train"
    reused: bool = False
    truncated: int = 0
    documents: int = 0
    written: dict[str, str] = field(default_factory=dict)
    augmented: dict[str, int] = field(default_factory=dict)

    @property
    def dropped(self) -> Counter[str]:
        """How many rows were left out, by reason: by this process so far, of its own rows."""
        return Counter(self.rows.unusable.values())

    @property
    def lengths(self) -> Integers:
        """No row's length is known before it is read: zeros, which take no memory."""
        return np.broadcast_to(np.int64(0), len(self.rows))


class Stream:
    """An endless sequence of rows, by their places; it begins anew, in another order, where the source ends.

    Window w of an epoch holds rows w * buffer_size and on of the source, in an order drawn from seed, epoch and w. Asked for a
    place before the last one, it reads the source again from its beginning.
    """

    def __init__(self, recipe: Recipe, part: Part, tables: Tables, labels: Labels, encoder: Encoder) -> None:
        self.recipe, self.part, self.tables, self.labels, self.encoder = recipe, part, tables, labels, encoder
        self.drop = recipe.data.on_bad_rows == "drop"
        seeds = [recipe.training.get(name) for name in ("data_seed", "seed")]
        self.seed = int(next((seed for seed in seeds if seed is not None), 42))  # upstream's default
        self.unusable: dict[int, str] = {}
        """By its place, why a row that was asked for cannot be used."""
        self.taken = 0
        """Rows that the whole run takes, once that is known."""
        self.column_names = [*encoder.features]
        self._filler: dict[str, Any] | None = None
        self._begin()

    def __len__(self) -> int:
        return self.taken

    def select_columns(self, names: Sequence[str]) -> Stream:
        """Itself, giving these columns only."""
        self.column_names = list(names)
        return self

    def __getitem__(self, places: int | Sequence[int]) -> dict[str, Any]:
        """Rows as columns, as a data set gives them; in the place of one that cannot be used, one that counts nowhere."""
        if isinstance(places, int):
            return {name: column[0] for name, column in self[[places]].items()}
        rows = [self._row(place) for place in places]
        self.unusable |= {place: row.reason for place, row in zip(places, rows, strict=True) if isinstance(row, Bad)}
        if self._filler is None:
            self._filler = next((row for row in rows if not isinstance(row, Bad)), None) or self.first()
        given = [_counts_nowhere(self._filler) if isinstance(row, Bad) else row for row in rows]
        return {name: [row[name] for row in given] for name in (*self.column_names, "labels") if name in given[0]}

    def first(self) -> dict[str, Any]:
        """The first row that can be used; what lies before it is not counted. Raises UserError when there is none near."""
        for place in range(_TRIED):
            if not isinstance(row := self._row(place), Bad):
                return row
        raise self.part.wanted.fail("path", f"none of the first {_TRIED:,} rows of {self.part.source.path} can be used")

    def _row(self, place: int) -> dict[str, Any] | Bad:
        if place < self._first:
            self._begin()
        while place >= self._first + self._count:
            self._advance()
        row = int(self._order[place - self._first])
        window = Chosen(part=self.part, table=self._table, rows=np.array([row]))
        numbers = self.labels.numbers(window.labels(), self.part.opened, self.part.wanted)
        columns, bad = usable(window, window.rows, numbers, self.encoder)
        if not bad:
            return {name: column[0] for name, column in columns.items()}
        ((_, problem),) = bad
        if not self.drop:
            raise refusal(self.recipe, Counter([problem.reason]), self.part.source.path, [f"{self._place(row)}: {problem}"])
        return problem

    def _place(self, row: int) -> str:
        lines = self._table.lines
        return f"{self.part.source.path}{f':{lines[row]}' if lines else ''}: row {self._of_source + row + 1}"

    def _begin(self) -> None:
        self._windows = self._read()
        self._first = self._count = self._of_source = 0
        self._order: Integers = np.arange(0)

    def _advance(self) -> None:
        self._first += self._count
        self._table, self._order, self._of_source = next(self._windows)
        self._count = len(self._order)

    def _read(self) -> Iterator[tuple[Table, Integers, int]]:
        """Each window: its rows, their order, and how many rows of the source stand before it."""
        size = self.part.source.buffer_size
        for epoch in itertools.count():
            before = 0
            # windows of one row are read many at a time
            for number, table in enumerate(self.tables(size if size > 1 else 1_000)):
                draw = np.random.Generator(np.random.PCG64([self.seed, epoch, number]))
                yield table, draw.permutation(len(table)) if size > 1 else np.arange(len(table)), before
                before += len(table)
            if not before:
                raise self.part.wanted.fail("path", f"{self.part.source.path} holds no rows")


def _counts_nowhere(row: dict[str, Any]) -> dict[str, Any]:
    """A row like another whose labels no loss counts."""
    labels = row.get("labels")
    return {**row, "labels": [_IGNORED] * len(labels) if isinstance(labels, list) else _IGNORED}


def streamed(recipe: Recipe, part: Part, tables: Tables, labels: Labels, encoder: Encoder) -> Streamed:
    """The training rows of a recipe as a stream."""
    stream = Stream(recipe, part, tables, labels, encoder)
    settings = [
        FORMAT,
        encoder.identity,
        part.opened.identity,
        *part.wanted.identity,
        part.source.buffer_size,
        stream.seed,
        stream.drop,
    ]
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]
    return Streamed(rows=stream, key=key)


def open_stream(source: Source, wanted: Wanted) -> tuple[Opened, Tables]:
    """Find a source to stream: a csv, tsv, jsonl or parquet file, or a data set of the Hub."""
    path = asset_path(source.path) if source.path.startswith(PREFIX) else Path(source.path).expanduser()
    if path.is_file():
        readers: dict[str, Callable[..., Iterator[Table]]] = {
            ".csv": partial(csv_tables, delimiter=","),
            ".tsv": partial(csv_tables, delimiter="\t"),
            ".jsonl": jsonl_tables,
            ".parquet": parquet_tables,
        }
        suffix = path.suffix.lower()
        if suffix not in readers:
            raise wanted.fail("streaming", f"{path} cannot be streamed: what can are {', '.join(readers)} and the Hub")
        revision = _edges(path)

        def read(rows: int) -> Iterator[Table]:
            return readers[suffix](path, wanted, rows=rows)

        return Opened(path=source.path, identity=f"stream {revision}", revision=revision, read=lambda: next(read(1))), read
    if path.is_dir():
        raise wanted.fail("streaming", f"{path} is a folder: what can be streamed are files and the Hub")
    try:
        commit = HfApi().dataset_info(source.path, revision=source.revision).sha
        found = datasets.load_dataset(source.path, source.name, split=source.split, revision=commit, streaming=True)
    except Exception as error:  # huggingface_hub raises its own errors, httpx's, datasets' and the system's
        raise hub_error(source, error, wanted.fail) from error
    if not isinstance(found, datasets.IterableDataset):
        there = ", ".join(found)
        raise wanted.fail("split", f"{source.path} has several splits; say which one: {there}")
    features = found.features or next(iter(found.take(1).with_format("arrow"))).schema
    names = class_names(features, wanted) if isinstance(features, datasets.Features) else None
    label = wanted.label_in(features if isinstance(features, datasets.Features) else features.names)

    def read_hub(rows: int) -> Iterator[Table]:
        for batch in found.with_format("arrow").iter(batch_size=rows):
            yield from_arrow(pa.table(batch), label, wanted)

    revision = str(commit)
    return Opened(
        path=source.path,
        identity=f"stream {source.path} {revision}",
        revision=revision,
        names=names,
        read=lambda: next(read_hub(1)),
    ), read_hub


def _edges(path: Path) -> str:
    """What tells a file from another without reading all of it: its size, and the sha256 of its beginning and end."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(_EDGE)
        stream.seek(max(0, size - _EDGE))
        return f"{size}-{hashlib.sha256(start + stream.read()).hexdigest()}"
