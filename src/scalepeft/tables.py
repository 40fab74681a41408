"""What to take from a source, what is wrong with a row of it, and the table that was read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from scalepeft.errors import UserError, did_you_mean

Fail = Callable[[str, str], UserError]
"""Makes the error of one key of a source: `fail("path", "does not exist")`."""


@dataclass(frozen=True, kw_only=True)
class Bad:
    """Why a row cannot be used."""

    reason: str
    """One of a few sentences, under which such rows are counted."""
    detail: str = ""
    """What is particular to this row."""

    def __str__(self) -> str:
        return f"{self.reason} ({self.detail})" if self.detail else self.reason


@dataclass(frozen=True, kw_only=True)
class Table:
    """The wanted columns of a source that was read. Row numbers are from 0."""

    texts: list[pa.ChunkedArray]
    """One column of strings, or the two of a pair; of records one, each a JSON object."""
    labels: pa.ChunkedArray | list[Any] | None
    """As they stand in the source; None without a label column."""
    broken: dict[int, Bad] = field(default_factory=dict)
    """The rows that could not be read."""
    lines: Sequence[int] | None = None
    """The line of each row in a text file."""
    columns: Sequence[str] = ()
    """Of records: the columns that are there, by their usual names."""

    def __len__(self) -> int:
        return len(self.texts[0])


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A source whose content is known but not read yet."""

    path: str
    """As it stands in the recipe."""
    identity: str
    """The same for the same content, wherever it lies."""
    revision: str
    """The Hub's commit, or the sha256 of a file."""
    names: list[str] | None = None
    """The label names that the data set itself declares (ClassLabel)."""
    read: Callable[[], Table]


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to take from a source, and how to speak of what is missing."""

    texts: list[str]
    label: str
    label_optional: bool
    """Whether the label column may be absent."""
    fail: Fail

    def label_in(self, columns: Iterable[str]) -> str | None:
        """The label column, after a check that the wanted columns are there."""
        there = list(columns)
        for name in [*self.texts, self.label]:
            if name in there or (name == self.label and self.label_optional):
                continue
            key = "label_column" if name == self.label else "text_columns"
            shown = ", ".join(map(repr, there[:20])) + (", ..." if len(there) > 20 else "") or "none"
            raise self.fail(key, f"there is no column {name!r}; the columns are {shown}{did_you_mean(name, there)}")
        if twice := [name for name in [*self.texts, self.label] if there.count(name) > 1]:
            raise self.fail("path", f"the header has the column {twice[0]!r} more than once")
        return self.label if self.label in there else None

    @property
    def identity(self) -> list[Any]:
        """What is taken, as JSON."""
        return [self.texts, self.label, self.label_optional]

    @property
    def width(self) -> int:
        """The number of columns of a table's texts."""
        return len(self.texts)

    def columns_in(self, columns: Iterable[str]) -> list[str]:
        """The columns to read, after the same check."""
        label = self.label_in(columns)
        return list(dict.fromkeys([*self.texts, *([label] if label is not None else [])]))

    def row(self, item: Mapping[str, Any]) -> list[Any]:
        """The texts of a row."""
        return [item.get(name) for name in self.texts]

    def fields(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
        """The texts of rows that are fields under a header, by columns."""
        return [[row[at] for row in rows] for at in map(header.index, self.texts)]

    def usual(self, columns: Iterable[str]) -> list[str]:  # noqa: ARG002  # the signature of Records
        """The usual names of the columns that are there; none have such names here."""
        return []


@dataclass(frozen=True, kw_only=True)
class Records(Wanted):
    """Rows of language models: whichever columns of a conversation are there, each row as one JSON object."""

    texts: list[str] = field(default_factory=list)
    label: str = ""
    label_optional: bool = True
    names: Mapping[str, str]
    """The usual name of each column that any format knows, and the name that it has in this source."""
    renamed: Sequence[str] = ()
    """Those of `names` that the recipe says, and that must be there."""

    def label_in(self, columns: Iterable[str]) -> str | None:
        """No label; after a check that the columns the recipe names are there, and any that a format knows."""
        there = list(columns)
        shown = ", ".join(map(repr, there[:20])) + (", ..." if len(there) > 20 else "") or "none"
        for usual in self.renamed:
            if (name := self.names[usual]) not in there:
                raise self.fail("columns", f"there is no column {name!r}; the columns are {shown}{did_you_mean(name, there)}")
        if not self.usual(there):
            raise self.fail(
                "columns", f"no column holds conversations by its name; say which: {{messages: NAME}}; there are {shown}"
            )
        return None

    @property
    def identity(self) -> list[Any]:
        """What is taken, as JSON."""
        return [dict(self.names)]

    @property
    def width(self) -> int:
        """One column: the object."""
        return 1

    def columns_in(self, columns: Iterable[str]) -> list[str]:
        """The columns to read, after the same check."""
        there = list(columns)
        self.label_in(there)
        return [name for name in self.names.values() if name in there]

    def row(self, item: Mapping[str, Any]) -> list[Any]:
        """A row as one JSON object, by the usual names; nulls are left out."""
        kept = {usual: item[name] for usual, name in self.names.items() if item.get(name) is not None}
        return [json.dumps(kept, ensure_ascii=False, default=str)]  # other than str: dates and bytes of Arrow

    def fields(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[list[str]]:
        """The same of rows that are fields under a header."""
        return [[self.row(dict(zip(header, row, strict=True)))[0] for row in rows]]

    def usual(self, columns: Iterable[str]) -> list[str]:
        """The usual names of the columns that are there."""
        there = set(columns)
        return [usual for usual, name in self.names.items() if name in there]


def shown(value: object) -> str:
    """A value for a message, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
