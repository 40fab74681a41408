"""The verbs of the command line and the modules that hold them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from scalepeft.errors import UserError, did_you_mean, program

COMMANDS = {
    "train": ("scalepeft.train:main", "train an adapter as a recipe says"),
    "check": ("scalepeft.recipe:main", "find every problem of recipes, each with its line"),
    "schema": ("scalepeft.schema:main", "print the JSON Schema of recipes or run directories"),
    "fetch": ("scalepeft.fetch:main", "bring the small models and data of the quickstart"),
    "preview": ("scalepeft.preview:main", "show rows as the model will see them"),
    "plan": ("scalepeft.plan:main", "predict memory, work and cost of a recipe before it is run"),
    "doctor": ("scalepeft.doctor:main", "look at what this machine has for training"),
    "evaluate": ("scalepeft.predict:evaluate_main", "measure a trained run on labelled rows"),
    "predict": ("scalepeft.predict:main", "label rows, or complete prompts, with a trained run"),
    "chat": ("scalepeft.predict:chat_main", "talk with a trained language model"),
    "compare": ("scalepeft.compare:main", "show what differs between runs, in one table or page"),
    "sweep": ("scalepeft.sweep:main", "train a recipe with every combination of some values"),
    "submit": ("scalepeft.submit:main", "queue a training, and what follows it, as jobs of Slurm's"),
    "merge": ("scalepeft.merge:main", "fold an adapter into its base"),
    "export": ("scalepeft.export:main", "write a model for vLLM, onnxruntime or llama.cpp"),
    "push": ("scalepeft.push:main", "publish a run or a merged model on the Hub"),
}
"""Each verb's function, as `module:function`, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The program `scalepeft`; returns its exit status."""
    return program(_dispatch, arguments)


def _dispatch(arguments: Sequence[str]) -> int | None:
    verb, *rest = arguments or [""]
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        import scalepeft

        print(f"scalepeft {scalepeft.__version__}")
        return 0
    if not verb:
        raise UserError(_help())
    if verb not in COMMANDS:
        raise UserError(f"scalepeft: there is no verb {verb!r}{did_you_mean(verb, COMMANDS) or '; see scalepeft --help'}")
    module, _, function = COMMANDS[verb][0].partition(":")
    status: int | None = getattr(importlib.import_module(module), function)(rest)
    return status


def _help() -> str:
    verbs = "\n".join(f"  {verb:10}{what}" for verb, (_, what) in COMMANDS.items())
    return f"usage: scalepeft VERB ...\n\n{verbs}\n\n`scalepeft VERB --help` says more of a verb; there is also --version."


if __name__ == "__main__":
    sys.exit(main())
