"""A job of Slurm's: what slurm/train.sh shall run in it, and what shall become of it when that has ended."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from scalepeft import fetch, launch, stops
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.console import note
from scalepeft.errors import Interrupted, UserError, one_line, program
from scalepeft.recipe import Recipe
from scalepeft.run import Run

FRONT_PAGE = "quickstart"
"""The recipe that is trained when none is named."""
REQUEUE = 75
"""The exit status by which `verdict` asks for the job to be queued again: EX_TEMPFAIL of sysexits.h."""
LOST = "a node was lost"
"""Why a run may have failed that is tried again."""
MOST_RESTARTS = "SCALEPEFT_MAX_RESTARTS"
_RESTARTS = 20
"""How often a job may start anew when that variable says nothing."""
_FIRST_PORT, _PORTS = 20000, 12000
"""Below the ephemeral range, out of which the system gives ports to whoever connects."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a job runs."""

    run: Path
    """The run directory."""
    before: str
    """What its record was before: `verdict` tells by it whether this job has written it. Empty of a run that is complete."""
    nodes: int
    """On how many nodes: on one when no more than the verification, or nothing, is left to be done."""
    arguments: Sequence[str]
    """Those of `scalepeft`, to which each node adds its rank."""

    def words(self) -> list[str]:
        """All of it as words, in the order in which slurm/train.sh reads them."""
        return [str(self.run), self.before, str(self.nodes), *self.arguments]


def plan_main(arguments: Sequence[str]) -> int:
    """`python -m scalepeft.cluster plan`: check a recipe in its job, and print what the job runs, each word ended by a null."""
    parser = argparse.ArgumentParser(prog="train.sh", description="Train a recipe as a job of Slurm's.", allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="RECIPE section.key=value", help=f"{FRONT_PAGE} when none is named")
    parser.add_argument("--points", type=Path, metavar="FILE", help="of an array: the words of each task, as JSON")
    parser.add_argument("--fresh", action="store_true", help="move an existing run directory aside and start anew")
    parser.add_argument("--head", required=True, help="what `scontrol --oneliner show node` says of the job's first node")
    launch.add_layout(parser)
    options = parser.parse_intermixed_args(arguments)
    restarts = _restarts()
    if restarts > _most():
        raise UserError(f"the job has been started anew {restarts} times; {MOST_RESTARTS} allows {_most()}")
    words = _point(options.points) if options.points else options.words
    name, overrides = _recipe_and_overrides(words)
    recipe = recipes.load(name, overrides)
    fetch.missing_inputs(recipe)
    if options.fresh and not restarts:  # a job that is started anew goes on with what it began
        move_aside(recipe)
    state = runs.inspect(recipe)
    nodes, launching = 1, ["--cpu"] if options.cpu else []  # to verify, or to say that all is done
    if state in ("new", "unfinished"):
        nodes, gpus = (int(os.environ.get(name, "0")) for name in ("SLURM_JOB_NUM_NODES", "SLURM_GPUS_ON_NODE"))
        if not gpus and options.launch is None:
            note("the job has no GPU (sbatch --gpus-per-node) and trains on CPUs")
        launching = [*layout_words(options, nodes, gpus), *_meeting(options.head, nodes)]
    found = Plan(
        run=recipe.output_dir,
        before="" if state == "complete" else _stamp(Run(recipe.output_dir)),
        nodes=nodes,
        arguments=["train", name, *overrides, *launching],
    )
    print(*found.words(), sep="\0", end="\0")
    return 0


def verdict_main(arguments: Sequence[str]) -> int:
    """`python -m scalepeft.cluster verdict`: 0 when the run is complete, REQUEUE when it shall go on, 1 when it failed."""
    parser = argparse.ArgumentParser(prog="verdict", description="Say what became of a run, and what shall become of its job.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--before", required=True, help="what `plan` printed")
    parser.add_argument("--status", type=int, required=True, help="the exit status of the training")
    parser.add_argument("--job", required=True, help="what `scontrol --oneliner show job` says of the job")
    parser.add_argument("--warned", action="store_true", help="the job was told that its time is nearly up")
    parser.add_argument("--lost", action="store_true", help="a node of the job does not answer")
    options = parser.parse_args(arguments)
    cause = "its time was nearly up" if options.warned else "it was pre-empted" if preempted(options.job) else ""
    cause = LOST if options.lost else cause
    cause = cause or ("asked to stop" if options.status == Interrupted.exit_status else "")
    status, told = verdict(Run(options.run), options.before, cause=cause, restarts=_restarts(), most=_most())
    note(told)
    return status


def verdict(run: Run, before: str, *, cause: str, restarts: int, most: int) -> tuple[int, str]:
    """The exit status of a job whose training has ended, and a line that says why.

    `before` is that of the plan: a record that has not changed since is none of this job's. `cause` says what befell the
    job, if anything did. Exit statuses say little: launchers give the same for a crash and for a request to stop.
    """
    record = run.record if not before or _stamp(run) != before else {}
    status = record.get("status")
    if status == "complete":
        return 0, f"{run.path}: complete"
    stopped = cause or ("asked to stop" if status == "interrupted" else "")
    if status == "interrupted" and stops.marked_by_file(run.path):
        return 1, f"{run.path}: stopped by the file {stops.STOP}; the same command goes on"
    if not stopped or (status == "failed" and cause != LOST):  # it would fail again
        said = {"running": "failed: it ended without a word of its own", None: "failed before it began to train"}
        return 1, f"{run.path}: {said.get(status, 'failed')}"  # the run itself has said why
    if restarts >= most:
        told = f"{stopped}, and {MOST_RESTARTS} allows no more than {most} restarts; the same command goes on"
        return 1, f"{run.path}: {told}"
    return REQUEUE, f"{run.path}: {stopped}; queued again, to go on"


def preempted(job: str) -> bool:
    """Whether a job, as `scontrol` shows it, is being pre-empted: its processes have been told, its script has not."""
    found = re.search(r"\bPreemptTime=(\S+)", job)
    return found is not None and found[1] not in ("None", "Unknown")


def move_aside(recipe: Recipe) -> None:
    """Rename what stands at the run directory, unless another process trains there."""
    run = Run(recipe.output_dir)
    if runs.inspect(recipe, fresh=True) != "new" or not (run.path / runs.RECORD).is_file():
        return
    try:
        with FileLock(run.path / runs.LOCK).acquire(timeout=0):
            note(f"{run.path}: moved aside to {run.move_aside()}")
    except Timeout:
        raise UserError(f"{run.path}: another process is training there") from None


def port(job: int, restarts: int) -> int:
    """A port of this host for the rendezvous of a job: its own among jobs that share the host, and free."""
    # by sevens: the next job's first start is not this one's second
    for number in range(100):
        found = _FIRST_PORT + (7 * job + restarts + 101 * number) % _PORTS
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that is merely closing counts as free
            try:
                tried.bind(("", found))
            except OSError:
                continue
            return found
    raise UserError(f"{socket.gethostname()}: no port could be opened for the processes to meet at")


def layout_words(options: argparse.Namespace, nodes: int, gpus: int) -> list[str]:
    """The options of launching, from those of `launch.add_layout`: without any, a process for each GPU, else for each node.

    `gpus` are those of one node. Raises UserError for what cannot be divided so.
    """
    name, processes = options.launch, options.num_processes
    if name is None:
        several = nodes * max(gpus, 1) > 1 if processes is None else processes > 1
        name = ("multi_" if several else "single_" if gpus else "") + ("gpu" if gpus and not options.cpu else "cpu")
    chosen = launch.layout(name)
    if chosen.engine == "NO" and nodes > 1:
        raise UserError(f"command line: --launch {name}: is the layout of one process, and the job has {nodes} nodes")
    if processes is None and nodes > 1 and not gpus:
        processes = nodes
    if processes is not None and (processes < nodes or processes % nodes):
        raise UserError(f"command line: --num-processes: {processes} cannot be divided evenly among {nodes} nodes")
    words = ["--launch", name, *(["--cpu"] if options.cpu else [])]
    return [*words, *(["--num-processes", str(processes)] if processes is not None else [])]


def _meeting(head: str, nodes: int) -> list[str]:
    """How the nodes find each other, from what `scontrol` says of the first."""
    if nodes == 1:
        return []
    address = re.search(r"\bNodeAddr=(\S+)", head)
    if address is None:
        raise UserError(f"scontrol show node: names no address: {head!r}")
    at = port(int(os.environ["SLURM_JOB_ID"]), _restarts())
    return ["--num-machines", str(nodes), "--main-process-ip", address[1], "--main-process-port", str(at)]


def _recipe_and_overrides(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    named = words and ("=" not in words[0] or Path(words[0]).is_file())
    return (words[0], words[1:]) if named else (FRONT_PAGE, words)


def _point(file: Path) -> list[str]:
    """The words of the task of an array that this job is."""
    number = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    try:
        words = json.loads(file.read_bytes())[int(number)]
    except (OSError, ValueError, IndexError) as error:
        told = one_line(error) if number else "this job is no task of an array"
        raise UserError(f"{file}: has no task {number}: {told}") from None
    return list(map(str, words))


def _stamp(run: Run) -> str:
    """What changes whenever the record is written; `none` when there is none."""
    try:
        return str((run.path / runs.RECORD).stat().st_mtime_ns)
    except FileNotFoundError:
        return "none"


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _most() -> int:
    given = os.environ.get(MOST_RESTARTS, str(_RESTARTS))
    if not given.isdecimal():
        raise UserError(f"{MOST_RESTARTS} is {given!r}; it takes a number")
    return int(given)


_VERBS = {"plan": plan_main, "verdict": verdict_main}


def _dispatch(arguments: Sequence[str]) -> int:
    return _VERBS[arguments[0]](arguments[1:])


if __name__ == "__main__":
    sys.exit(program(_dispatch))
