"""A folder on its way: made beside its place by one process alone, and renamed when it is whole and proved."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scalepeft.errors import RunFailed, UserError, disk_full, one_line


def is_free(output: Path) -> bool:
    """Whether a folder can be made there: nothing is, or an empty folder. Raises UserError when it can never be."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give another --output")
    if output.exists() and any(output.iterdir()):
        return False
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.absolute().parent}")
    return True


@contextmanager
def writing(output: Path, plan: str, *, ours: tuple[str, ...] = ()) -> Iterator[Path]:
    """DIR.part for DIR, ours alone. What fails for good leaves nothing, what was interrupted is left to go on with.

    `plan` is the file by which such a folder is known for what it is, `ours` what may lie there before it does, besides
    files that are partial by their names.
    """
    from filelock import FileLock, Timeout

    part = output.with_name(f"{output.name}.part")
    found = [p.name for p in part.iterdir()] if part.exists() else []
    if plan not in found and any(name not in (".lock", *ours) and ".part" not in name for name in found):
        raise UserError(f"{part}: is in the way and of something else; move it, or give another --output")
    try:
        part.mkdir(exist_ok=True)
        lock = FileLock(part / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{output}: another process is writing there") from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    try:
        yield part
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):  # what is complete is kept
            raise
        shutil.rmtree(part, ignore_errors=True)
        if disk_full(error):
            raise UserError(f"{output}: the disk is full; free space and give the same command again") from error
        if isinstance(error, OSError):
            raise UserError(f"{output}: cannot be written: {one_line(error)}") from error
        raise
    finally:
        lock.release()


def check_space(part: Path, needed: int) -> None:
    """Raises UserError when the disk has less than so many bytes free."""
    free = shutil.disk_usage(part).free
    if needed > free:
        raise UserError(
            f"{part}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB free; free space, or give another --output"
        )


def in_fresh_process(module: str, *arguments: str) -> dict[str, Any]:
    """What a module of ours finds in a process of its own: the JSON of its last line. Raises what it ends on."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit status {done.returncode}"]
    raise (UserError if done.returncode == 2 else RunFailed)(lines[-1])
