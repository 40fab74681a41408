"""Entries of the cache of prepared rows: a folder each, which one process writes, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from scalepeft.errors import UserError, disk_full, one_line
from scalepeft.fetch import cache_dir


def cached(key: str, write: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any], bool]:
    """An entry of the cache, written by one process when it is not there: its folder, its info.json and whether it was there.

    `write` is given a folder beside, puts rows.arrow into it and returns what info.json shall say.
    """
    folder = cache_dir() / "prepared" / key
    info = _complete(folder)
    reused = info is not None
    if info is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{key}.lock"):
                info = _complete(folder)  # another process was at it
                reused = info is not None
                info = info or _bring(folder, write)
        except OSError as error:
            reason = "the disk is full" if disk_full(error) else one_line(error)
            raise UserError(f"{folder}: cannot be written: {reason}; set SCALEPEFT_CACHE to another folder") from error
    return folder, info, reused


def _bring(folder: Path, write: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that died: the lock is ours
        shutil.rmtree(leftover)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    beside.mkdir()
    try:
        info = write(beside)
        info["bytes"] = (beside / "rows.arrow").stat().st_size
        info["written"] = {"host": socket.gethostname(), "id": uuid.uuid4().hex}
        with (beside / "info.json").open("w", encoding="utf-8") as stream:
            json.dump(info, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        if folder.exists():  # and not complete
            shutil.rmtree(folder)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return info


def _complete(folder: Path) -> dict[str, Any] | None:
    """What an entry of the cache says about itself; None when it is absent or damaged."""
    with suppress(OSError, ValueError, KeyError):
        info: dict[str, Any] = json.loads((folder / "info.json").read_text(encoding="utf-8"))
        if (folder / "rows.arrow").stat().st_size == info["bytes"]:
            return info
    return None
