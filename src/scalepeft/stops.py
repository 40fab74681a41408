"""Requests to stop: signals to a process, and the file STOP in a run directory."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from scalepeft.console import speaks

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; what schedulers send before they kill; what they send when they are told to warn early."""

STOP = "STOP"
"""Put into a run directory it stops the training there, as a signal would; it is taken away when it is heeded."""
INTERRUPTED = "INTERRUPTED"
"""Stands in the directory of a run that left on request and goes on with the same command; holds STOP when that file asked."""

_ECHO = 1.0
"""Seconds within which a second SIGINT of a launched process is the same Ctrl-C, come by two ways: schedulers signal every
process of a step, and launchers pass on what they get themselves."""
_LOOK = 1.0
"""Seconds between two looks for the file STOP: on a shared file system each is a question to a server."""


class Stop:
    """What this process was asked for. As a context it hears signals; the one that installed them before is put back after.

    A signal sets `requested`. After `interrupt` it also raises KeyboardInterrupt, wherever the program is; after `remember` it
    does not, and training sees to it when its step is done.
    """

    def __init__(self) -> None:
        self.requested = False
        self._interrupts = self.remembers = False
        self._at_once: Callable[[], None] = lambda: None
        self._to: Callable[[int], None] | None = None
        self._first = 0.0
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:  # noqa: PYI034  # typing has Self from Python 3.11 on
        if threading.current_thread() is threading.main_thread():  # no other may
            self._previous = {number: signal.signal(number, self._hear) for number in SIGNALS}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # held back by `held_back`
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def interrupt(self) -> None:
        """Let signals interrupt the program from now on. Raises KeyboardInterrupt when one has come already."""
        self._interrupts = True
        if self.requested:
            raise KeyboardInterrupt

    def remember(self, at_once: Callable[[], None]) -> None:
        """Let signals wait from now on until somebody asks for `requested`; a second Ctrl-C calls `at_once` and ends it all."""
        self._interrupts, self.remembers, self._at_once = False, True, at_once

    @contextlib.contextmanager
    def passed_on(self, to: Callable[[int], None]) -> Iterator[None]:
        """Let signals go to somebody else."""
        self._to = to
        try:
            yield
        finally:
            self._to = None

    def _hear(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # as Python calls a handler
        if os.getpid() != self._process:  # a process that was forked from this one, which sees to it
            return
        if self._to is not None:
            self.requested = True
            self._to(number)
            return
        echo = _ECHO if "RANK" in os.environ else 0.0
        again = number == signal.SIGINT and self._first > 0 and time.monotonic() - self._first > echo
        if number == signal.SIGINT and not self._first:
            self._first = time.monotonic()
        told, self.requested = self.requested, True
        if self._interrupts and not told:  # else it is on its way out already
            raise KeyboardInterrupt
        if self.remembers and again:
            self._at_once()
            os._exit(130)
        if self.remembers and not told:
            hint = "; Ctrl-C again leaves at once" if number == signal.SIGINT else ""
            _tell(f"\nfinishing this step, then saving{hint}\n")


def _tell(text: str) -> None:
    if speaks():
        os.write(2, text.encode())  # print is not to be entered twice, and it may be what was interrupted


def held_back() -> None:
    """Hold signals back until another program, in the place of this process, hears them as a Stop."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def left_to_the_parent(worker: int = 0) -> None:  # noqa: ARG001  # as torch's DataLoader calls it
    """Ignore signals in a process that reads rows: launchers send theirs to it, too, and without it the last step fails."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopFile:
    """The file STOP of a run."""

    def __init__(self, run: Path) -> None:
        self.path = run / STOP
        self._looked = -_LOOK

    def there(self) -> bool:
        """Whether it is there, by a look that is at most a second old."""
        now = time.monotonic()
        if now - self._looked < _LOOK:
            return False
        self._looked = now
        return self.path.exists()

    def heeded(self) -> None:
        """Take it away: the next start shall not be stopped by it."""
        self.path.unlink(missing_ok=True)


def mark(run: Path, *, by_file: bool = False) -> None:
    """Leave the marker INTERRUPTED, and the directory where there is none yet."""
    run.mkdir(parents=True, exist_ok=True)
    (run / INTERRUPTED).write_text(STOP if by_file else "", encoding="utf-8")


def marked_by_file(run: Path) -> bool:
    """Whether it was the file STOP, so a person, that stopped the run."""
    try:
        return (run / INTERRUPTED).read_text(encoding="utf-8") == STOP
    except FileNotFoundError:
        return False
