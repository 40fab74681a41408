"""Checkpoints on disk: a directory is one when its manifest stands in it and its files are those of the manifest."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scalepeft.fetch import file_sha256

MANIFEST = "checkpoint.json"
FORMAT = 1
"""Of the manifest and of the files beside it: another number is another program's checkpoint."""

_NAME = re.compile(r"checkpoint-(\d+)")
_OF_PROCESS = re.compile(r"(?:^process_|^engine_|zero_pp_rank_)(\d+)")
"""Beginnings of the names of files that each process writes for itself, before its number."""


def beside(run: Path, step: int) -> Path:
    """Where a checkpoint is written before it has its name."""
    return run / f"checkpoint-{step}.part"


def digests(folder: Path, process: int) -> dict[str, dict[str, Any]]:
    """The size and the sha256 of each file that a process wrote into a folder, flushed to the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _writer(path) == process]
    return {path.relative_to(folder).as_posix(): _digest(path, flush=True) for path in files}


def _writer(path: Path) -> int:
    found = _OF_PROCESS.search(path.name)
    return int(found[1]) if found else 0


def _digest(path: Path, *, flush: bool = False) -> dict[str, Any]:
    with path.open("rb") as file:
        found = file_sha256(file)
        if flush:
            os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "sha256": found}


def publish(run: Path, step: int, manifest: Mapping[str, Any]) -> Path:
    """Give a checkpoint that is whole on the disk its manifest and its name, in that order; nothing sees half of it.

    `manifest` holds `files`, as `digests` gives them, and what else resuming must know.
    """
    written, published = beside(run, step), run / f"checkpoint-{step}"
    with (written / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "step": step, **manifest}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for folder in (written, *(path for path in written.rglob("*") if path.is_dir())):
        _flush_names(folder)
    if published.exists():  # a damaged one, which was not resumed from
        retire(published)
    written.rename(published)
    _flush_names(run)
    return published


def _flush_names(folder: Path) -> None:
    """Make what a folder's entries are called last: a rename is no more durable than the folder it is in."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def retire(checkpoint: Path) -> None:
    """Delete a checkpoint: first its name, so that a crash leaves no half of it under that."""
    gone = checkpoint.with_name(f"{checkpoint.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def rotate(run: Path, limit: int | None, best: str | None) -> None:
    """Retire the oldest checkpoints but so many; the last and the best one stay. No limit, or 0, retires none."""
    found = named(run)
    kept = {*found[-1:], *([Path(best)] if best else [])}
    surplus = len(found) - max(limit, len(kept)) if limit else 0
    for checkpoint in [path for path in found if path not in kept][: max(surplus, 0)]:
        retire(checkpoint)


def named(run: Path) -> list[Path]:
    """The directories of a run that are called checkpoint-N and have a manifest, by step."""
    found = [p for p in run.glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=step_of)


def leftovers(run: Path) -> list[Path]:
    """What a crash left of checkpoints that were written or retired."""
    return sorted(set(run.glob("checkpoint-*")) - set(named(run)))


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(checkpoint.name.rpartition("-")[2])


def manifest(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's manifest; empty when it cannot be read or is of another format."""
    try:
        found = json.loads((checkpoint / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("format") == FORMAT else {}


def flaw(checkpoint: Path, *, contents: bool = False) -> str | None:
    """What keeps a checkpoint from being used; None when it is whole. Sizes are compared, and contents when asked."""
    found = manifest(checkpoint)
    if not found:
        return f"{MANIFEST} cannot be read"
    for name, kept in found["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != kept["size"]:
            return f"{name} has {path.stat().st_size} bytes, not {kept['size']}"
    if not contents:
        return None
    with ThreadPoolExecutor() as threads:  # hashing leaves the interpreter to others
        read = zip(found["files"], threads.map(_digest, [checkpoint / name for name in found["files"]]), strict=True)
        changed = [name for name, digest in read if digest != found["files"][name]]
    return f"{changed[0]} does not hold what was saved" if changed else None
