"""The two ways of training: classification by transformers' Trainer, language models by TRL's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from scalepeft import upstream
from scalepeft.data import Corpus
from scalepeft.recipe import Recipe
from scalepeft.run import Run
from scalepeft.tasks import SequenceClassification, SequenceRegression, Task
from scalepeft.trainer import ClassificationTrainer, RecipeTraining


def task(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> Task:
    """What a recipe trains."""
    if recipe.generative:
        from scalepeft.language import CausalLM, Preference  # TRL takes seconds to import

        if recipe.task == "causal-lm":
            return CausalLM(tokenizer)
        multiple = option(recipe, "pad_to_multiple_of")
        multiple = multiple if isinstance(multiple, int) else None
        return Preference(tokenizer, beta=float(option(recipe, "beta")), pad_to_multiple_of=multiple)
    kind = SequenceRegression if recipe.regression else SequenceClassification
    return kind(tokenizer, labels, label_smoothing=float(option(recipe, "label_smoothing_factor")))


def trainer(recipe: Recipe, *, model: Any, args: TrainingArguments, task: Task, run: Run, corpus: Corpus) -> RecipeTraining:
    """Upstream's trainer of the task, made this project's."""
    kind: Any = ClassificationTrainer
    if recipe.generative:
        from scalepeft.language import PreferenceTrainer, SupervisedTrainer

        kind = {"causal-lm": SupervisedTrainer, "preference": PreferenceTrainer}[recipe.task]
    made: RecipeTraining = kind(recipe, model=model, args=args, task=task, run=run, corpus=corpus)
    return made


def option(recipe: Recipe, name: str) -> Any:
    """An option of the training section, or upstream's default of it."""
    given = recipe.training.get(name)
    return upstream.fields(upstream.TASK_ARGUMENTS[recipe.task])[name].default if given is None else given
