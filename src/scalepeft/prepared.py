"""Rows on disk: chosen, checked and tokenised once, then kept.

One process prepares; the others, and later runs, find the rows in the cache under a key made of everything they depend on:
the tokenizer, the content of the sources, the settings and the format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scalepeft import labels as labelling
from scalepeft.augment import Augmenter
from scalepeft.entries import cached
from scalepeft.errors import UserError
from scalepeft.labels import Labels
from scalepeft.recipe import Recipe, Source
from scalepeft.tables import Bad, Opened, Table, Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Checked: TypeAlias = "tuple[Chosen, dict[str, list[Any]], list[tuple[str, Bad]]]"
"""Rows of a source that may be tokenised, as columns, and those that cannot be used, with their places."""

Encoded: TypeAlias = "tuple[dict[str, list[Any]], list[Bad | None]]"
"""The columns of the rows that can be used, and for each row what is wrong with it."""

FORMAT = 2
"""Part of every key: to be raised when a change of this module, `sources` or `labels` gives other rows for the same recipe."""

LONGEST_TEXT = 1_000_000
"""Characters; a longer text is a mistake in the data, and would occupy the tokenizer for minutes."""

TEXT_MISSING = "text is missing"
TEXT_EMPTY = "text is empty"
TEXT_LONG = f"text is longer than {LONGEST_TEXT:,} characters"
NO_TOKENS = "text gives no tokens"

_BATCH = 500  # texts tokenised at a time, and rows of an Arrow record batch
_AHEAD = 4  # batches that the tokenizer is given before their turn: it computes while Python checks and writes others
_LISTED = 5  # bad rows named in an error

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Tokenised rows on disk, under one name."""

    name: str
    rows: datasets.Dataset
    """Classification: input_ids, token_type_ids where the tokenizer gives them, labels, length (tokens).

    causal-lm: input_ids, labels, length and, of packed rows, seq_lengths; preference: prompt_ids, chosen_ids, rejected_ids and
    length, of the longer answer. Unpacked rows have row, their number in the source from 0. Augmented ones also have origin:
    a number shared by an original, which stands first, and its copies."""
    dropped: Mapping[str, int]
    """How many rows were left out, by reason."""
    source: Sequence[Mapping[str, Any]]
    """For each source: path, revision, its rows and how many of them were taken."""
    key: str
    """The cache key."""
    reused: bool
    """Whether the rows were found in the cache."""
    written: Mapping[str, str]
    """Which machine prepared them, and an id of that preparation: processes that share a cache see one and the same."""
    truncated: int = 0
    """Rows of conversations that were cut at training.max_length."""
    documents: int = 0
    """How many rows were packed into these; 0 when they are not packed."""
    copies: int = 0
    """How many augmented copies each row was to have."""

    @property
    def lengths(self) -> Integers:
        """The number of tokens of each row."""
        return self._column("length")

    @property
    def labels(self) -> Integers:
        """The label of each row (regression: its score); labels.UNLABELLED where it has none."""
        return self._column("labels")

    @property
    def augmented(self) -> dict[str, int]:
        """How many copies were added, and left out because nothing in them was replaced; empty without augmentation."""
        if not self.copies:
            return {}
        added = len(self.rows) - len(self.originals)
        return {"added": added, "left_out": self.copies * len(self.originals) - added}

    @property
    def origins(self) -> Integers:
        """The number of the original of each row."""
        return self._column("origin") if self.copies else np.arange(len(self.rows))

    @property
    def originals(self) -> Integers:
        """The places of the rows that are no augmented copies."""
        return np.sort(np.unique(self.origins, return_index=True)[1])

    def _column(self, name: str) -> Integers:
        column = self.rows.data.column(name).to_numpy()
        whole: Integers = column if column.dtype.kind == "f" else column.astype(np.int64)  # scores of a regression stay
        chosen: pa.Table | None = self.rows._indices  # noqa: SLF001  # the public way takes a second for 100,000 chosen rows
        return whole if chosen is None else whole[chosen.column(0).to_numpy()]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the sources that are mixed."""

    source: Source
    wanted: Wanted
    opened: Opened


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A source that was read, and the rows to take from it in their order."""

    part: Part
    table: Table
    rows: Integers

    def labels(self) -> list[Any]:
        """The chosen rows' labels as they stand in the source."""
        if self.table.labels is None:
            return [None] * len(self.rows)
        if isinstance(self.table.labels, list):
            return [self.table.labels[row] for row in self.rows]
        found: list[Any] = self.table.labels.take(pa.array(self.rows)).to_pylist()
        return found


def choose(parts: Sequence[Part]) -> list[Chosen]:
    """Read the sources and choose their rows. Mixed by weight, they give the largest mixture that repeats no row."""
    tables = [part.opened.read() for part in parts]
    draws = [np.random.Generator(np.random.PCG64(part.source.sample_seed)) for part in parts]
    chosen: list[Integers] = []
    for part, table, draw in zip(parts, tables, draws, strict=True):
        wanted = part.source.sample_rows
        if wanted is not None and wanted > len(table):
            raise part.wanted.fail("sample_rows", f"{wanted:,} rows are asked of {part.source.path}, which has {len(table):,}")
        drawn = np.arange(len(table)) if wanted is None else np.sort(draw.choice(len(table), wanted, replace=False))
        chosen.append(drawn[: part.source.first_rows])
    weights = [Fraction(str(part.source.weight)) for part in parts if part.source.weight is not None]
    if weights:
        rows_of_weight_1 = min(Fraction(len(rows)) / weight for rows, weight in zip(chosen, weights, strict=True))
        counts = [math.floor(weight * rows_of_weight_1) for weight in weights]
        chosen = [np.sort(d.choice(rows, n, replace=False)) for d, rows, n in zip(draws, chosen, counts, strict=True)]
    return [Chosen(part=p, table=t, rows=rows) for p, t, rows in zip(parts, tables, chosen, strict=True)]


# --- tokenising into the cache -------------------------------------------------------------------------------------


class Encoder(Protocol):
    """Turns the texts of rows into what a model of one task is trained on."""

    @property
    def identity(self) -> Any:
        """All that shapes its output, as JSON."""

    @property
    def features(self) -> Mapping[str, Any]:
        """The columns it gives."""

    def encode(self, rows: Mapping[str, list[Any]], source: Chosen) -> Encoded:
        """The columns of the rows that can be used, and for each row what is wrong with it. Called in other threads."""

    @property
    def threads(self) -> int:
        """In how many threads at once."""


class Texts:
    """The encoder of classification: a text, or a pair of texts, cut to a number of tokens."""

    threads = 2
    """The tokenizer uses all cores but for a twelfth of its time, when it hands its tokens to Python, one thread at a time."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        self.limit = min(recipe.data.max_length or limit, limit)

    @property
    def identity(self) -> Any:
        """The tokenizer and the longest input."""
        return [tokenizer_digest(self.tokenizer), self.limit]

    @property
    def features(self) -> Mapping[str, Any]:
        """input_ids, labels, length, and token_type_ids where the tokenizer gives them."""
        ids, number = datasets.List(datasets.Value("int32")), datasets.Value("int64")
        label = datasets.Value("float32") if self.recipe.regression else number
        types = {"token_type_ids": datasets.List(datasets.Value("int8"))}
        found = {"input_ids": ids, "labels": label, "length": datasets.Value("int32")}
        return found | (types if "token_type_ids" in self.tokenizer.model_input_names else {})

    def encode(self, rows: Mapping[str, list[Any]], source: Chosen) -> tuple[dict[str, list[Any]], list[Bad | None]]:  # noqa: ARG002  # the signature of Encoder
        """Tokenise; a row that gives no tokens is a bad one."""
        texts = [rows[name] for name in ("0", "1") if name in rows]
        special = self.tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
        if self.limit <= special:
            raise self.recipe.error("data.max_length", f"{self.limit} leaves no room beside {special} special tokens")
        tokens = self._tokens(texts)
        lengths = list(map(len, tokens["input_ids"]))
        columns = {**tokens, "labels": rows["labels"], "length": lengths}
        problems = [None if length else Bad(reason=NO_TOKENS) for length in lengths]
        return kept(columns, problems), problems

    def _tokens(self, texts: Sequence[list[str]]) -> Mapping[str, list[list[int]]]:
        """input_ids, and token_type_ids where the tokenizer gives them, as a call of it gives them.

        Its backend is asked for them alone: masks, offsets and the objects that hold them take longer.
        """
        how = {"truncation": True, "max_length": self.limit, "return_attention_mask": False}
        first = self.tokenizer(*(column[:1] for column in texts), **how)  # which tells the backend where to cut
        rows = texts[0] if len(texts) == 1 else list(zip(*texts, strict=True))
        found = self.tokenizer.backend_tokenizer.encode_batch_fast(rows)
        tokens = {"input_ids": [encoding.ids for encoding in found]}
        if "token_type_ids" in first:
            tokens["token_type_ids"] = [encoding.type_ids for encoding in found]
        if any(tokens.get(name, [])[:1] != ids for name, ids in first.items()):  # a tokenizer that does more than its backend
            return dict(self.tokenizer(*texts, **how))
        return tokens


def kept(columns: Mapping[str, list[Any]], problems: Sequence[Bad | None]) -> dict[str, list[Any]]:
    """The columns without the rows that have a problem."""
    if not any(problems):
        return dict(columns)
    return {name: [v for v, bad in zip(vs, problems, strict=True) if bad is None] for name, vs in columns.items()}


def refusal(recipe: Recipe, dropped: Counter[str], paths: str, listed: Sequence[str]) -> UserError:
    """The error of rows that cannot be used, some of which are `listed`."""
    count, more = dropped.total(), dropped.total() - _LISTED
    which = f"{count:,} rows" if count > 1 else "1 row"
    unlisted = f" ({more:,} more than the {_LISTED} above)" if more > 0 else ""
    hint = "to leave such rows out, and have them counted, set data.on_bad_rows: drop"
    told = recipe.error("data.on_bad_rows", f"{which} of {paths} cannot be used{unlisted}; {hint}")
    return UserError(*listed, str(told))


def usable(
    chosen: Chosen, rows: Integers, numbers: list[int | Bad], encoder: Encoder
) -> tuple[dict[str, list[Any]], list[tuple[str, Bad]]]:
    """Some rows of a source, tokenised, as columns with their numbers in the source; and the others, with their places."""
    texts = [_take(column, rows) for column in chosen.table.texts]
    good, bad = _sorted_out(chosen, rows.tolist(), texts, numbers)
    if not good["row"]:
        return {"row": []}, bad
    columns, problems = encoder.encode(good, chosen)
    bad += [(_place(chosen, row), p) for row, p in zip(good["row"], problems, strict=True) if p is not None]
    return {**columns, "row": kept(good, problems)["row"]}, bad


class Preparation:
    """Turns sources into rows on disk, with one encoder."""

    def __init__(self, recipe: Recipe, encoder: Encoder) -> None:
        self.recipe, self.encoder = recipe, encoder
        self.drop = recipe.data.on_bad_rows == "drop"

    def __call__(
        self, name: str, parts: Sequence[Part], labels: Labels | None, augmenter: Augmenter | None = None
    ) -> tuple[Prepared, Labels]:
        key = self._key(parts, labels, augmenter)
        folder, info, reused = cached(key, lambda beside: self._write(beside, parts, labels, augmenter))
        described = [
            {"path": part.source.path, "revision": part.opened.revision, **counts}
            for part, counts in zip(parts, info["sources"], strict=True)
        ]
        prepared = Prepared(
            name=name,
            rows=datasets.Dataset.from_file(str(folder / "rows.arrow")),
            dropped=info["dropped"],
            truncated=info["truncated"],
            source=described,
            key=key,
            reused=reused,
            written=info.get("written", {}),
            copies=augmenter.copies if augmenter else 0,
        )
        return prepared, labels or Labels(names=info["label_names"], declared=False)

    def _key(self, parts: Sequence[Part], labels: Labels | None, augmenter: Augmenter | None) -> str:
        chosen = ("format", "first_rows", "sample_rows", "sample_seed", "weight")
        settings = {
            "format": FORMAT,
            "encoder": self.encoder.identity,
            "drop": self.drop,
            "labels": [labels.names, labels.declared, labels.renamed] if labels else None,
            "sources": [
                [part.opened.identity, part.opened.names, *part.wanted.identity]
                + [getattr(part.source, name) for name in chosen]
                for part in parts
            ],
        }
        if augmenter:
            settings["augmentation"] = augmenter.identity
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]

    def _write(self, folder: Path, parts: Sequence[Part], labels: Labels | None, augmenter: Augmenter | None) -> dict[str, Any]:
        chosen = choose(parts)
        labels = labels or labelling.found(self.recipe, [c.labels() for c in chosen])
        number = datasets.Value("int64")
        features = {**self.encoder.features, "row": number, **({"origin": number} if augmenter else {})}
        schema = datasets.Features(features).arrow_schema
        dropped, listed, written, truncated = Counter[str](), list[str](), 0, 0
        with (folder / "rows.arrow").open("wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
            for columns, bad in self._rows(chosen, labels, augmenter):
                for place, problem in bad:
                    dropped[problem.reason] += 1
                    if len(listed) < _LISTED:
                        listed.append(f"{place}: {problem}")
                if (self.drop or not dropped) and columns["row"]:
                    truncated += sum(columns.pop("truncated", ()))
                    writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
                    written += len(columns["row"])
            writer.close()
            stream.flush()
            os.fsync(stream.fileno())
        paths = ", ".join(c.part.source.path for c in chosen)
        if dropped and not self.drop:
            raise refusal(self.recipe, dropped, paths, listed)
        if not written:
            why = "; ".join(f"{reason}: {count:,}" for reason, count in dropped.items())
            raise chosen[0].part.wanted.fail("path", f"no rows are left of {paths}{f' ({why})' if why else ''}")
        counts = [{"rows": len(c.table), "taken": len(c.rows)} for c in chosen]
        found = {"label_names": labels.names, "rows": written, "dropped": dropped, "truncated": truncated}
        return {**found, "sources": counts}

    def _rows(
        self, chosen: Sequence[Chosen], labels: Labels, augmenter: Augmenter | None
    ) -> Iterator[tuple[dict[str, list[Any]], list[tuple[str, Bad]]]]:
        """Batches of tokenised rows, each with the rows that cannot be used. After one such, tokenising may be in vain."""
        failed, originals = False, 0
        worker = ThreadPoolExecutor(self.encoder.threads)
        try:
            for (part, good, bad), encoding in self._ahead(self._checked(chosen, labels), worker):
                if failed or encoding is None:
                    failed = failed or bool(bad and not self.drop)
                    yield {"row": []}, bad
                    continue
                columns, problems = encoding.result()
                bad += [(_place(part, row), p) for row, p in zip(good["row"], problems, strict=True) if p is not None]
                failed = bool(bad and not self.drop)
                left = kept(good, problems)
                columns["row"] = left["row"]
                if augmenter:
                    columns["origin"] = list(range(originals, originals + len(left["row"])))
                    originals += len(left["row"])
                yield columns, bad
                if augmenter and (copies := _copies({**left, "origin": columns["origin"]}, augmenter))["row"]:
                    columns, problems = worker.submit(self.encoder.encode, copies, part).result()
                    yield {**columns, **{name: kept(copies, problems)[name] for name in ("row", "origin")}}, []
        finally:
            worker.shutdown(cancel_futures=True)  # after a stop nothing more is tokenised

    @staticmethod
    def _checked(chosen: Sequence[Chosen], labels: Labels) -> Iterator[Checked]:
        """Batches of rows that may be tokenised, each with those that cannot be used."""
        for part in chosen:
            numbers = labels.numbers(part.labels(), part.part.opened, part.part.wanted)
            for start in range(0, len(part.rows), _BATCH):
                rows = part.rows[start : start + _BATCH]
                texts = [_take(column, rows) for column in part.table.texts]
                yield part, *_sorted_out(part, rows.tolist(), texts, numbers[start : start + _BATCH])

    def _ahead(
        self, batches: Iterator[Checked], worker: ThreadPoolExecutor
    ) -> Iterator[tuple[Checked, Future[Encoded] | None]]:
        """The batches in their order, each with what becomes of it in other threads; None where nothing is to be tokenised."""
        waiting: deque[tuple[Checked, Future[Encoded] | None]] = deque()
        failed = begun = False
        for part, good, bad in batches:
            failed = failed or bool(bad and not self.drop)
            use = good["row"] and not failed
            encoding = worker.submit(self.encoder.encode, good, part) if use else None
            if encoding is not None and not begun:
                wait([encoding])  # it sets where the tokenizer cuts; tokenizers before 0.23 may refuse that while they tokenise
                begun = True
            waiting.append(((part, good, bad), encoding))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
        yield from waiting


def _copies(rows: Mapping[str, list[Any]], augmenter: Augmenter) -> dict[str, list[Any]]:
    """The augmented copies of usable rows, as columns like theirs."""
    fields = [name for name in ("0", "1") if name in rows]
    copies: dict[str, list[Any]] = {name: [] for name in rows}
    for place, texts in enumerate(zip(*(rows[name] for name in fields), strict=True)):
        for copy in augmenter.copies_of(texts):
            new = dict(zip(fields, copy, strict=True))
            for name, column in copies.items():
                column.append(new.get(name, rows[name][place]))
    return copies


def _take(column: pa.ChunkedArray, rows: Integers) -> list[str | None]:
    first, last = int(rows[0]), int(rows[-1])  # in order: a slice first, for `take` copies whole chunks
    taken: list[str | None] = column.slice(first, last - first + 1).take(pa.array(rows - first)).to_pylist()
    return taken


def _sorted_out(
    chosen: Chosen, rows: list[int], texts: list[list[str | None]], numbers: list[int | Bad]
) -> tuple[dict[str, list[Any]], list[tuple[str, Bad]]]:
    """The usable rows as columns, and the others with their places."""
    names, broken = chosen.part.wanted.texts, chosen.table.broken
    keys = ["row", "labels", *map(str, range(len(texts)))]
    if Bad not in set(map(type, numbers)) and broken.keys().isdisjoint(rows) and all(map(_all_usable, texts)):
        return dict(zip(keys, (rows, numbers, *texts), strict=True)), []
    good: list[tuple[Any, ...]] = []
    bad: list[tuple[str, Bad]] = []
    for row, number, *fields in zip(rows, numbers, *texts, strict=True):
        problem = broken.get(row) or next((p for p in map(_text_problem, fields, names) if p), None)
        if problem is None and isinstance(number, Bad):
            problem = number
        if problem is None:
            good.append((row, number, *fields))
        else:
            bad.append((_place(chosen, row), problem))
    return dict(zip(keys, map(list, zip(*good, strict=True)) if good else [[] for _ in keys], strict=True)), bad


def _all_usable(texts: list[str | None]) -> bool:
    """Whether none of the texts has a problem: as `_text_problem`, and ten times as fast."""
    return all(text and not text.isspace() and len(text) <= LONGEST_TEXT for text in texts)


def _text_problem(text: str | None, column: str) -> Bad | None:
    if text is None:
        return Bad(reason=TEXT_MISSING, detail=f"column {column!r}")
    if not text.strip():
        return Bad(reason=TEXT_EMPTY, detail=f"column {column!r}")
    if len(text) > LONGEST_TEXT:
        return Bad(reason=TEXT_LONG, detail=f"{len(text):,} in column {column!r}")
    return None


def _place(chosen: Chosen, row: int) -> str:
    lines = chosen.table.lines
    return f"{chosen.part.source.path}{f':{lines[row]}' if lines else ''}: row {row + 1}"


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """The same for tokenizers that give the same tokens."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()  # the last call's, and set anew by each
    backend.no_padding()
    rest = [tokenizer.truncation_side, *tokenizer.model_input_names, version("tokenizers"), version("transformers")]
    return hashlib.sha256("\n".join([backend.to_str(), *rest]).encode()).hexdigest()
