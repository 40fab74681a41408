"""Where rows come from: files, saved folders, the Hub.

A source is first opened, which only finds out what its content is, and read when that content is not prepared already.
Files are not read through `load_dataset`: its reader turns the texts "null", "NA" and "None" into nulls in silence.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from scalepeft.errors import UserError, did_you_mean, one_line
from scalepeft.fetch import DATA_SUFFIXES, PREFIX, asset_path, file_sha256, is_local
from scalepeft.recipe import Source
from scalepeft.tables import Bad, Fail, Opened, Records, Table, Wanted, shown

BAD_BYTES = "text holds bytes that are not UTF-8"
NOT_TEXT = "text is not a string"
RAGGED = "number of fields differs from the header's"
NOT_JSON = "line is not a JSON object"

_CHUNK = 10_000  # rows turned into Arrow at a time, so that a file in memory costs little more than its bytes


def open_source(source: Source, wanted: Wanted) -> Opened:
    """Find a source and what its content is."""
    fail = wanted.fail
    if source.path.startswith(PREFIX):
        try:
            path = asset_path(source.path)
        except UserError as error:
            raise fail("path", str(error)) from None
    else:
        path = Path(source.path).expanduser()
    if path.is_dir():
        return _open_saved(source, path, wanted)
    if not path.exists() and not is_local(source.path):
        return _open_hub(source, wanted)
    if not path.exists():
        raise fail("path", f"{path} does not exist")
    suffix = path.suffix.lower()
    if suffix not in DATA_SUFFIXES:
        raise fail("path", f"{path} ends in {suffix!r}; a data file ends in {', '.join(DATA_SUFFIXES)}")
    for key in ("split", "name", "revision"):
        if getattr(source, key) is not None:
            raise fail(key, f"{path} is a file, and a file has no {key}; leave {key} out")
    return _open_file(source, path, suffix, wanted)


def _open_file(source: Source, path: Path, suffix: str, wanted: Wanted) -> Opened:
    try:
        with path.open("rb") as stream:
            start = stream.read(2)
            stream.seek(0)
            sha256 = file_sha256(stream)
    except OSError as error:
        raise wanted.fail("path", f"{path} cannot be read: {error.strerror}") from None
    if suffix != ".parquet" and start in (b"\xff\xfe", b"\xfe\xff"):
        raise wanted.fail("path", f"{path} is written in UTF-16; save it as UTF-8")
    names = None
    if suffix == ".parquet":
        with _parquet_errors(path, wanted):
            schema = pq.read_schema(path)
        wanted.label_in(schema.names)
        names = class_names(datasets.Features.from_arrow_schema(schema), wanted)
    readers: dict[str, Callable[[Path, Wanted], Table]] = {
        ".csv": partial(_read_csv, delimiter=","),
        ".tsv": partial(_read_csv, delimiter="\t"),
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
    }
    read = partial(readers[suffix], path, wanted)
    return Opened(path=source.path, identity=f"{suffix} {sha256}", revision=sha256, names=names, read=read)


# --- text files ----------------------------------------------------------------------------------------------------


class _Columns:
    """Collects the rows of a text file as Arrow columns."""

    def __init__(self, texts: int, *, labelled: bool) -> None:
        self._waiting: list[list[str | None]] = [[] for _ in range(texts)]
        self._chunks: list[list[pa.Array]] = [[] for _ in range(texts)]
        self._labels: list[Any] | None = [] if labelled else None
        self._seen: dict[Any, Any] = {}
        self._lines = array("q")
        self._broken: dict[int, Bad] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, texts: Sequence[Any], label: object, line: int, bad: Bad | None = None) -> None:
        row = len(self._lines)
        self._lines.append(line)
        for waiting, text in zip(self._waiting, texts, strict=True):
            if text is not None and not isinstance(text, str):
                bad = bad or Bad(reason=NOT_TEXT, detail=shown(text))
            waiting.append(text if isinstance(text, str) else None)
        if self._labels is not None:
            known = isinstance(label, str)  # equal labels become one object; True, 1 and 1.0 would be mixed up
            self._labels.append(self._seen.setdefault(label, label) if known else label)
            if isinstance(label, str) and not _encodable(label):
                bad = bad or Bad(reason=BAD_BYTES, detail="in the label")
        if bad:
            self._broken[row] = bad
        if len(self._waiting[0]) >= _CHUNK:
            self._flush()

    def extend(self, texts: Sequence[Sequence[str]], labels: Sequence[str] | None, lines: Iterable[int]) -> None:
        """Rows in which everything is a string, by columns."""
        known = dict(zip(labels, labels, strict=True)) if labels is not None else {}
        if not all(map(_encodable, known)):
            for *fields, label, line in zip(*texts, labels or (), lines, strict=True):
                self.add(fields, label, line)
            return
        self._lines.extend(lines)
        for waiting, column in zip(self._waiting, texts, strict=True):
            waiting.extend(column)
        if self._labels is not None and labels is not None:
            self._seen |= {label: label for label in known if label not in self._seen}
            self._labels.extend(map(self._seen.__getitem__, labels))
        if len(self._waiting[0]) >= _CHUNK:
            self._flush()

    def _flush(self) -> None:
        first = len(self._lines) - len(self._waiting[0])
        for waiting, chunks in zip(self._waiting, self._chunks, strict=True):
            try:
                chunks.append(pa.array(waiting, pa.large_string()))
            except UnicodeEncodeError:  # surrogates stand for undecodable bytes
                for offset, text in enumerate(waiting):
                    if text is not None and not _encodable(text):
                        waiting[offset] = None
                        self._broken.setdefault(first + offset, Bad(reason=BAD_BYTES))
                chunks.append(pa.array(waiting, pa.large_string()))
            waiting.clear()

    def table(self, usual: Sequence[str]) -> Table:
        self._flush()
        texts = [pa.chunked_array(chunks, pa.large_string()) for chunks in self._chunks]
        lines = self._lines if any(self._lines) else None
        return Table(texts=texts, labels=self._labels, broken=self._broken, lines=lines, columns=usual)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_csv(path: Path, wanted: Wanted, *, delimiter: str) -> Table:
    (table,) = csv_tables(path, wanted, delimiter=delimiter)
    return table


def csv_tables(path: Path, wanted: Wanted, *, delimiter: str, rows: int | None = None) -> Iterator[Table]:
    """A text file of fields as tables of so many rows, the last with what is left; as one table when `rows` is None."""
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 131,072 characters is no property of the format
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        start = 1
        try:
            header = next(reader, [])
            if not header:
                raise wanted.fail("path", f"{path} is empty")
            label = wanted.label_in(header)
            label_at = header.index(label) if label is not None else None
            columns = _Columns(wanted.width, labelled=label_at is not None)
            nothing, width = [None] * wanted.width, len(header)
            good: list[list[str]] = []
            lines: list[int] = []

            def take() -> None:
                """Put the rows that are whole into the columns."""
                if good:
                    labels = [row[label_at] for row in good] if label_at is not None else None
                    columns.extend(wanted.fields(header, good), labels, lines)
                good.clear()
                lines.clear()

            start = reader.line_num + 1
            for row in reader:
                if len(row) == width:
                    good.append(row)
                    lines.append(start)
                elif row:  # an empty line is no row
                    detail = f"it has {len(row)} field{'s' * (len(row) != 1)}, the header has {width}"
                    take()
                    columns.add(nothing, None, start, Bad(reason=RAGGED, detail=detail))
                start = reader.line_num + 1
                if len(good) == _CHUNK or (rows is not None and len(columns) + len(good) == rows):
                    take()
                if rows is not None and len(columns) == rows:
                    yield columns.table(wanted.usual(header))
                    columns = _Columns(wanted.width, labelled=label_at is not None)
            take()
        except csv.Error as error:
            reason = "a quote is opened and not closed" if "unexpected end of data" in str(error) else one_line(error)
            raise wanted.fail("path", f"{path}:{start}: not {path.suffix[1:]}: {reason}, in the row that starts here") from None
    if rows is None or len(columns):
        yield columns.table(wanted.usual(header))


def _read_jsonl(path: Path, wanted: Wanted) -> Table:
    with path.open("rb") as stream:
        return _from_objects(_json_lines(stream), wanted)


def jsonl_tables(path: Path, wanted: Wanted, *, rows: int) -> Iterator[Table]:
    """A file of JSON lines as tables of so many rows, the last with what is left."""
    with path.open("rb") as stream:
        lines = _json_lines(stream)
        while chunk := list(itertools.islice(lines, rows)):
            yield _from_objects(chunk, wanted)


def parquet_tables(path: Path, wanted: Wanted, *, rows: int) -> Iterator[Table]:
    """A parquet file as tables of so many rows, the last with what is left."""
    with _parquet_errors(path, wanted):
        file = pq.ParquetFile(path)
        there = file.schema_arrow.names
        label = wanted.label_in(there)
        for batch in file.iter_batches(rows, columns=wanted.columns_in(there)):
            yield from_arrow(pa.Table.from_batches([batch]), label, wanted)


def _json_lines(stream: BinaryIO) -> Iterator[tuple[int, Any, Bad | None]]:
    for number, line in enumerate(stream, 1):
        text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if not text.strip():
            continue
        try:
            found = json.loads(text.decode("utf-8"))
        except UnicodeDecodeError:
            yield number, {}, Bad(reason=BAD_BYTES)
        except (ValueError, RecursionError) as error:
            yield number, {}, Bad(reason=NOT_JSON, detail=one_line(error))
        else:
            yield number, found, None


def _read_json(path: Path, wanted: Wanted) -> Table:
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise wanted.fail("path", f"{path} is not in UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        hint = "; one object a line is the format of .jsonl" if error.msg == "Extra data" else ""
        raise wanted.fail("path", f"{path}:{error.lineno}: not JSON: {error.msg}{hint}") from None
    except RecursionError:
        raise wanted.fail("path", f"{path}: nested too deeply") from None
    if isinstance(found, dict):
        lists = [value for value in found.values() if isinstance(value, list)]
        found = lists[0] if len(lists) == 1 else None
    if not isinstance(found, list):
        raise wanted.fail("path", f"{path} holds neither a list of objects nor an object with one list")
    return _from_objects(((0, item, None) for item in found), wanted)


def _from_objects(objects: Iterable[tuple[int, Any, Bad | None]], wanted: Wanted) -> Table:
    seen: dict[str, None] = {}
    columns = _Columns(wanted.width, labelled=True)
    for line, found, broken in objects:
        bad = broken
        item = found if isinstance(found, dict) else {}
        if item is not found:
            bad = bad or Bad(reason=NOT_JSON, detail=shown(found))
        seen |= dict.fromkeys(item)
        columns.add(wanted.row(item), item.get(wanted.label), line, bad)
    table = columns.table(wanted.usual(seen))
    if not seen and len(table):
        return table  # every row is broken, and says so
    label = wanted.label_in(seen)
    return table if label is not None else replace(table, labels=None)


# --- Arrow: parquet, saved folders and the Hub ---------------------------------------------------------------------


@contextmanager
def _parquet_errors(path: Path, wanted: Wanted) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise wanted.fail("path", f"{path} cannot be read as parquet: {one_line(error)}") from None


def _read_parquet(path: Path, wanted: Wanted) -> Table:
    there = pq.read_schema(path).names
    with _parquet_errors(path, wanted):
        table = pq.read_table(path, columns=wanted.columns_in(there))
    return from_arrow(table, wanted.label_in(there), wanted)


def from_arrow(table: pa.Table, label: str | None, wanted: Wanted) -> Table:
    """The wanted columns of an Arrow table."""
    if isinstance(wanted, Records):
        rows = (pa.array([wanted.row(item)[0] for item in b.to_pylist()], pa.large_string()) for b in table.to_batches(_CHUNK))
        return Table(texts=[pa.chunked_array(rows, pa.large_string())], labels=None, columns=wanted.usual(table.column_names))
    texts = []
    for name in wanted.texts:
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if pa.types.is_null(column.type):
            column = column.cast(pa.string())
        if column.type not in (pa.string(), pa.large_string(), pa.string_view()):
            raise wanted.fail("text_columns", f"the column {name!r} holds {column.type} and no text")
        texts.append(column)
    return Table(texts=texts, labels=table.column(label) if label is not None else None)


def class_names(features: datasets.Features, wanted: Wanted) -> list[str] | None:
    """The label names that a data set declares."""
    feature = features.get(wanted.label)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _open_saved(source: Source, path: Path, wanted: Wanted) -> Opened:
    for key in ("name", "revision"):
        if getattr(source, key) is not None:
            raise wanted.fail(key, f"{path} is a folder, and a folder has no {key}; leave {key} out")
    try:
        found = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        files = ", ".join(str(p) for p in sorted(path.iterdir()) if p.suffix in DATA_SUFFIXES)
        hint = f"; name one of its files: {files}" if files else ""
        raise wanted.fail("path", f"{path} is a folder that holds no saved data set (save_to_disk){hint}") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise wanted.fail("path", f"{path} cannot be read as a saved data set: {one_line(error)}") from None
    if isinstance(found, datasets.Dataset) and source.split is not None:
        raise wanted.fail("split", f"{path} is one saved data set without splits; leave split out")
    rows = found if isinstance(found, datasets.Dataset) else _one_split(found, source, wanted)
    digests = []
    for file in sorted({Path(f["filename"]) for f in rows.cache_files}):
        with file.open("rb") as stream:
            digests.append(file_sha256(stream))
    return _from_dataset(source, rows, " ".join(["saved", *digests, str(rows.features)]), " ".join(digests), wanted)


def _one_split(found: datasets.DatasetDict, source: Source, wanted: Wanted) -> datasets.Dataset:
    if source.split is None and len(found) == 1:
        return next(iter(found.values()))
    if source.split in found:
        return found[source.split]
    there = ", ".join(found)
    if source.split is None:
        raise wanted.fail("split", f"{source.path} has several splits; say which one: {there}")
    raise wanted.fail("split", f"there is no split {source.split!r}; the splits are {there}{did_you_mean(source.split, found)}")


def _open_hub(source: Source, wanted: Wanted) -> Opened:
    try:
        found = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # huggingface_hub raises its own errors, httpx's, datasets' and the system's
        raise hub_error(source, error, wanted.fail) from error
    rows = found if isinstance(found, datasets.Dataset) else _one_split(found, source, wanted)
    folders = {Path(f["filename"]).parent.name for f in rows.cache_files}
    commit = next((f for f in folders if re.fullmatch(r"[0-9a-f]{40}", f)), None)
    revision = commit or source.revision or rows._fingerprint  # noqa: SLF001  # there is no public name for it
    return _from_dataset(source, rows, f"hub {source.path} {rows._fingerprint}", revision, wanted)  # noqa: SLF001


def hub_error(source: Source, error: Exception, fail: Fail) -> UserError:
    """What keeps a data set of the Hub away, in one line."""
    text, cache = one_line(error), datasets.config.HF_DATASETS_CACHE
    if found := re.search(r'Unknown split "(.*?)"\. Should be one of \[(.*?)\]', text):
        split, there = found[1], re.findall(r"'(.*?)'", found[2])
        return fail("split", f"there is no split {split!r}; the splits are {', '.join(there)}{did_you_mean(split, there)}")
    if "Config name is missing" in text or "BuilderConfig" in text:
        there = re.findall(r"'(.*?)'", text.partition("vailable")[2])
        said = f"there is no configuration {source.name!r}" if source.name else f"{source.path} has several configurations"
        return fail("name", f"{said}; name one of {', '.join(there) or text}{did_you_mean(source.name or '', there)}")
    if isinstance(error, ConnectionError) or "Offline" in text:
        hint = "fetch it where there is a network: scalepeft fetch <recipe>"
        return fail("path", f"{source.path} is neither a file here, nor in {cache}, and the Hub cannot be reached; {hint}")
    return fail("path", f"{source.path} cannot be loaded from the Hub or from {cache}: {text}")


def _from_dataset(source: Source, rows: datasets.Dataset, identity: str, revision: str, wanted: Wanted) -> Opened:
    label = wanted.label_in(rows.column_names)

    def read() -> Table:
        plain = rows.select_columns(wanted.columns_in(rows.column_names))
        if plain._indices is not None:  # noqa: SLF001  # rows chosen by an index, which the Arrow table does not show
            plain = plain.flatten_indices()
        return from_arrow(plain.data.table, label, wanted)

    return Opened(path=source.path, identity=identity, revision=revision, names=class_names(rows.features, wanted), read=read)
