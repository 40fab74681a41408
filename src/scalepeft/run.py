"""The run directory: everything one training leaves behind."""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from scalepeft import published, stops, upstream
from scalepeft import recipe as recipes
from scalepeft.console import note
from scalepeft.errors import UserError
from scalepeft.recipe import Recipe
from scalepeft.records import RunRecord

RECORD = "run.json"
METRICS = "metrics.jsonl"
RECIPE = "recipe.yaml"
RESOLVED = "resolved.yaml"
VERIFICATION = "verification.safetensors"
LOCK = ".lock"
_NO_RUN = (LOCK, stops.STOP, stops.INTERRUPTED)
"""What may stand in a directory before the run is made."""


_OBSERVES = (
    "logging_",
    "log_",
    "eval_",
    "per_device_eval_batch_size",
    "save_",
    "report_to",
    "run_name",
    "disable_tqdm",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "hub_",
    "push_to_hub",
)
"""Beginnings of training keys that change what is seen of a run, not the run."""
_LENGTHENS = ("training.num_train_epochs", "training.max_steps")
_DIVIDES = ("global_batch_size", "training.per_device_train_batch_size", "training.gradient_accumulation_steps")
"""Keys that say how a step is divided. They may change with the layout while the rows of a step stay as many."""
_PACKAGES = (
    "scalepeft", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "evaluate", "tokenizers", "safetensors",
    "bitsandbytes", "deepspeed", "numpy", "scikit-learn",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A run directory, new or existing."""

    path: Path

    @property
    def record(self) -> dict[str, Any]:
        """run.json as it stands; empty when there is none. Raises UserError when it is not JSON."""
        try:
            found = json.loads((self.path / RECORD).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.path / RECORD}: is damaged; move the directory aside, or train with --fresh")
        return found

    @property
    def weights(self) -> Path:
        """Where the trained weights are: adapter/, or model/ after full fine-tuning."""
        return next((p for p in (self.path / "adapter", self.path / "model") if p.is_dir()), self.path / "adapter")

    def update(self, **changes: Any) -> None:
        """Replace fields of run.json, atomically."""
        write(self.path / RECORD, json.dumps(self.record | changes, indent=2, ensure_ascii=False) + "\n")

    def create(self, recipe: Recipe) -> None:
        """Make the directory with the recipe verbatim, the resolved recipe and run.json with status `running`."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write(self.path / RECIPE, recipe.document.text)
            write(self.path / RESOLVED, recipes.dump(recipe.resolved()))
            write(self.path / METRICS, "")
            record = RunRecord(
                status="running",
                name=recipe.name,
                command=[Path(sys.argv[0]).name, *sys.argv[1:]],
                started=now(),
                versions=versions(),
                commit=commit(),
            )
            self.update(**asdict(record))
        except OSError as error:
            raise UserError(f"{self.path}: the run directory cannot be written: {error.strerror}") from None

    def end(self, status: Literal["complete", "failed", "interrupted"], reason: str | None = None, **changes: Any) -> None:
        """Record how the run ended."""
        self.update(status=status, reason=reason, ended=now(), **changes)

    def recipe(self, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
        """The resolved recipe of the run. Raises UserError when the directory is not a run."""
        if not (self.path / RECORD).is_file():
            raise UserError(f"{self.path}: is not a run directory: it has no {RECORD}")
        return recipes.load(self.path / RESOLVED, overrides)

    def last_checkpoint(self) -> Path | None:
        """The checkpoint with the highest step whose files have the sizes they were published with."""
        return next((p for p in reversed(published.named(self.path)) if published.flaw(p) is None), None)

    def rewind(self, checkpoint: Path | None) -> None:
        """Cut metrics.jsonl to what it held when a checkpoint was published: the rest will be measured again."""
        if checkpoint is not None:
            known = published.manifest(checkpoint)["metrics"]
            os.truncate(self.path / METRICS, min(known, (self.path / METRICS).stat().st_size))
            return
        kept = [line for line in self.lines() if line["step"] == 0 and self.record["evaluation"]]  # not measured again
        write(self.path / METRICS, "".join(json.dumps(line) + "\n" for line in kept))

    def begin(self) -> None:
        """Take away what an earlier session left for this one to stumble on: its marker, and a request it did not see.

        Not from under another process that trains there: the request may be for that.
        """
        left = [path for path in (self.path / stops.STOP, self.path / stops.INTERRUPTED) if path.exists()]
        if not left:
            return
        with contextlib.suppress(Timeout), FileLock(self.path / LOCK, timeout=0):
            for path in left:
                path.unlink(missing_ok=True)
            if left[0].name == stops.STOP:
                note(f"{left[0]}: of an earlier session; removed")

    def lines(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; a last line torn by a crash is left out."""
        if not (self.path / METRICS).is_file():
            return []
        text = (self.path / METRICS).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def flushed(self, name: str) -> int:
        """The size in bytes of a file of the run, once that much is on the disk."""
        with (self.path / name).open("rb") as file:
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size

    def interrupt(self, reason: str, *, by_file: bool = False) -> None:
        """Record that the run left on request, with the marker by which scripts tell it from one that failed."""
        self.end("interrupted", reason)
        stops.mark(self.path, by_file=by_file)

    def move_aside(self) -> Path:
        """Rename the directory to the first free NAME.1, NAME.2, ... and return that."""
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(aside)
        return aside


def inspect(
    recipe: Recipe, *, fresh: bool = False, processes: int | None = None
) -> Literal["new", "unfinished", "trained", "complete"]:
    """What is at the recipe's output directory; reads only. `trained` lacks only the verification.

    A run that is to be moved aside (`fresh`) counts as new. Raises UserError when it is not a run, or, unless `fresh`, a run
    of another recipe or, when the number of `processes` is known, one whose steps are of another number of rows.
    """
    run = Run(recipe.output_dir)
    if run.path.exists() and not run.path.is_dir():
        raise recipe.error("training.output_dir", f"{run.path} is a file")
    parent = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
    if not os.access(parent, os.W_OK):
        raise recipe.error("training.output_dir", f"{parent} cannot be written")
    if not run.path.exists() or not any(p for p in run.path.iterdir() if p.name not in _NO_RUN):
        return "new"
    if not (run.path / RECORD).is_file():
        raise recipe.error("training.output_dir", f"{run.path} exists and is not a run (no {RECORD}); choose another directory")
    if fresh:
        return "new"
    record = run.record  # a damaged one is told before anything else
    status = record.get("status")
    differences = _differences(run, recipe)
    lengthened = any(k in _LENGTHENS for k in differences)
    goes_on = lengthened or not (status == "complete" or (run.path / VERIFICATION).is_file())
    hint = "give another training.output_dir, or move it aside with --fresh"
    refused = {
        k: pair for k, pair in differences.items() if not _may_change(recipe, k, *pair) and not (goes_on and k in _DIVIDES)
    }
    if refused:
        told = "; ".join(f"{k}: {was!r} -> {now!r}" for k, (was, now) in refused.items())
        raise UserError(f"{run.path}: holds a run of another recipe ({told}); {hint}")
    was, rows = record.get("layout", {}).get("global_batch_size"), _rows_per_step(recipe, processes)
    if goes_on and was and rows and was != rows:
        told = f"its steps are of {was} rows, those of this launch would be of {rows}"
        raise UserError(f"{run.path}: {told}; keep them at {was} by global_batch_size, or {hint}")
    if lengthened:
        if run.last_checkpoint() is None:
            raise UserError(
                f"{run.path}: holds no checkpoint to lengthen the run from; move it aside with --fresh to train anew"
            )
        return "unfinished"
    if status == "complete":
        return "complete"
    return "trained" if (run.path / VERIFICATION).is_file() else "unfinished"


def _rows_per_step(recipe: Recipe, processes: int | None) -> int | None:
    if recipe.global_batch_size is not None or processes is None:
        return recipe.global_batch_size
    fields = upstream.fields(upstream.TASK_ARGUMENTS[recipe.task])
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    batch, accumulation = (int(recipe.training.get(name, fields[name].default)) for name in names)
    return batch * accumulation * processes


def fingerprint(recipe: Recipe) -> str:
    """The sha256 of what may not change of a recipe while a run of it goes on."""
    free = tuple(f"training.{name}" for name in ("output_dir", *_OBSERVES))
    values = recipes.flatten(recipe.resolved()).items()
    fixed = {k: v for k, v in values if k not in (*_LENGTHENS, *_DIVIDES) and not k.startswith(free)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True, default=str).encode()).hexdigest()


def _differences(run: Run, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    was, now = (recipes.flatten(values) for values in (run.recipe().resolved(), recipe.resolved()))
    keys = [k for k in {**was, **now} if was.get(k) != now.get(k) and k != "training.output_dir"]
    return {k: (was.get(k), now.get(k)) for k in keys}


def _may_change(recipe: Recipe, key: str, was: Any, now: Any) -> bool:
    section, _, name = key.partition(".")
    if key in _LENGTHENS:
        default = upstream.fields(upstream.TASK_ARGUMENTS[recipe.task])[name].default
        was, now = (default if value is None else value for value in (was, now))
        return isinstance(was, int | float) and isinstance(now, int | float) and 0 < was < now
    chooses = recipe.training.get("load_best_model_at_end") and name.startswith(("eval_", "save_"))
    return section == "training" and name.startswith(_OBSERVES) and not chooses


def write(path: Path, text: str) -> None:
    """Write a file beside and rename it over: a reader sees the old text or the new one, never half of it."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def now() -> str:
    """The time, ISO 8601 with time zone, to the second."""
    return dt.datetime.now().astimezone().isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Python, platform and the installed versions of the packages that shape a result."""
    return {"platform": platform.platform(), **packages()}


def packages() -> dict[str, str]:
    """Python and the installed versions of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The git commit of the working directory, with `-dirty` when tracked files differ from it; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
