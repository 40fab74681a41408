"""One session of a run: opening its directory, and recording how the session ends."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.callbacks import MetricsLog, StopRequest
from scalepeft.console import say
from scalepeft.data import Corpus
from scalepeft.errors import Interrupted, UserError, disk_full, one_line
from scalepeft.recipe import Recipe
from scalepeft.run import Run
from scalepeft.trainer import RecipeTraining


@contextlib.contextmanager
def session(recipe: Recipe, run: Run, corpus: Corpus, trainer: RecipeTraining, *, fresh: bool) -> Iterator[Path | None]:
    """Open the run directory, yield the checkpoint to resume from, and record how the session ends.

    The directory is made here, after all that could have been wrong with the recipe, and held by a lock until the end.
    Raises UserError for an error inside that the user can mend (a full disk, no device memory), saying what was kept, and
    Interrupted after a requested stop.
    """
    first = trainer.args.process_index == 0
    lock = FileLock(run.path / runs.LOCK)
    new = False
    if first:
        _claim(recipe, run, lock, fresh=fresh)
        new = not run.record
        try:
            _open(recipe, run, corpus)
        except (OSError, UserError) as error:
            if new:
                shutil.rmtree(run.path, ignore_errors=True)
            lock.release()
            raise _mendable(run, error) or error from None
        trainer.add_callback(MetricsLog(run, trainer.step_batches()))
    trainer.accelerator.wait_for_everyone()

    def leave_at_once() -> None:
        if first:
            run.end("interrupted", "stopped at once; the same command resumes")

    stop = StopRequest(leave_at_once)
    trainer.add_callback(stop)
    try:
        with stop:
            yield run.last_checkpoint()
    except Interrupted as error:
        if first:
            run.end("interrupted", str(error))
        raise
    except Exception as error:
        mendable = error if isinstance(error, UserError) else _mendable(run, error)
        if first and new and mendable and not trainer.state.global_step:  # nothing was trained: nothing is left
            shutil.rmtree(run.path, ignore_errors=True)
        elif first:
            with contextlib.suppress(OSError):  # on a full disk even this may fail; the old record then stays
                run.end("failed", str(mendable) if mendable else f"{type(error).__name__}: {one_line(error)}")
        if mendable:
            raise mendable from error
        raise
    finally:
        lock.release()


def _claim(recipe: Recipe, run: Run, lock: FileLock, *, fresh: bool) -> None:
    """Make the directory, after an old one was moved aside when that is asked for, and take its lock."""
    try:
        if fresh and (run.path / runs.RECORD).is_file():
            with lock.acquire(timeout=0):  # not from under another process
                aside = run.move_aside()
            say(f"{run.path}: moved aside to {aside}")
        run.path.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{run.path}: another process is training there") from None
    except OSError as error:
        raise recipe.error("training.output_dir", f"{run.path} cannot be written: {error.strerror}") from None


def _open(recipe: Recipe, run: Run, corpus: Corpus) -> None:
    keys = {name: prepared.key for name, prepared in corpus.sets.items()}
    if not run.record:
        run.create(recipe)
    elif run.record["data"] and run.record["data"]["keys"] != keys:
        changed = [name for name in keys if keys[name] != run.record["data"]["keys"].get(name)]
        told = f"the rows of {', '.join(changed)} are no longer those the run was started with"
        raise UserError(f"{run.path}: {told}; restore them, or train anew with --fresh")
    for torn in run.unpublished():
        shutil.rmtree(torn)
    (run.path / runs.VERIFICATION).unlink(missing_ok=True)
    checkpoint = run.last_checkpoint()
    run.forget_after(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    runs.write(run.path / runs.RESOLVED, recipes.dump(recipe.resolved()))
    run.update(
        status="running",
        reason=None,
        ended=None,
        labels=corpus.label_names,
        revisions=corpus.revisions,
        data={
            "keys": keys,
            "rows": {name: len(prepared.rows) for name, prepared in corpus.sets.items()},
            "dropped": {name: prepared.dropped for name, prepared in corpus.sets.items()},
            "truncated": {name: prepared.truncated for name, prepared in corpus.sets.items() if prepared.truncated},
            "documents": {name: prepared.documents for name, prepared in corpus.sets.items() if prepared.documents},
            "augmented": {name: prepared.augmented for name, prepared in corpus.sets.items() if prepared.augmented},
        },
    )


def _mendable(run: Run, error: Exception) -> UserError | None:
    """A foreign exception that the user can mend, as an error that says what was kept and what to do."""
    checkpoint = run.last_checkpoint()
    kept = f"kept: {checkpoint}" if checkpoint else "nothing was saved yet"
    if disk_full(error):
        for torn in run.unpublished():
            shutil.rmtree(torn, ignore_errors=True)
        return UserError(f"{run.path}: the disk is full; {kept}. Free space and give the same command again")
    if isinstance(error, torch.OutOfMemoryError):
        told = (
            "lower training.per_device_train_batch_size (global_batch_size keeps the product), or set activation_checkpointing"
        )
        return UserError(f"{run.path}: out of device memory; {kept}. To fit: {told}; `scalepeft plan` tells what each takes")
    if isinstance(error, ImportError | NotImplementedError):  # FlexAttention on a CPU, for one
        return UserError(f"{run.path}: {one_line(error)}")
    return None
