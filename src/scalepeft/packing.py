"""Packed rows: several documents in a row of training, none of which sees another."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from scalepeft.entries import cached
from scalepeft.prepared import Prepared

FORMAT = 1
"""Part of every key: to be raised when a change of this module packs the same rows otherwise."""


def pack(prepared: Prepared, *, length: int, strategy: str) -> Prepared:
    """The rows of a set packed into rows of at most `length` tokens by TRL's best-fit decreasing, from the cache or now.

    Each has seq_lengths, the tokens of its documents, from which the collator restarts positions. The first token of a
    document carries no label, so that none is predicted from the document before.
    """
    told = json.dumps([FORMAT, prepared.key, length, strategy])
    key = hashlib.sha256(told.encode()).hexdigest()[:32]
    folder, info, reused = cached(key, lambda beside: _write(beside, prepared, length, strategy))
    rows = datasets.Dataset.from_file(str(folder / "rows.arrow"))
    return replace(prepared, rows=rows, key=key, reused=prepared.reused and reused, documents=info["documents"])


def _write(folder: Path, prepared: Prepared, length: int, strategy: str) -> dict[str, Any]:
    from trl.data_utils import pack_dataset

    rows = prepared.rows.select_columns(["input_ids", "labels"])
    packed = pack_dataset(rows, length, strategy, {"keep_in_memory": True}).with_format("arrow")
    table = packed[:].combine_chunks()
    lengths = pa.array([sum(documents) for documents in table.column("seq_lengths").to_pylist()], pa.int32())
    table = table.append_column("length", lengths)
    features = {**packed.features, "length": datasets.Value("int32")}
    schema = datasets.Features({name: features[name] for name in table.column_names}).arrow_schema
    with (folder / "rows.arrow").open("wb") as stream, pa.ipc.new_stream(stream, schema) as writer:
        writer.write_table(table.cast(schema), max_chunksize=1_000)
    return {"rows": len(table), "documents": len(rows)}
