"""The processes of one launch: they start alike or not at all, and the error of one ends them all and is told once."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

from scalepeft.errors import RunFailed, ScalepeftError, Told, UserError

_POLL = 0.1  # seconds
_HEAD_START = 1.0
"""Seconds by which the other processes let rank 0 tell an error first: most are met by all of them."""
_TELLING = 5.0
"""Seconds within which an error that was claimed is printed."""

_meetings = itertools.count()


def rank() -> int:
    """The number of this process among those of the launch."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes the launch has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def agree(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Wait for all processes and compare what each of them sees; the facts of all, by rank.

    `facts` are JSON. Those under keys that begin with `_` are exchanged and not compared. Raises UserError, on every process,
    when two see different things: trained on, they would wait for each other or, worse, not. Ends early when one has failed.
    """
    own = dict(facts)
    if processes() == 1:
        return [own]
    store, meeting = _store(), next(_meetings)
    keys = [f"facts/{meeting}/{number}" for number in range(processes())]
    store.set(keys[rank()], json.dumps(own | {"_host": socket.gethostname()}))
    pause = _POLL / 100
    while not store.check(keys):  # not `wait`: another process may prepare rows for an hour, or have failed
        if store.check(["failed"]):
            raise Told(_status(store))
        time.sleep(pause)
        pause = min(2 * pause, _POLL)
    found: list[dict[str, Any]] = [json.loads(store.get(key)) for key in keys]
    problems = [
        f"process {number} ({there['_host']}) sees another {name} than process 0 ({found[0]['_host']}): "
        f"{_difference(found[0][name], there[name])}"
        for number, there in enumerate(found)
        for name in own
        if not name.startswith("_") and there[name] != found[0][name]
    ]
    if problems:
        more = [f"and {len(problems) - 3} more such differences"] if len(problems) > 3 else []
        raise UserError(*problems[:3], *more)
    return found


def _difference(first: Any, other: Any) -> str:
    """Where two facts differ, the other's value first."""
    if not isinstance(first, dict) or not isinstance(other, dict):
        return f"{other!r}, not {first!r}"
    names = [name for name in {**first, **other} if first.get(name) != other.get(name)]
    shown = [f"{name}: {other.get(name)!r}, not {first.get(name)!r}" for name in names[:3]]
    return "; ".join(shown) + (f"; {len(names) - 3} more" if len(names) > 3 else "")


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Of the errors of a launch's processes, tell the first, and end the others without a word.

    What follows from a process that ended (its peers lose their connection to it) is no error of its own. Raises Told.
    """
    if processes() == 1:
        yield
        return
    try:
        yield
    except Told:
        raise
    except Exception as error:
        status = error.exit_status if isinstance(error, ScalepeftError) else RunFailed.exit_status
        try:
            store = _store()
        except Exception:  # noqa: BLE001  # whatever keeps the store away, the error is to be told
            print(_shown(error), file=sys.stderr, flush=True)
            raise Told(status) from error
        if rank():
            _wait(store, "failed", _HEAD_START)
        if store.compare_set("failed", "", json.dumps([rank(), status])) == json.dumps([rank(), status]).encode():
            print(_shown(error), file=sys.stderr, flush=True)
            store.set("told", "")
        else:
            _wait(store, "told", _TELLING)  # the launcher ends all processes when this one leaves
            status = _status(store)
        raise Told(status) from error


def _shown(error: Exception) -> str:
    """An error as it is told: a line, or the traceback of what is a bug. Of another rank than 0, with its number."""
    where = f"process {rank()} ({socket.gethostname()}): " if rank() else ""
    if isinstance(error, ScalepeftError):
        return f"{where}{error}"
    if "gloo/transport" in str(error) or type(error).__name__ in ("DistNetworkError", "DistStoreError", "DistBackendError"):
        return f"{where}another process of the launch is gone; the launcher tells which"
    return f"{where}{''.join(traceback.format_exception(error)).rstrip()}"


def failed() -> bool:
    """Whether a process of the launch has failed, this one or another, or the launcher, which knows, is gone."""
    if processes() == 1:
        return False
    try:
        return bool(_store().check(["failed"]))
    except RuntimeError:  # torch's errors of the store
        return True


def _wait(store: Any, key: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not store.check([key]) and time.monotonic() < until:
        time.sleep(_POLL)


def _status(store: Any) -> int:
    """The exit status of the process that failed first."""
    return int(json.loads(store.get("failed"))[1])


@functools.cache
def _store() -> Any:
    """The launcher's store of keys, which outlives every process of the launch."""
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    store, _, _ = next(iter(rendezvous("env://", timeout=dt.timedelta(seconds=60))))
    return PrefixStore("scalepeft", store)
