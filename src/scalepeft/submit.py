"""Jobs of Slurm's: a training and what follows it, checked before they wait in the queue."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalepeft import cluster, fetch, launch
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.console import say
from scalepeft.errors import UserError, did_you_mean, one_line
from scalepeft.recipe import Recipe

LOGS = Path("logs")
"""Where the jobs' logs go. Slurm ends a job whose log has no folder, and leaves no word of it."""
FOLLOWING = ("evaluate", "merge", "push")
"""The verbs that may follow a training."""

_HELP = """
What follows `--` is given to sbatch, as --name=value: -- --partition=a100 --account=nlp --time=4:00:00
All jobs get it, but of GPUs only those that can use some.

--then VERB queues what shall follow when the training is complete, each after the one before it; the run directory is put after
the verb: --then evaluate --then 'merge --output merged' --then 'push --repo-id alice/film-reviews'
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job before it is queued."""

    name: str
    """What it is called among those that are queued together."""
    script: str
    """Its file in slurm/."""
    words: Sequence[str]
    """The arguments of the script."""
    options: Sequence[str] = ()
    """Of sbatch."""
    after: str | None = None
    """A kind of dependency and the name of the job it is of: afterok:train."""

    def command(self, known: Mapping[str, str]) -> str:
        """The line that queues it, as a shell reads it. `known` has the number of each job that is queued."""
        kind, _, name = (self.after or "").partition(":")
        depends = f" --dependency={kind}:{known.get(name, f'${name}')} --kill-on-invalid-dep=yes" if name else ""
        words = shlex.join([*self.options, _shown(scripts() / self.script), *self.words])
        return f"sbatch --parsable{depends} {words}"


def main(arguments: Sequence[str]) -> int:
    """`scalepeft submit RECIPE [section.key=value ...] [--nodes N] [--launch LAYOUT] [--then VERB ...] [-- SBATCH OPTIONS]`."""
    form = argparse.RawDescriptionHelpFormatter
    told = "Check a recipe and queue its training as a job of Slurm's."
    parser = argparse.ArgumentParser(prog="scalepeft submit", description=told, epilog=_HELP, formatter_class=form)
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to change, in YAML")
    parser.add_argument("--fresh", action="store_true", help="move an existing run directory aside and start anew")
    parser.add_argument("--then", action="append", default=[], metavar="VERB", help=f"what follows: {', '.join(FOLLOWING)}")
    add_options(parser)
    own, for_sbatch = split(arguments)
    options = parser.parse_intermixed_args(own)
    recipe = recipes.load(options.recipe, options.overrides)
    fetch.missing_inputs(recipe)
    state = runs.inspect(recipe, fresh=options.fresh)
    words = [options.recipe, *options.overrides, *(["--fresh"] if options.fresh else []), *checked(options, for_sbatch)]
    training = Job(name="train", script="train.sh", words=words, options=requested(options, recipe.name, for_sbatch))
    following = _following(options, recipe, for_sbatch)
    if state == "complete" and not following:
        say(f"{recipe.output_dir}: is complete already; --fresh moves it aside and trains anew")
        return 0
    queue([training, *following], dry_run=options.dry_run)
    return 0


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of what is queued."""
    group = parser.add_argument_group("Slurm")
    launch.add_layout(group)
    group.add_argument("--nodes", type=int, default=1, metavar="N", help="how many machines the training takes")
    group.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="GPUs of each")
    group.add_argument("--dry-run", action="store_true", help="print the lines that would queue the jobs, and queue nothing")


def given(options: argparse.Namespace) -> bool:
    """Whether any of them was given."""
    return options.nodes != 1 or any(
        getattr(options, name) for name in ("launch", "num_processes", "cpu", "gpus_per_node", "dry_run")
    )


def split(arguments: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """What stands before `--`, and what after it."""
    at = list(arguments).index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def checked(options: argparse.Namespace, for_sbatch: Sequence[str]) -> list[str]:
    """The options of launching, as train.sh takes them. Raises UserError for what could not run on what is asked for."""
    nodes, gpus = options.nodes, options.gpus_per_node
    if nodes < 1 or gpus < 0:
        raise UserError(f"command line: {'--nodes' if nodes < 1 else '--gpus-per-node'}: is below {int(nodes < 1)}")
    elsewhere = any(map(_of_gpus, for_sbatch))
    if options.launch or not elsewhere:
        cluster.layout_words(options, nodes, gpus)
    if options.launch and not (gpus or elsewhere or options.cpu or launch.layout(options.launch).use_cpu):
        told = "needs GPUs: give --gpus-per-node N, or --cpu to run it on CPUs"
        raise UserError(f"command line: --launch {options.launch}: {told}")
    if gpus and not options.cpu and (options.num_processes or 0) > nodes * gpus:
        raise UserError(f"command line: --num-processes: {options.num_processes} are more than {nodes} x {gpus} GPUs")
    words = ["--launch", options.launch] if options.launch else []
    words += ["--cpu"] if options.cpu else []
    return [*words, *(["--num-processes", str(options.num_processes)] if options.num_processes is not None else [])]


def requested(options: argparse.Namespace, name: str, for_sbatch: Sequence[str], number: str = "%j") -> list[str]:
    """The options of sbatch for a training."""
    gpus = [f"--gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []
    return [*named(name, number), f"--nodes={options.nodes}", *gpus, *for_sbatch]


def queue(jobs: Sequence[Job], *, dry_run: bool) -> None:
    """Queue jobs in their order, or print the lines that would. Raises UserError when Slurm refuses one, with none queued."""
    if dry_run:
        for job in jobs:
            print(f"{job.name}=$({job.command({})})")
        return
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch here: submit from a login node of the cluster; --dry-run shows what would be queued"
        )
    try:
        LOGS.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{LOGS.absolute()}: the folder of the logs cannot be made: {error.strerror}") from None
    known: dict[str, str] = {}
    for job in jobs:
        done = subprocess.run(shlex.split(job.command(known)), capture_output=True, text=True, check=False)
        if done.returncode:
            if known:
                subprocess.run(["scancel", *known.values()], check=False)
            raise UserError(f"{job.name}: {one_line(RuntimeError(done.stderr)) or 'sbatch failed'}")
        known[job.name] = done.stdout.strip().partition(";")[0]  # of a federation it also names the cluster
        after = f", after {job.after.partition(':')[2]}" if job.after else ""
        say(f"job {known[job.name]}: {job.name}{after}")
    say(f"logs in {LOGS}; squeue --me shows the jobs, scancel {' '.join(known.values())} ends them")


def scripts() -> Path:
    """The folder of the job scripts: inside an installed wheel, or beside the sources."""
    here = Path(__file__).parent
    return next((f for f in (here / "slurm", here.parents[1] / "slurm") if f.is_dir()), here)


def _following(options: argparse.Namespace, recipe: Recipe, for_sbatch: Sequence[str]) -> list[Job]:
    jobs: list[Job] = []
    before = "train"
    for text in options.then:
        verb, *words = shlex.split(text) or [""]
        if verb not in FOLLOWING:
            told = did_you_mean(verb, FOLLOWING) or f"; there are {', '.join(FOLLOWING)}"
            raise UserError(f"command line: --then: {verb!r} cannot follow a training{told}")
        if verb in (job.name for job in jobs):
            raise UserError(f"command line: --then: {verb} is given twice")
        if verb == "merge" and "--output" not in words:
            words = ["--output", f"{recipe.output_dir}-merged", *words]
        if verb == "push" and not {"--repo-id"} & set(words) and not recipe.training.get("hub_model_id"):
            raise UserError("command line: --then push: names no repository; give 'push --repo-id USER/NAME'")
        gpu = ["--gpus-per-node=1"] if verb == "evaluate" and options.gpus_per_node else []
        asked = [*named(f"{recipe.name}-{verb}"), *gpu, *(for_sbatch if verb == "evaluate" else without_gpus(for_sbatch))]
        words = [str(recipe.output_dir), *words]
        jobs.append(Job(name=verb, script=f"{verb}.sh", words=words, options=asked, after=f"afterok:{before}"))
        before = verb
    return jobs


def without_gpus(for_sbatch: Sequence[str]) -> list[str]:
    """The options of sbatch for a job that needs no GPU."""
    return [word for word in for_sbatch if not _of_gpus(word)]


def _of_gpus(word: str) -> bool:
    return "gpu" in word or word.startswith(("--gres", "-G"))


def named(name: str, number: str = "%j") -> list[str]:
    """The options of sbatch that name a job and its log."""
    return [f"--job-name={name}", f"--output={LOGS}/%x-{number}.log"]


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
