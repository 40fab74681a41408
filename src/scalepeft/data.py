"""The rows of a recipe: training and evaluation sets, from sources to prepared rows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from scalepeft import augment
from scalepeft import labels as labelling
from scalepeft.errors import UserError, one_line
from scalepeft.fetch import sources
from scalepeft.prepared import Part, Preparation, Prepared, choose
from scalepeft.recipe import Recipe, Source
from scalepeft.sources import Fail, Wanted, open_source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All rows of a recipe."""

    train: Prepared | None
    evaluation: Mapping[str, Prepared]
    """By name, the main set first."""
    label_names: list[str]
    """The names of labels 0, 1, ..."""
    revisions: Mapping[str, str]
    """By the path of each source: the commit of a Hub id, the sha256 of a file; by WordNet's folder: its version and sha256."""

    @property
    def sets(self) -> dict[str, Prepared]:
        """The training rows under the name `train`, when they were asked for, and the evaluation sets."""
        return ({"train": self.train} if self.train else {}) | dict(self.evaluation)


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    *,
    limit: int,
    need_train: bool = True,
    label_names: Sequence[str] | None = None,
) -> Corpus:
    """The rows of a recipe, from the cache or prepared now.

    `limit` is the model's longest input in tokens. `label_names`, those of a trained model, stand above the recipe's.
    """
    parts = {key: _part(recipe, key, source) for key, source in sources(recipe)}
    training = [part for key, part in parts.items() if not key.startswith("data.evaluation.")]
    preparation = Preparation(recipe, tokenizer, limit)
    augmenter = augment.augmenter(recipe) if need_train else None  # a holdout is the same without
    labels = labelling.declared(recipe, [part.opened for part in training], label_names)
    train: Prepared | None = None
    if need_train or recipe.data.holdout:
        train, labels = preparation("train", training, labels, augmenter)
        if len(present := np.unique(train.labels)) < 2:
            only = present[0] if recipe.regression else labels.names[int(present[0])]
            raise recipe.error("data.train", f"all {len(train.rows):,} training rows have the one label {only!r}")
    labels = labels or labelling.found(recipe, [chosen.labels() for chosen in choose(training)])
    evaluation: dict[str, Prepared] = {}
    if recipe.data.holdout and train:
        train, evaluation["holdout"] = _cut(recipe, train)
    for name in recipe.data.evaluation:
        evaluation[name], _ = preparation(name, [parts[f"data.evaluation.{name}"]], labels)
    return Corpus(
        train=train if need_train else None,
        evaluation=evaluation,
        label_names=labels.names,
        revisions={part.source.path: part.opened.revision for part in parts.values()}
        | ({str(augmenter.wordnet.folder): augmenter.wordnet.version} if augmenter else {}),
    )


def prepare_file(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, path: str | os.PathLike[str], *, limit: int, label_names: Sequence[str]
) -> Prepared:
    """The rows of a file to predict, in its order. Its labels may be absent."""
    source = Source(path=os.fspath(path))

    def fail(_: str, problem: str) -> UserError:
        return UserError(problem if source.path in problem else f"{source.path}: {problem}")

    wanted = replace(_wanted(recipe, source, fail), label_optional=True)
    part = Part(source=source, wanted=wanted, opened=open_source(source, wanted))
    prepared, _ = Preparation(recipe, tokenizer, limit)(source.path, [part], labelling.declared(recipe, [], label_names))
    return prepared


def _wanted(recipe: Recipe, source: Source, fail: Fail) -> Wanted:
    texts = source.text_columns or recipe.data.text_columns
    label = source.label_column or recipe.data.label_column
    return Wanted(texts=[texts] if isinstance(texts, str) else texts, label=label, label_optional=False, fail=fail)


def _part(recipe: Recipe, key: str, source: Source) -> Part:
    def fail(name: str, problem: str) -> UserError:
        shared = getattr(source, name) is None and name in recipe.resolved()["data"]
        return recipe.error(f"data.{name}" if shared else f"{key}.{name}", problem)

    wanted = _wanted(recipe, source, fail)
    return Part(source=source, wanted=wanted, opened=open_source(source, wanted))


# --- the held-out part ---------------------------------------------------------------------------------------------


def _cut(recipe: Recipe, train: Prepared) -> tuple[Prepared, Prepared]:
    from sklearn.model_selection import train_test_split

    holdout = recipe.data.holdout
    assert holdout is not None  # noqa: S101  # the caller's condition
    size = holdout.size if holdout.size < 1 else int(holdout.size)
    strata = train.labels[train.originals] if holdout.stratified and not recipe.regression else None
    try:
        kept, held = train_test_split(train.originals, test_size=size, random_state=holdout.seed, stratify=strata)
    except ValueError as error:
        hint = "; data.holdout.stratified: false draws without regard to labels" if holdout.stratified else ""
        raise recipe.error("data.holdout", f"cannot be cut: {one_line(error)}{hint}") from None
    if train.copies:
        kept = np.flatnonzero(np.isin(train.origins, train.origins[kept]))  # with their copies
    rest = replace(train, rows=train.rows.select(np.sort(kept)))
    return rest, replace(train, name="holdout", rows=train.rows.select(np.sort(held)), dropped={}, copies=0)
