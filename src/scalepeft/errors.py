"""Every error a user can cause, and how a program ends on one.

ScalepeftError
├── UserError       the user's to mend: one line a problem, exit status 2
├── Interrupted     stopped on request with everything saved: exit status 130
├── RunFailed       the run itself went wrong (a reloaded adapter that answers differently): exit status 1
└── Told            another process of the launch has told it, or this one has: nothing more is printed
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Sequence


class ScalepeftError(Exception):
    """The base of all errors that end a command without a traceback."""

    exit_status = 1


class UserError(ScalepeftError):
    """Something the user can mend. Each problem is one line: where, what, what next."""

    exit_status = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Interrupted(ScalepeftError):
    """The run was stopped on request; the message says where it can go on."""

    exit_status = 130


class RunFailed(ScalepeftError):
    """The run finished but must not be trusted; the message says why."""


class Told(ScalepeftError):
    """The launch ends on an error that has been printed already."""

    def __init__(self, exit_status: int) -> None:
        super().__init__()
        self.exit_status = exit_status


def one_line(error: BaseException) -> str:
    """The message of a foreign exception as one line (upstream's often have several)."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def disk_full(error: BaseException) -> bool:
    """Whether an exception says that a disk is full. safetensors and pyarrow wrap the system's error into their own."""
    causes: BaseException | None = error
    while causes is not None:
        if isinstance(causes, OSError) and causes.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(causes) or "StorageFull" in str(causes):
            return True
        causes = causes.__cause__ or causes.__context__
    return False


def closest(word: str, candidates: Iterable[str]) -> list[str]:
    """The candidates nearest to a mistyped word, in the order given; empty when none is near.

    Nearness is the optimal string alignment distance, in which a dropped, doubled, replaced or swapped character each
    counts one; a third of the word's length (at least one, at most three) is still near.
    """
    limit = min(3, max(1, len(word) // 3))
    scored = [(d, c) for c in candidates if abs(len(c) - len(word)) <= limit and (d := _distance(word, c, limit)) <= limit]
    best = min((d for d, _ in scored), default=0)
    return [c for d, c in scored if d == best][:2]


def _distance(a: str, b: str, limit: int) -> int:
    """The optimal string alignment distance, or some number above the limit when that is exceeded."""
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        if min(row) > limit:  # no later row has a smaller number than the smallest of this one
            return min(row)
        before, previous = previous, row
    return previous[-1]


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no candidate is near."""
    near = closest(word, candidates)
    return f"; did you mean {' or '.join(repr(c) for c in near)}?" if near else ""


def program(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Run a command's main function and return its exit status, with errors as lines on stderr."""
    try:
        return main(sys.argv[1:] if arguments is None else arguments) or 0
    except Told as error:
        return error.exit_status
    except ScalepeftError as error:
        print(error, file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # `scalepeft ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
