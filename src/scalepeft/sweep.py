"""A recipe trained with every combination of some values, one run after the other."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from scalepeft import compare, document, fetch, grid, submit
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.console import say
from scalepeft.errors import Interrupted, RunFailed, UserError
from scalepeft.grid import Grid
from scalepeft.recipe import Recipe
from scalepeft.run import Run

RECORD = "sweep.json"
PAGE = "compare.html"
ARRAY = "array.json"
"""What each task of an array of jobs trains."""

_HELP = """
key=[a,b,c] sweeps: each of the values is tried, with each of the other keys' values. A key whose value may itself be a list
takes a list as one value: adapter.target_modules=[q_lin,v_lin] changes it, and sweeps nothing. To sweep such a key, write
one bracket more: adapter.target_modules=[[q_lin],[q_lin,v_lin]]. The same holds for keys of which upstream does not say what
they take.

The same command again goes on: complete runs are skipped, unfinished ones resumed, failed ones tried again.

With --slurm the runs are tasks of an array of jobs, and one more job compares them; what follows `--` is given to sbatch.
"""


def main(arguments: Sequence[str]) -> int:
    """`scalepeft sweep RECIPE key=[a,b,c] ... [section.key=value ...] [--output-dir DIR] [--slurm ...] [--compare]`."""
    told = "Train a recipe with every combination of some values, one run after the other, and compare the runs."
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="scalepeft sweep", description=told, epilog=_HELP, formatter_class=form)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="+", metavar="section.key=value", help="values to change, or lists of them to try")
    parser.add_argument(
        "--output-dir", metavar="DIR", type=Path, help="where the runs go; runs/<recipe name>-sweep when absent"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--compare", action="store_true", help="train nothing; compare the runs as they stand")
    how.add_argument("--slurm", action="store_true", help="queue the runs as an array of jobs, and the comparison after them")
    submit.add_options(parser)
    own, for_sbatch = submit.split(arguments)
    options = parser.parse_intermixed_args(own)
    if not options.slurm and (for_sbatch or submit.given(options)):
        raise UserError("command line: --launch, --nodes and other options of jobs go with --slurm")
    sweep = plan(options.recipe, options.overrides, options.output_dir)
    if options.slurm:
        sweep.submit(options, for_sbatch)
    elif options.compare:
        sweep.compare()
    else:
        sweep.train()
    return 0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One combination."""

    name: str
    """Its directory."""
    overrides: tuple[str, ...]
    """What it is trained with, without the output directory."""
    recipe: Recipe
    """The recipe with all of that, checked."""


def plan(recipe: str, overrides: Sequence[str], folder: Path | None = None) -> Sweep:
    """A sweep whose every point is checked; nothing is written. Raises UserError with the problems of all points at once."""
    base = document.read(recipes.find(recipe))
    found = grid.read(base, overrides)
    folder = folder or Path("runs") / f"{base.path.stem}-sweep"
    points: list[Point] = []
    problems: dict[str, None] = {}
    for name, given in found.points().items():
        try:
            checked = recipes.load(recipe, [*given, _output_dir(folder / name)])
            fetch.missing_inputs(checked)
            points.append(Point(name=name, overrides=given, recipe=checked))
        except UserError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise UserError(*problems)
    sweep = Sweep(folder=folder, recipe=recipe, grid=found, points=points)
    sweep.refuse_another()
    return sweep


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A directory of runs, one for each combination, and sweep.json, which says what they have in common."""

    folder: Path
    recipe: str
    grid: Grid
    points: Sequence[Point]

    @property
    def record(self) -> dict[str, Any]:
        """sweep.json as it stands; empty when there is none."""
        try:
            return dict(json.loads((self.folder / RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            raise UserError(f"{self.folder / RECORD}: is damaged; move the directory aside") from None

    @property
    def said(self) -> dict[str, Any]:
        """What makes it this sweep and no other."""
        return {"recipe": self.recipe, "grid": self.grid.swept, "overrides": self.grid.common}

    def refuse_another(self) -> None:
        """Raise UserError when the directory holds something else than this sweep, or a run in it another recipe's."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder}: is a file; give another --output-dir")
        record = self.record
        if not record:
            if self.folder.is_dir() and any(p.name != runs.LOCK for p in self.folder.iterdir()):
                raise UserError(f"{self.folder}: exists and is not a sweep (no {RECORD}); give another --output-dir")
            return
        was, now = _said(record), _said(self.said)
        differing = {key: (was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)}
        if not differing and list(was) != list(now):  # it names the directories
            differing = {"the order of keys": (", ".join(was), ", ".join(now))}
        if differing:
            told = "; ".join(f"{key}: {compare.shown(a)} -> {compare.shown(b)}" for key, (a, b) in differing.items())
            raise UserError(f"{self.folder}: holds another sweep ({told}); give another --output-dir")
        problems: list[str] = []
        for point in self.points:
            try:
                runs.inspect(point.recipe)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(*problems)

    def train(self) -> None:
        """Train what is not complete, point after point, then compare all. Raises RunFailed when any failed."""
        with self._held(), _Requests() as requests:
            states = self._each(requests)
        self._compare(states)

    def submit(self, options: argparse.Namespace, for_sbatch: Sequence[str]) -> None:
        """Queue what is not complete as an array of jobs, and the comparison after them."""
        pending = [point for point in self.points if not _complete(self.folder / point.name)]
        words = submit.checked(options, for_sbatch)
        tasks = [[self.recipe, *point.overrides, _output_dir(self.folder / point.name)] for point in pending]
        if not options.dry_run:
            with self._held():
                self._write({p.name: {"status": "pending" if p in pending else "complete"} for p in self.points})
                runs.write(self.folder / ARRAY, json.dumps(tasks, indent=2, ensure_ascii=False) + "\n")
        name = self.folder.name
        asked = [f"--array=0-{len(tasks) - 1}", *submit.requested(options, name, for_sbatch, "%A_%a")]
        jobs = [submit.Job(name="runs", script="train.sh", words=["--points", str(self.folder / ARRAY), *words], options=asked)]
        again = [self.recipe, *self.overrides, "--output-dir", str(self.folder)]
        asked = [*submit.named(f"{name}-compare"), *submit.without_gpus(for_sbatch)]
        after = "afterany:runs" if tasks else None
        jobs.append(submit.Job(name="compare", script="compare.sh", words=again, options=asked, after=after))
        submit.queue(jobs if tasks else jobs[1:], dry_run=options.dry_run)

    def compare(self) -> None:
        """Compare the runs as they stand. Raises RunFailed when any is not complete."""
        states = {point.name: _stands(self.folder / point.name) for point in self.points}
        with self._held():
            self._write(states)
        self._compare(states)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """The directory, made and held against other sweeps."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / runs.LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{self.folder}: another process is sweeping there") from None
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None
        with lock:
            yield

    @property
    def overrides(self) -> list[str]:
        """The overrides as they were given, the lists of values to try among them."""
        swept = self.grid.swept
        return [f"{o}=[{', '.join(map(grid.written, swept[o]))}]" if o in swept else o for o in self.grid.overrides]

    def _each(self, requests: _Requests) -> dict[str, dict[str, str]]:
        """Train each point that is not complete; what became of each."""
        sizes = " x ".join(f"{len(values)} {key}" for key, values in self.grid.swept.items())
        say(f"{Path(self.recipe).stem} -> {self.folder}: {sizes} = {len(self.points)} runs")
        states = {point.name: {"status": "pending"} for point in self.points}
        states |= {p.name: {"status": "complete"} for p in self.points if _complete(self.folder / p.name)}
        for number, point in enumerate(self.points, 1):
            heading = f"[{number}/{len(self.points)}] {point.name}"
            if states[point.name]["status"] == "complete":
                say(f"{heading}: is complete already")
                continue
            say(f"\n{heading}")
            self._write(states | {point.name: {"status": "running"}})
            states[point.name] = _trained(self.recipe, point, self.folder / point.name, requests)
            self._write(states)
            if states[point.name]["status"] == "interrupted":
                told = f"stopped at run {number} of {len(self.points)} ({point.name})"
                raise Interrupted(f"{self.folder}: {told}; the same command goes on")
        self._write(states)
        return states

    def _write(self, states: Mapping[str, Mapping[str, str]]) -> None:
        points = [{"name": p.name, "overrides": p.overrides, **states[p.name]} for p in self.points]
        text = json.dumps(self.said | {"points": points}, indent=2, ensure_ascii=False) + "\n"
        try:
            runs.write(self.folder / RECORD, text)
        except OSError as error:
            raise UserError(f"{self.folder / RECORD}: cannot be written: {error.strerror}") from None

    def _compare(self, states: Mapping[str, Mapping[str, str]]) -> None:
        entries = []
        for point in self.points:
            path, values = self.folder / point.name, compare.flat(point.recipe.resolved())
            found = compare.Entry(name=point.name, path=path, values=values, record={})
            if (path / runs.RECORD).is_file():  # else it failed before it made its directory
                found = compare.entry(path, point.name)
            entries.append(replace(found, record={**found.record, **states[point.name]}))
        comparison, page = compare.Comparison(entries), self.folder / PAGE
        runs.write(page, comparison.html(f"Sweep of {Path(self.recipe).stem} over {', '.join(self.grid.swept)}"))
        say(f"\n{comparison.text(compare.terminal())}\n\n{page}: table and curves")
        if failed := [name for name, state in states.items() if state["status"] != "complete"]:
            told = f"{len(failed)} of {len(self.points)} runs failed ({'; '.join(failed)})"
            raise RunFailed(f"{self.folder}: {told}; the same command tries them again")


class _Requests:
    """Requests to stop, passed on to the process that trains."""

    def __init__(self) -> None:
        self.came = 0
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> _Requests:  # noqa: PYI034  # Self is younger than Python 3.10
        self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  # a handler's signature
        self.came += 1
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    def start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        """Start a process, in a session of its own: a terminal's Ctrl-C reaches it through here alone, and once.

        Its errors come through a pipe: a run that fails before it has a directory leaves its reason nowhere else.
        """
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True)
        missed, self.process = self.came, process
        if missed:
            process.send_signal(signal.SIGINT)
        return process


def _said(record: Mapping[str, Any]) -> dict[str, Any]:
    """Swept keys and their values, the other overrides, and the recipe's name, from sweep.json."""
    common = dict(text.split("=", 1) for text in record["overrides"])
    return {**record["grid"], **common, "recipe": Path(record["recipe"]).stem}


def _complete(path: Path) -> bool:
    return Run(path).record.get("status") == "complete"


def _stands(path: Path) -> dict[str, str]:
    """What has become of a run that was trained elsewhere."""
    record = Run(path).record
    if record.get("status") == "complete":
        return {"status": "complete"}
    told = "has not begun to train, or failed before it did: see the log of its job"
    status = {"interrupted": "interrupted", "running": "running"}.get(record.get("status", ""), "failed")
    return {"status": status, "reason": record.get("reason") or ("" if record else told)}


def _trained(recipe: str, point: Point, path: Path, requests: _Requests) -> dict[str, str]:
    """Train one point in a process of its own; its status and, unless that is complete, the reason."""
    before, last = Run(path).record, ""
    with requests.start([sys.executable, "-m", "scalepeft.train", recipe, *point.overrides, _output_dir(path)]) as process:
        for line in process.stderr or ():
            sys.stderr.write(line)
            sys.stderr.flush()
            last = line.strip() or last
    record, status = Run(path).record, process.returncode
    if status == 0 and record.get("status") == "complete":
        return {"status": "complete"}
    reason = record.get("reason") if record != before else None
    if requests.came or status == Interrupted.exit_status:
        return {"status": "interrupted", "reason": reason or "stopped; the same command goes on"}
    return {"status": "failed", "reason": reason or last or f"ended with status {status}"}


def _output_dir(path: Path) -> str:
    return f"training.output_dir={grid.written(str(path))}"
