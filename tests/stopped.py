"""Train recipes that are stopped and taken up again, in the processes of one launch: starting them costs more than training.

    accelerate launch ... tests/stopped.py PLAN

PLAN is a JSON list of [recipe, [[where, step, rank], ...], finish]: at each place the process of that rank gets SIGUSR1, or
for the place "file" makes STOP, and the recipe is trained again when it has stopped. `where` is step, save or evaluation.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import several  # before accelerate, for which it may set a variable
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from scalepeft import checkpoint, published, stops
from scalepeft import recipe as recipes
from scalepeft.callbacks import StopRequest
from scalepeft.errors import Interrupted
from scalepeft.run import Run
from scalepeft.train import train

RANK = int(os.environ.get("RANK", "0"))


@contextmanager
def signalled(where: str, step: int, rank: int, run: Run):
    """Let this process be signalled at a place of its training, if it is its turn; once."""
    sent = []

    def signal_at(found: int) -> None:
        if rank == RANK and found == step and not sent:
            sent.append(where)
            if where == "file":
                (run.path / stops.STOP).touch()
            else:
                os.kill(os.getpid(), signal.SIGUSR1)

    def calling(function, step_of):
        def called(*arguments, **options):
            signal_at(step_of(arguments))
            return function(*arguments, **options)

        return called

    owner, name, step_of = {
        "step": (StopRequest, "on_step_end", lambda given: given[2].global_step),
        "file": (StopRequest, "on_step_end", lambda given: given[2].global_step),
        "evaluation": (StopRequest, "on_prediction_step", lambda given: given[2].global_step),
        "save": (published, "digests", lambda given: int(given[0].name.partition("-")[2].removesuffix(".part"))),
    }[where]
    kept = getattr(owner, name)
    setattr(owner, name, calling(kept, step_of))
    try:
        yield
    finally:
        setattr(owner, name, kept)


def carry_out(recipe: Path, places: Sequence[tuple[str, int, int]], *, training, finish: bool = True) -> Run:
    """Train a recipe, stopped at places on the way, to its end unless that is left to others."""
    run = Run(recipes.load(recipe).output_dir)
    for where, step, rank in places:
        told = ""
        with signalled(where, step, rank, run):
            try:
                training(recipe)
            except Interrupted as error:
                told = str(error)
        assert f"stopped at step {step} of" in told, (where, step, told)
        if RANK:  # what process 0 left it may be taking up already
            continue
        assert stops.marked_by_file(run.path) == (where == "file")
        assert (run.path / stops.INTERRUPTED).exists()
        assert not (run.path / stops.STOP).exists()
        assert run.record["status"] == "interrupted"
        assert published.step_of(run.last_checkpoint()) == step
    return training(recipe) if finish else run


def slowly(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
    """As safetensors writes, under a name of its own first, and so slowly that another process meets that name."""
    beside = path.with_name(".tmpSlowly")
    save_file(tensors, beside, metadata=metadata)
    time.sleep(0.3)
    beside.rename(path)


def main() -> None:
    overrides = several.prepared()
    assert checkpoint.save_file is save_file
    if RANK:
        checkpoint.save_file = slowly
    for recipe, places, finish in json.loads(Path(sys.argv[1]).read_text()):
        AcceleratorState._reset_state()
        carry_out(Path(recipe), places, finish=finish, training=lambda path: train(recipes.load(path, overrides)))


if __name__ == "__main__":
    main()
