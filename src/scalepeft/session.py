"""One session of a run: opening its directory, and recording how the session ends."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from scalepeft import engines, published, ranks, stops
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.callbacks import MetricsLog, StopRequest
from scalepeft.console import note, say
from scalepeft.data import Corpus
from scalepeft.errors import Interrupted, UserError, disk_full, one_line
from scalepeft.recipe import Recipe
from scalepeft.run import Run
from scalepeft.stops import Stop
from scalepeft.trainer import RecipeTraining


@contextlib.contextmanager
def session(
    recipe: Recipe, run: Run, corpus: Corpus, trainer: RecipeTraining, stop: Stop, *, fresh: bool
) -> Iterator[Path | None]:
    """Open the run directory, yield the checkpoint to resume from, and record how the session ends.

    The directory is made here, after all that could have been wrong with the recipe, and held by a lock until the end.
    Raises UserError for an error inside that the user can mend (a full disk, no device memory), saying what was kept, and
    Interrupted after a requested stop.
    """
    first = trainer.args.process_index == 0
    lock = FileLock(run.path / runs.LOCK)
    new, chosen = False, None
    stop.remember((lambda: run.interrupt("stopped at once; the same command resumes")) if first else lambda: None)
    trainer.facts = {
        "layout": {**engines.layout(trainer.args), "global_batch_size": trainer.step_batches().global_batch},
        "recipe": runs.fingerprint(recipe),
        "data": {name: prepared.key for name, prepared in corpus.sets.items()},
    }
    if first:
        _claim(recipe, run, lock, fresh=fresh)
        new = not run.record
        try:
            chosen = _open(recipe, run, corpus, trainer.facts)
        except (OSError, UserError) as error:
            if new:
                shutil.rmtree(run.path, ignore_errors=True)
            lock.release()
            raise _mendable(run, error) or error from None
        trainer.add_callback(MetricsLog(run, trainer.step_batches()))
    trainer.stop_request = StopRequest(stop, run.path)
    trainer.add_callback(trainer.stop_request)
    try:
        opened = ranks.agree({"_checkpoint": str(chosen) if chosen else None, "_stop": stop.requested})
        _leave(run, opened, "stopped before training; the same command goes on")
        checkpoint = opened[0]["_checkpoint"]
        yield Path(checkpoint) if checkpoint else None
        _leave(run, ranks.agree({"_stop": stop.requested}), "trained and saved, not verified; the same command does that")
    except Interrupted as error:
        if first:
            run.interrupt(str(error), by_file=trainer.stop_request.by_file)
        ranks.agree({})  # the launcher ends all processes when one leaves
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


def _leave(run: Run, facts: Sequence[Mapping[str, Any]], told: str) -> None:
    """Raise Interrupted, on every process, when one of them was asked to stop."""
    if any(of["_stop"] for of in facts):
        raise Interrupted(f"{run.path}: {told}")


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


def _open(recipe: Recipe, run: Run, corpus: Corpus, facts: Mapping[str, Any]) -> Path | None:
    """Make the run's record, or take the run up at the checkpoint that is returned."""
    keys = facts["data"]
    if not run.record:
        run.create(recipe)
    elif run.record["data"] and run.record["data"]["keys"] != keys:
        changed = [name for name in keys if keys[name] != run.record["data"]["keys"].get(name)]
        told = f"the rows of {', '.join(changed)} are no longer those the run was started with"
        raise UserError(f"{run.path}: {told}; restore them, or train anew with --fresh")
    checkpoint = _choose(run, facts)
    for torn in published.leftovers(run.path):
        shutil.rmtree(torn)
    (run.path / runs.VERIFICATION).unlink(missing_ok=True)
    (run.path / stops.INTERRUPTED).unlink(missing_ok=True)
    run.rewind(checkpoint)
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
    return checkpoint


def _choose(run: Run, facts: Mapping[str, Any]) -> Path | None:
    """The last checkpoint that is whole, after those behind it were set aside; None when there was none at all.

    Raises UserError when none of them is whole, or when the last one is not to be resumed from here.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(published.named(run.path)):
        flaw = published.flaw(checkpoint, contents=True)
        if flaw is None:
            _compare(checkpoint, facts)
            break
        damaged[checkpoint] = flaw
    else:
        if damaged:
            told = "; ".join(f"{path.name}: {flaw}" for path, flaw in damaged.items())
            raise UserError(f"{run.path}: no checkpoint is whole ({told}); restore one, or train anew with --fresh")
        return None
    for path, flaw in damaged.items():
        note(f"{path}: {flaw}; resuming from {checkpoint.name} in its place")
        published.retire(path)
    return checkpoint


def _compare(checkpoint: Path, facts: Mapping[str, Any]) -> None:
    """Say what differs between a checkpoint and this launch. Raises UserError for what cannot be gone on with."""
    was = published.manifest(checkpoint)
    if was["recipe"] != facts["recipe"] or was["data"] != facts["data"]:
        what = "another recipe" if was["recipe"] != facts["recipe"] else "other rows"
        raise UserError(f"{checkpoint}: was saved with {what} than this run's; take it away, or train with --fresh")
    before, now = was["layout"], facts["layout"]
    if before["global_batch_size"] != now["global_batch_size"]:
        told = f"its steps are of {before['global_batch_size']} rows, and would be of {now['global_batch_size']}"
        raise UserError(f"{checkpoint}: {told}; set global_batch_size, or train anew with --fresh")
    if before != now:
        told = f"was saved by {engines.shown(before)}, and this is {engines.shown(now)}"
        if any(of["engine"] in engines.DIVIDE for of in (before, now)):
            hint = "resume on the same, or train anew with --fresh"
            raise UserError(f"{checkpoint}: {told}: optimizer states that are divided fit no other layout; {hint}")
        note(f"{checkpoint}: {told}: the rows of each step stay, random masks differ")
    for package, version in runs.packages().items():
        if (old := was["versions"].get(package)) != version:
            note(f"{checkpoint}: was saved with {package} {old}, and this is {version}: figures may differ by rounding")


def _mendable(run: Run, error: Exception) -> UserError | None:
    """A foreign exception that the user can mend, as an error that says what was kept and what to do."""
    checkpoint = run.last_checkpoint()
    kept = f"kept: {checkpoint}" if checkpoint else "nothing was saved yet"
    if disk_full(error):
        for torn in published.leftovers(run.path):
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
