"""The YAML file as a frozen, checked value."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scalepeft import check, document, upstream
from scalepeft.document import Document, dump, flatten
from scalepeft.errors import UserError, did_you_mean, program
from scalepeft.upstream import Field, Type

__all__ = [
    "Augmentation", "Data", "ExistingAdapter", "Holdout", "Model", "Recipe", "Source", "dump", "find", "flatten", "load",
    "shipped_recipes",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Model:
    """The base model, in the words of `from_pretrained`."""

    name_or_path: str
    """A Hub id, a folder, or `fetched:NAME` for what `scalepeft fetch` brings."""
    revision: str | None = None
    """Branch, tag or commit of the Hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The dtype the weights are loaded in; auto takes the checkpoint's."""
    attn_implementation: str | None = None
    """The attention implementation (sdpa, eager, flash_attention_2, ...); upstream chooses when absent."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless said here."""
    use_safetensors: bool = True
    """Load safetensors only. false also admits pickled weights, which can run code."""
    added_tokens: list[str] = field(default_factory=list)
    """Special tokens to add to the tokenizer; the embedding grows by them, and the adapter trains and keeps the new rows."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the model's own configuration (dropout, problem_type, ...) to set before it is built."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source of rows, in the words of `load_dataset`."""

    path: str
    """A Hub id, a csv, tsv, json, jsonl or parquet file, a saved data set folder, or `fetched:NAME/FILE`."""
    name: str | None = None
    """The configuration name of a Hub data set."""
    split: str | None = None
    """The split of a Hub data set or a saved folder of splits; a file has none."""
    revision: str | None = None
    """Branch, tag or commit of the Hub id."""
    text_columns: str | list[str] | None = None
    """Overrides data.text_columns for this source."""
    label_column: str | None = None
    """Overrides data.label_column for this source."""
    format: Literal["messages", "conversations", "instruction", "prompt-completion", "text"] | None = None
    """Overrides data.format for this source."""
    columns: dict[str, str] = field(default_factory=dict)
    """Overrides data.columns for this source, name by name."""
    first_rows: int | None = None
    """Take only the first N rows."""
    sample_rows: int | None = None
    """Take N rows drawn without replacement with sample_seed, in the order of the source."""
    sample_seed: int = 42
    """The seed of sample_rows."""
    streaming: bool = False
    """Read the training rows while training, not before: for what is too large to be prepared. Needs training.max_steps."""
    buffer_size: int = 10_000
    """Streaming: the order of the rows is drawn within windows of so many; 1 keeps that of the source."""
    weight: float | None = None
    """The share of this source among several; the largest mixture that repeats no row is drawn."""


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """A part of the training rows that is held out and evaluated under the name `holdout`."""

    size: int | float
    """A number of rows, or a share of them below 1."""
    seed: int = 42
    """The seed of the draw."""
    stratified: bool = True
    """Keep each label's share the same on both sides."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Copies of the training rows in which some words are replaced by synonyms of WordNet."""

    share: float = 0.1
    """The share of a text's words to replace, rounded down, at least one; fewer where fewer have a fitting synonym."""
    copies: int = 1
    """Augmented copies of each training row, beside the row itself."""
    keep_unchanged: bool = False
    """Keep a copy in which no word has a fitting synonym, so that all rows count alike; otherwise it is left out."""
    seed: int = 42
    """The seed of the choice of words and synonyms."""
    wordnet: str | None = None
    """A folder with WordNet's data.noun, index.noun, ...; found in the usual places when absent."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is trained and evaluated on."""

    train: Source | list[Source]
    """One source of training rows, or several to mix."""
    evaluation: dict[str, Source] = field(default_factory=dict)
    """Evaluation sets by name. The first is the main one: its metrics are eval_*, the others' eval_NAME_*."""
    holdout: Holdout | None = None
    """Cut an evaluation set from the training rows; it then is the main one."""
    augmentation: Augmentation | None = None
    """Add copies of the training rows with some words replaced by synonyms; evaluation rows stay as they are."""
    text_columns: str | list[str] = "text"
    """Classification: the column of the text, or the two columns of a pair."""
    label_column: str = "label"
    """Classification: the column of the label: an integer or a name."""
    label_names: list[str | int] | None = None
    """Classification: the names of labels 0, 1, ...; found from the data set or the training rows when absent."""
    max_length: int | None = None
    """Classification: longest input in tokens, special tokens included; the model's own limit when absent.

    The other tasks have training.max_length."""
    format: Literal["messages", "conversations", "instruction", "prompt-completion", "text"] | None = None
    """Language models: how a row tells its turns; recognised by its columns when absent."""
    columns: dict[str, str] = field(default_factory=dict)
    """Language models: for columns that are called otherwise, the usual name and the name here, e.g. {messages: dialogue}."""
    system_prompt: str | None = None
    """Language models: the system message of a conversation that has none; the chat template's own when absent."""
    on_bad_rows: Literal["error", "drop"] = "error"
    """What to do with a row without usable text or label: stop and name it, or drop, count and record it."""


@dataclass(frozen=True, kw_only=True)
class ExistingAdapter:
    """An adapter to continue from."""

    name_or_path: str
    """A run directory, an adapter folder or a Hub id."""
    revision: str | None = None
    """Branch, tag or commit of the Hub id."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe after checking: our own sections as values, upstream's as the options they are forwarded with."""

    extends: str | None = None
    """Another recipe, as a path from this one, whose values hold where this one says nothing; null here removes one of them."""
    task: Literal["sequence-classification", "causal-lm", "preference"]
    """What is trained: a classifier (or a regression), a language model on its answers (SFT), or on preferred answers (DPO)."""
    model: Model
    """The base model."""
    quantization: Mapping[str, Any] | None = None
    """Options of transformers' BitsAndBytesConfig; absent: no quantisation."""
    adapter: Mapping[str, Any] | None = None
    """peft_type and the options of peft's configuration for it, or name_or_path of an adapter to continue from.

    Absent: full fine-tuning."""
    data: Data
    """Training and evaluation rows."""
    training: Mapping[str, Any] = field(default_factory=dict)
    """Options of transformers' TrainingArguments; for causal-lm of TRL's SFTConfig, for preference of its DPOConfig."""
    early_stopping: Mapping[str, Any] | None = None
    """Options of transformers' EarlyStoppingCallback; absent: no early stopping."""
    global_batch_size: int | None = None
    """Rows per optimizer step over all processes; gradient accumulation is derived from it."""
    cache_frozen_layers: str | None = None
    """Classification with an adapter on the last layers: run the layers before them once for each row, without their dropout,
    and keep what they give on disk while training, at most so much of it (20GB); absent: run them in each step."""

    document: Document
    """The file it was read from."""

    @property
    def name(self) -> str:
        """The recipe's file name without its suffix."""
        return self.document.path.stem

    @property
    def output_dir(self) -> Path:
        """The run directory: training.output_dir, or runs/<recipe name>."""
        return Path(self.training.get("output_dir") or Path("runs") / self.name).expanduser()

    @property
    def generative(self) -> bool:
        """Whether the model writes text, so that its rows are conversations and TRL trains it."""
        return self.task in upstream.LANGUAGE_TASKS

    @property
    def precision(self) -> str:
        """Mixed precision: bf16, fp16 or no. TRL's configurations take bf16 when nothing is said."""
        default = "bf16" if self.generative and self.training.get("bf16") is None and not self.training.get("fp16") else "no"
        return next((name for name in ("bf16", "fp16") if self.training.get(name)), default)

    @property
    def streams(self) -> bool:
        """Whether the training rows are read while training."""
        return isinstance(self.data.train, Source) and self.data.train.streaming

    @property
    def regression(self) -> bool:
        """Whether the label is a number to predict, by transformers' own word for it: model.config.problem_type."""
        return self.model.config.get("problem_type") == "regression"

    def error(self, key: str, message: str) -> UserError:
        """A one-line error that points to where a dotted key stands."""
        return UserError(f"{self.document.where(key.split('.'))}: {key}: {message}")

    def resolved(self) -> dict[str, Any]:
        """The recipe as plain values after overrides, without defaults: what another run of it would be given."""
        return self.document.values


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    `overrides` have the form `section.key=value`, the value in YAML. Raises UserError with all problems at once.
    """
    read = document.override(document.read(find(path)), overrides)
    if problems := check.problems(read):
        raise UserError(*problems)
    return Recipe(**_values(read.values, check.recipe_fields()), document=read)


def find(path: str | os.PathLike[str]) -> Path:
    """The file of a recipe: a path, or the bare name of a shipped recipe."""
    shipped = shipped_recipes()
    if str(path) in shipped and not _exists(path, folders=False):
        return shipped[str(path)]
    if _exists(path):
        return Path(path)
    known = [str(p) for p in Path(path).parent.glob("*.y*ml")] if Path(path).suffix else list(shipped)
    raise UserError(f"{path}: no such recipe{did_you_mean(str(path), known)}")


def _exists(path: str | os.PathLike[str], *, folders: bool = True) -> bool:
    try:
        return Path(path).exists() if folders else Path(path).is_file()
    except (OSError, ValueError):  # a name that no file can have: too long, or with a null character
        return False


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name: inside an installed wheel, or beside the sources."""
    here = Path(__file__).parent
    folder = next((f for f in (here / "recipes", here.parents[1] / "recipes") if f.is_dir()), here)
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in sorted(folder.rglob("*.yaml"))}


def _values(section: Mapping[str, Any], known: Mapping[str, Field]) -> dict[str, Any]:
    """The arguments of one of our own dataclasses from checked values; null means the default."""
    return {name: _value(value, known[name].type) for name, value in section.items() if value is not None}


_OURS = {f"{__package__}.recipe:{kind.__name__}": kind for kind in (Model, Source, Holdout, Augmentation, Data)}


def _value(value: Any, kind: Type) -> Any:
    if kind.section and isinstance(value, dict):
        return _OURS[kind.section](**_values(value, upstream.fields(kind.section)))
    if kind.items and isinstance(value, list):
        return [_value(item, kind.items) for item in value]
    if kind.items and isinstance(value, dict):
        return {name: _value(item, kind.items) for name, item in value.items()}
    return value


def main(arguments: Sequence[str]) -> int:
    """`scalepeft check`: every problem of every recipe, in milliseconds and without importing torch."""
    parser = argparse.ArgumentParser(
        prog="scalepeft check", description="Print every problem of every recipe, without importing torch."
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="a recipe, the name of a shipped one, or a folder of them")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides, applied to every recipe")
    parser.add_argument("--resolved", action="store_true", help="print each recipe whole, with where each value comes from")
    options = parser.parse_intermixed_args(arguments)
    given = options.recipes
    overrides = [text for text in given if "=" in text and not _exists(text)]
    files = [text for text in given if text not in overrides]
    problems = [] if files else ["command line: no recipe is named, only overrides"]
    for path in files:
        problems += [problem for file in _inside(path) for problem in _problems(file, overrides, resolved=options.resolved)]
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return 0


def _inside(path: str) -> list[str]:
    """The recipes of a folder and of the folders in it; what is no folder names one recipe."""
    if not _exists(path) or not Path(path).is_dir():
        return [path]
    return sorted(map(str, Path(path).rglob("*.yaml"))) or [str(Path(path) / "*.yaml")]


def _problems(path: str, overrides: Sequence[str], *, resolved: bool) -> Sequence[str]:
    try:
        recipe = load(path, overrides)
    except UserError as error:
        return error.problems
    print(f"# {path}\n{document.annotated(recipe.document)}" if resolved else f"{path}: ok")
    return ()


if __name__ == "__main__":
    sys.exit(program(main))
