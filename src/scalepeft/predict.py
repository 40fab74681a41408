"""The trained model of a run at work: `scalepeft evaluate`, `scalepeft predict` and `scalepeft chat`."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import generate
from scalepeft import run as runs
from scalepeft.console import note, quiet_upstream, say, table
from scalepeft.errors import UserError
from scalepeft.fetch import offline_if_unreachable
from scalepeft.generate import Chat, Sampling
from scalepeft.recipe import Recipe
from scalepeft.run import Run

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from scalepeft.prepared import Prepared
    from scalepeft.tasks import Task


def evaluate_main(arguments: Sequence[str]) -> int:
    """`scalepeft evaluate RUN [data.key=value ...] [--output FILE]`."""
    parser = argparse.ArgumentParser(
        prog="scalepeft evaluate",
        description="Evaluate a complete run on its recipe's named sets, and on those that overrides add.",
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("overrides", nargs="*", metavar="data.key=value", help="e.g. data.evaluation.new.path=new.csv")
    parser.add_argument("--output", type=Path, help="write the figures as JSON to this new file")
    options = parser.parse_intermixed_args(arguments)
    allowed = ("data.", "training.per_device_eval_batch_size=")
    foreign = [o for o in options.overrides if not o.startswith(allowed) or o.startswith("data.label_names")]
    if foreign:
        told = "of a trained run only data.* but the label names, and training.per_device_eval_batch_size, may change"
        raise UserError(f"command line: {foreign[0]!r}: {told}")
    _refuse_existing(options.output)
    found = evaluate(_complete(options.run), options.overrides)
    if options.output:
        try:
            runs.write(options.output, json.dumps(found, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"{options.output}: cannot be written: {error.strerror}") from None
    from scalepeft.report import figures, per_class

    names = figures(next(iter(found.values())))
    say(table([("", *found), *((name, *(f"{of[name]:.4f}" for of in found.values())) for name in names)]))

    for name, of in found.items():
        if "per_class" in of:
            say(f"\n{name}\n{per_class(of)}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """`scalepeft predict RUN --data FILE --output FILE`: labels as csv, completions of a language model as JSON lines."""
    parser = argparse.ArgumentParser(
        prog="scalepeft predict", description="Label the rows of a file, or complete its prompts, with a complete run."
    )
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--data", type=Path, required=True, help="a file with the recipe's text columns, or with prompts")
    parser.add_argument("--output", type=Path, required=True, help="the .csv or .jsonl file to write; it must not exist")
    language = parser.add_argument_group("of language models")
    _add_sampling(language)
    language.add_argument("--batch-size", type=int, help="prompts completed at a time (8)")
    options = parser.parse_args(arguments)
    run = _complete(options.run)
    generative = run.recipe().generative
    suffix, what = (".jsonl", "completions are JSON lines") if generative else (".csv", "labels are csv")
    if options.output.suffix != suffix:
        raise UserError(f"{options.output}: {what}; give an --output that ends in {suffix}")
    _refuse_existing(options.output)
    given = _given(options, (*_SAMPLING, "batch_size"))
    if generative:
        size = given.pop("batch_size", 8)
        if size < 1:
            raise UserError(f"command line: --batch-size is {size}; it is at least 1")
        rows = generate.complete(run, options.data, options.output, Sampling(**given), batch_size=size)
    elif given:
        raise UserError(f"command line: {_option(next(iter(given)))} is for language models; {run.path} classifies")
    else:
        rows = predict(run, options.data, options.output)
    say(f"{options.output}: {rows:,} rows")
    return 0


def chat_main(arguments: Sequence[str]) -> int:
    """`scalepeft chat RUN`: a conversation in the terminal; from a pipe, one turn a line."""
    parser = argparse.ArgumentParser(prog="scalepeft chat", description="Talk with a complete run of a language model.")
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--system-prompt", help="what the model is told first; the recipe's data.system_prompt when absent")
    _add_sampling(parser)
    options = parser.parse_args(arguments)
    run = _complete(options.run)
    if not run.recipe().generative:
        raise UserError(f"{run.path}: its model classifies and does not write; `scalepeft predict` labels rows with it")
    chat = Chat(run, Sampling(**_given(options, _SAMPLING)), system_prompt=options.system_prompt)
    if sys.stdin.isatty():
        note("/reset begins anew, /quit or Ctrl-D leaves, Ctrl-C stops an answer")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() then edits lines and remembers them
    for text in _turns():
        if text == "/quit":
            break
        if text == "/reset":
            chat.reset()
        elif text.startswith("/") and text[1:].isalpha():
            note(f"there is no {text}; there are /reset and /quit")
        elif text:
            chat.say(text)
    return 0


def _turns() -> Iterator[str]:
    """What is typed, line by line, until Ctrl-D."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            if prompt:
                say()  # the shell's prompt begins a line
            return
        except KeyboardInterrupt:
            note("")


_SAMPLING = {
    "max_new_tokens": "the longest answer in tokens (256)",
    "temperature": "what logits are divided by before a token is drawn; 0, the default, takes the likeliest",
    "top_p": "draw from the fewest tokens whose probabilities sum up to this (1)",
    "seed": "the seed of the draws (42)",
}
"""The options of Sampling."""


def _add_sampling(parser: argparse._ActionsContainer) -> None:
    for name, what in _SAMPLING.items():
        parser.add_argument(_option(name), type=type(getattr(Sampling, name)), help=what)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those of the options that the command line names."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


def evaluate(run: Run, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """Each named set's metrics, per-class table and confusion matrix, by the run's saved weights."""
    labels = run.record["labels"]
    recipe = run.recipe(list(overrides))
    offline_if_unreachable(recipe)
    quiet_upstream()
    import numpy as np

    from scalepeft import data, model

    task = _task(run, recipe)
    limit = model.longest_input(recipe, task.tokenizer)
    corpus = data.prepare(recipe, task.tokenizer, limit=limit, need_train=False, label_names=labels)
    if not corpus.evaluation:
        raise UserError(f"{run.path}: its recipe names no evaluation set; name one: data.evaluation.NAME.path=FILE")
    trained, found = model.load(run, folded=recipe.task != "preference"), {}  # rewards are measured from the base
    task.ready(trained, run)
    for name, prepared in corpus.evaluation.items():
        rows = Computing(recipe, task, prepared)(np.arange(len(prepared.rows)), partial(task.measure, trained))
        references = np.empty(0) if recipe.generative else prepared.labels
        found[name] = task.metrics(rows, references) | task.details(rows, references)
    return found


def predict(run: Run, file: Path, output: Path) -> int:
    """Write the label, name and probabilities (regression: the score) of each row of a file as csv, in the file's order.

    Returns the number of rows.
    """
    labels = run.record["labels"]
    recipe = run.recipe()
    offline_if_unreachable(recipe)
    quiet_upstream()
    import numpy as np
    import torch

    from scalepeft import data, model
    from scalepeft.tasks import SequenceClassification

    task = _task(run, recipe)
    limit = model.longest_input(recipe, task.tokenizer)
    prepared = data.prepare_file(recipe, task.tokenizer, file, limit=limit, label_names=labels)
    assert isinstance(task, SequenceClassification)  # noqa: S101  # the caller's condition
    trained = model.load(run, folded=True)

    def logits(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = trained(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return found

    def lines() -> Iterator[list[Any]]:
        """The file's rows, so many computed at a time."""
        numbers, computing = prepared.rows["row"][:], Computing(recipe, task, prepared)
        step = max(1, _HELD // len(task.columns))
        for start in range(0, len(numbers), step):
            places = np.arange(start, min(start + step, len(numbers)))
            answers = task.answers(torch.from_numpy(computing(places, logits)))
            yield from ([numbers[place], *answer] for place, answer in zip(places, answers, strict=True))

    beside = output.with_name(f"{output.name}.part")
    try:
        with beside.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["row", *task.columns])
            writer.writerows(lines())
        beside.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    finally:
        beside.unlink(missing_ok=True)  # where it has not become the output
    return len(prepared.rows)


_HELD = 2**20
"""Numbers of a file of predictions that are held at a time: rows are put into order within so many."""

_TOKENS = {"cpu": 1_024}
_TOKENS_OF_ACCELERATORS = 16_384
"""Tokens of a batch where the recipe does not say how many rows it has, by the device: those of more tokens take longer for
each row on two cores (MiniLM, by 10 % at 2,048 and by 40 % at 4,096); on an accelerator not measured."""


class Computing:
    """A model at work on prepared rows, under the recipe's precision: the longest rows first, among others of their length."""

    def __init__(self, recipe: Recipe, task: Task, prepared: Prepared) -> None:
        from scalepeft.trainer import Rows

        self.recipe, self.task = recipe, task
        self.rows, self.lengths = Rows(prepared.rows), prepared.lengths

    def __call__(
        self, places: NDArray[np.int64], compute: Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
    ) -> NDArray[np.float32]:
        """What `compute` makes of the rows at some places, in their order (rows x numbers); no more than that is held."""
        import numpy as np
        import torch

        from scalepeft import model

        device = model.device()
        found: NDArray[np.float32] | None = None
        with torch.inference_mode(), model.precision(self.recipe):
            for batch in self.batches(self.lengths[places], device.type):
                inputs = self.task.collate(self.rows.__getitems__(places[batch].tolist()))
                numbers = compute({name: tensor.to(device) for name, tensor in inputs.items()}).float().cpu().numpy()
                if found is None:
                    found = np.empty((len(places), *numbers.shape[1:]), dtype=np.float32)
                found[batch] = numbers
        assert found is not None  # noqa: S101  # prepared rows are never none
        return found

    def batches(self, lengths: NDArray[np.int64], device: str) -> Iterator[NDArray[np.int64]]:
        """Numbers of rows: as many as the recipe says, or those of so many tokens."""
        import numpy as np

        from scalepeft.sampler import StepBatches, token_batches

        if (size := self.recipe.training.get("per_device_eval_batch_size")) is None:
            yield from token_batches(lengths, tokens=_TOKENS.get(device, _TOKENS_OF_ACCELERATORS))
        else:
            yield from map(np.asarray, StepBatches(lengths, batch_size=size, strategy="longest_first"))


def _task(run: Run, recipe: Recipe) -> Task:
    from scalepeft import kinds, model

    return kinds.task(recipe, model.tokenizer_of(run), run.record["labels"])


def _complete(path: Path) -> Run:
    run = Run(path)
    run.recipe()
    if run.record["status"] != "complete":
        reason = f" ({run.record['reason']})" if run.record.get("reason") else ""
        raise UserError(f"{path}: the run is {run.record['status']}{reason}; train it to the end first")
    return run


def _refuse_existing(output: Path | None) -> None:
    if output is not None and output.exists():
        raise UserError(f"{output}: exists already; give another --output")
    if output is not None and not output.absolute().parent.is_dir():
        raise UserError(f"{output}: there is no folder {output.absolute().parent}")
