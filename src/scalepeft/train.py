"""Train a recipe: `accelerate launch -m scalepeft.train RECIPE`, or `scalepeft train RECIPE` for a single process."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import importlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scalepeft import expected, forecast, launch, push, ranks, stops, upstream
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.console import note, quiet_upstream, say, speaks
from scalepeft.errors import Interrupted, ScalepeftError, did_you_mean, one_line, program
from scalepeft.fetch import missing_inputs, offline_if_unreachable
from scalepeft.recipe import Recipe
from scalepeft.run import Run

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from scalepeft.data import Corpus
    from scalepeft.frozen import Frozen
    from scalepeft.tasks import Task
    from scalepeft.trainer import RecipeTraining


def main(arguments: Sequence[str]) -> int:
    """`scalepeft train RECIPE [section.key=value ...] [--fresh] [--launch LAYOUT ...]`."""
    parser = argparse.ArgumentParser(prog="scalepeft train", description="Train, evaluate, save and verify a recipe.")
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to change, in YAML")
    parser.add_argument("--fresh", action="store_true", help="move an existing run directory aside and start anew")
    launch.add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    launch.end_with_the_launcher()
    with stops.Stop() as stop, ranks.one_voice():
        launch.heed_the_launcher()
        recipe = recipes.load(options.recipe, options.overrides)
        given = [options.recipe, *options.overrides, *(["--fresh"] if options.fresh else [])]
        line = launch.chosen_line(options, "scalepeft.train", given)
        if line is not None and runs.inspect(recipe, fresh=options.fresh) in ("new", "unfinished"):
            return _launched(line, Run(recipe.output_dir), stop)
        run = train(recipe, fresh=options.fresh, stop=stop)
        if run.record.get("status") != "complete" and speaks():
            _verify_in_place_of_this(run, stop)
    if speaks() and recipe.training.get("push_to_hub"):
        push.in_place_of_this(run)
    return 0


def _launched(line: launch.Line, run: Run, stop: stops.Stop) -> int:
    run.begin()
    os.environ[_BEGUN] = "1"
    with _interruptible(run, stop):
        return launch.start(
            line, stop, lambda: (run.path / runs.VERIFICATION).is_file() or run.record.get("status") == "complete"
        )


_BEGUN = "SCALEPEFT_SESSION_BEGUN"
"""Set where the launcher has taken away what an earlier session left: what comes from then on is for this one."""


def train(recipe: Recipe, *, fresh: bool = False, stop: stops.Stop | None = None) -> Run:
    """Train and save a recipe, or go on where an earlier run of it stopped; `scalepeft.verify` then completes the run.

    Called by every process of a launch. A run that is complete, or trained and only not yet verified, is returned as it
    is. Raises UserError for what the user can mend and Interrupted when asked to stop, by SIGINT, SIGTERM, SIGUSR1 or a file
    STOP in the run directory: the same call then resumes. `stop` hears signals already.
    """
    run = Run(recipe.output_dir)
    with contextlib.nullcontext(stop) if stop else stops.Stop() as hearing, _interruptible(run, hearing):
        return _train(recipe, run, hearing, fresh=fresh)


@contextlib.contextmanager
def _interruptible(run: Run, stop: stops.Stop) -> Iterator[None]:
    """A signal before anything is trained is a stop like another: the marker is left, and the same command begins anew."""
    try:
        stop.interrupt()
        yield
    except (KeyboardInterrupt, Exception) as error:
        # an error of another library may be what became of the interruption; one of ours is a finding of its own
        if stop.remembers or isinstance(error, ScalepeftError) or not (stop.requested or isinstance(error, KeyboardInterrupt)):
            raise
        if not ranks.failed():  # else the launcher ends this process because of another
            stops.mark(run.path)
        raise Interrupted(f"{run.path}: stopped before training; the same command goes on") from error


def _train(recipe: Recipe, run: Run, stop: stops.Stop, *, fresh: bool) -> Run:
    quiet_upstream()
    state = runs.inspect(recipe, fresh=fresh, processes=ranks.processes())
    if speaks() and _BEGUN not in os.environ:
        run.begin()
    ranks.agree({"run directory": state, "recipe": recipes.flatten(recipe.resolved()), "installation": runs.packages()})
    if state == "complete":
        say(f"{run.path}: is complete already; --fresh moves it aside and trains anew")
    if state in ("complete", "trained"):
        return run
    missing_inputs(recipe)
    if recipe.training.get("push_to_hub") and speaks():
        push.check(recipe)
    offline_if_unreachable(recipe)

    from transformers import set_seed

    from scalepeft import data, engines, frozen, kinds, model, recording
    from scalepeft.session import session

    engines.make_ready()
    tokenizer = model.tokenizer(recipe)
    corpus = data.prepare(recipe, tokenizer, limit=model.longest_input(recipe, tokenizer))
    seen = ranks.agree(
        {
            "data": {name: prepared.key for name, prepared in corpus.sets.items()},
            "_written": {name: prepared.written for name, prepared in corpus.sets.items()},
        }
    )
    planned = expected.of_training(recipe, corpus)  # before DeepSpeed's arguments, which would divide the plan's model, too
    # several processes form their group here, after all preparation
    arguments = _arguments(recipe, run, resumed=state == "unfinished")
    on_cpu = arguments.device.type == "cpu"
    engines.refuse(recipe, engines.layout(arguments), optim=str(getattr(arguments.optim, "value", arguments.optim)), cpu=on_cpu)
    set_seed(arguments.seed)
    task = kinds.task(recipe, tokenizer, corpus.label_names)
    _check_best_metric(recipe, arguments, task, corpus)
    built, new = model.build(
        recipe,
        corpus.label_names,
        vocabulary=len(tokenizer),
        total_steps=_total_steps(recipe, arguments, corpus),
        checkpointing=arguments.gradient_checkpointing,
        examples=functools.partial(_examples, arguments, corpus, task),
    )
    parameters = model.parameters(built)  # before DPOTrainer adds its copy of the adapter
    kept = frozen.planned(recipe, built, arguments, run, corpus)
    with _refusals(recipe, run):
        trainer = kinds.trainer(recipe, model=built, args=arguments, task=task, run=run, corpus=corpus)
        engines.check(recipe, trainer.accelerator.distributed_type.value)
        trainer.make_optimizer()
    with session(recipe, run, corpus, trainer, stop, fresh=fresh) as checkpoint:
        recording.begun(recipe, run, corpus, trainer, parameters=parameters, seen=seen)
        if speaks():
            _tell(recipe, run, corpus, trainer, new=new, kept=kept, planned=planned)
        started = time.monotonic()
        with frozen.in_place(kept, trainer):
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            except Interrupted:
                recording.trained(run, corpus, trainer, time.monotonic() - started)
                raise
        recording.trained(run, corpus, trainer, time.monotonic() - started)
        recording.evaluated(run, trainer)
        if kept is not None and speaks():  # before what makes the run a trained one, which is not taken up again
            kept.forget()
        recording.saved(recipe, run, corpus, trainer)
    trainer.accelerator.end_training()
    return run


def _arguments(recipe: Recipe, run: Run, *, resumed: bool) -> TrainingArguments:
    """TrainingArguments from the recipe alone: the launch file says how many processes and which engine, no more."""
    import torch
    from transformers.integrations import get_available_reporting_integrations

    from scalepeft import engines

    on_cpu = launch.on_cpu() or not torch.accelerator.is_available()
    given: dict[str, Any] = {
        "use_cpu": on_cpu,  # without it upstream refuses bf16 on a CPU
        "dataloader_pin_memory": not on_cpu,
        "hub_private_repo": True,  # of a tracker that keeps its pages on the Hub
        "label_names": ["labels"],
        # it reads the loss of each micro-batch, for which an accelerator is waited for, and logs others in the place of a NaN
        "logging_nan_inf_filter": False,
        "restore_callback_states_from_checkpoint": recipe.early_stopping is not None,
    }
    if recipe.streams:
        given["train_sampling_strategy"] = "sequential"  # the stream is shuffled in itself
    # upstream would push the run directory as it stands, its pickled arguments included: see push.py
    given |= {**recipe.training, "output_dir": str(run.path), "push_to_hub": False}
    if recipe.global_batch_size is not None:  # before the arguments are made: DeepSpeed's are filled from them at once
        given["gradient_accumulation_steps"] = engines.accumulation(recipe, ranks.processes())
    if resumed and run.record["evaluation"]:  # before its first step, in the session that began it
        given["eval_on_start"] = False
    # read where neither bf16 nor fp16 is set: a launch file's mixed_precision would slip in
    os.environ["ACCELERATE_MIXED_PRECISION"] = recipe.precision
    module, _, name = upstream.TASK_ARGUMENTS[recipe.task].partition(":")
    try:
        arguments: TrainingArguments = getattr(importlib.import_module(module), name)(**given)
    except (ValueError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise recipe.error("training", one_line(error)) from error
    # it imports wandb where that is installed
    available = get_available_reporting_integrations() if arguments.report_to else ()
    for name in arguments.report_to:
        if name not in available:
            raise recipe.error("training.report_to", f"{name!r} is not installed; there are {', '.join(available) or 'none'}")
    if "paged" in arguments.optim and arguments.device.type == "cpu":
        note(
            f"training.optim: {recipe.training['optim']} pages nothing on a CPU; it works as the same optimizer without paging"
        )
    os.environ.setdefault("WANDB_DIR", str(run.path))  # beside the run's other files, not in the working directory
    # one process drives one device: upstream would start DataParallel, which multiplies the batch, and has no option against it
    arguments._n_gpu = min(arguments.n_gpu, 1)  # noqa: SLF001
    return arguments


@contextlib.contextmanager
def _refusals(recipe: Recipe, run: Run) -> Iterator[None]:
    """What upstream refuses when it makes trainer and optimizer, as errors of the recipe that leave nothing behind."""
    try:
        yield
    except OSError as error:
        raise recipe.error("training.output_dir", f"{run.path} cannot be written: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError) as error:
        with contextlib.suppress(OSError):  # upstream has made the directory already; only an empty one goes
            run.path.rmdir()
        raise recipe.error("training", one_line(error)) from error


def _total_steps(recipe: Recipe, arguments: TrainingArguments, corpus: Corpus) -> int:
    from scalepeft.streams import Streamed
    from scalepeft.trainer import step_batches, total_steps

    if isinstance(corpus.train, Streamed):
        corpus.train.rows.taken = arguments.max_steps * step_batches(arguments, corpus.train.lengths).global_batch
    batches = step_batches(arguments, corpus.sets["train"].lengths)
    if not len(batches):
        raise recipe.error("training.dataloader_drop_last", "leaves no batch: there are fewer rows than one step takes")
    return total_steps(arguments, batches)


def _examples(arguments: TrainingArguments, corpus: Corpus, task: Task) -> Iterator[Mapping[str, torch.Tensor]]:
    """The first training batches in the order of a single process, for initialisations that look at data."""
    from scalepeft.initialisations import EXAMPLE_BATCH, EXAMPLE_ROWS
    from scalepeft.sampler import StepBatches
    from scalepeft.trainer import Rows

    prepared = corpus.sets["train"]
    seed = arguments.data_seed if arguments.data_seed is not None else arguments.seed
    batches = StepBatches(prepared.lengths, batch_size=EXAMPLE_BATCH, seed=seed, strategy=arguments.train_sampling_strategy)
    rows = Rows(prepared.rows)
    for indices in itertools.islice(batches, EXAMPLE_ROWS // EXAMPLE_BATCH):
        yield task.collate(rows.__getitems__(indices))


def _check_best_metric(recipe: Recipe, arguments: TrainingArguments, task: Task, corpus: Corpus) -> None:
    """A metric that no evaluation gives is refused now: upstream says so after the first epoch."""
    figures = task.figures
    others = [f"{name}_{figure}" for name in list(corpus.evaluation)[1:] for figure in figures]
    metric = (arguments.metric_for_best_model or "loss").removeprefix("eval_")
    if metric not in (*figures, *others):
        told = did_you_mean(metric, [*figures, *others]) or f"; there are {', '.join([*figures, *others])}"
        raise recipe.error("training.metric_for_best_model", f"no evaluation gives {metric!r}{told}")


def _tell(
    recipe: Recipe,
    run: Run,
    corpus: Corpus,
    trainer: RecipeTraining,
    *,
    new: Sequence[str],
    kept: Frozen | None,
    planned: expected.Expected | str | None,
) -> None:
    """Show what is about to be trained, and record what is expected of it."""
    from scalepeft import panel

    say(panel.start(recipe, run, corpus, trainer, new))
    if kept is not None:
        say(f"  frozen   {kept.told()}")
    if isinstance(planned, str):
        say(f"  plan     none: {planned}")
    elif planned is not None:
        say(f"  plan     {forecast.verdict(planned)}")
        run.update(prediction={"peak_bytes": planned.peak, "needed_bytes": planned.needed[1]})


def _verify_in_place_of_this(run: Run, stop: stops.Stop) -> None:
    """Become the verification: the training process is gone, and all its memory with it, before the base is loaded again."""
    stops.held_back()  # the verification hears what comes from here on
    if stop.requested:
        run.interrupt(f"{run.path}: trained and saved, not verified; the same command does that")
        raise Interrupted(run.record["reason"])
    atexit._run_exitfuncs()  # noqa: SLF001  # trackers upload what they hold at exit, which exec skips
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHER) or k == "ACCELERATE_USE_CPU"}
    os.execve(  # noqa: S606  # our own program, by its full path
        sys.executable, [sys.executable, "-m", "scalepeft.verify", str(run.path)], environment
    )


_LAUNCHER = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "FSDP_", "DEEPSPEED_")
"""Beginnings of the variables by which launchers tell a process its place among others."""


if __name__ == "__main__":
    sys.exit(program(main))
