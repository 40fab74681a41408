"""The rows of a recipe: training and evaluation sets, from sources to prepared rows."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from scalepeft import augment, streams, upstream
from scalepeft import labels as labelling
from scalepeft.conversations import Conversations
from scalepeft.dialogues import COLUMNS, FORMS, recognise
from scalepeft.errors import UserError, did_you_mean, one_line
from scalepeft.fetch import sources
from scalepeft.packing import pack
from scalepeft.preferences import Preferences
from scalepeft.prepared import Chosen, Encoder, Integers, Part, Preparation, Prepared, Texts, choose, tokenizer_digest
from scalepeft.recipe import Recipe, Source
from scalepeft.sources import open_source
from scalepeft.streams import Streamed
from scalepeft.tables import Bad, Fail, Records, Wanted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """All rows of a recipe."""

    train: Prepared | Streamed | None
    evaluation: Mapping[str, Prepared]
    """By name, the main set first."""
    label_names: list[str]
    """The names of labels 0, 1, ..."""
    revisions: Mapping[str, str]
    """By the path of each source: the commit of a Hub id, the sha256 of a file; by WordNet's folder: its version and sha256."""

    @property
    def sets(self) -> dict[str, Prepared | Streamed]:
        """The training rows under the name `train`, when they were asked for, and the evaluation sets."""
        return ({"train": self.train} if self.train else {}) | dict(self.evaluation)

    @property
    def first_seen(self) -> Any:
        """The training rows as upstream's trainers look at them when they are made: of a stream, its first."""
        assert self.train is not None  # noqa: S101  # what is trained has rows
        return datasets.Dataset.from_list([self.train.rows.first()]) if isinstance(self.train, Streamed) else self.train.rows

    @property
    def streaming(self) -> bool:
        """Whether the training rows are read while training."""
        return isinstance(self.train, Streamed)


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
    if recipe.streams:
        return _streamed(recipe, tokenizer, limit, need_train=need_train, label_names=label_names)
    parts = {key: _part(recipe, key, source) for key, source in sources(recipe)}
    training = [part for key, part in parts.items() if not key.startswith("data.evaluation.")]
    preparation = Preparation(recipe, encoder(recipe, tokenizer, limit))
    augmenter = augment.augmenter(recipe) if need_train else None  # a holdout is the same without
    labels = labelling.declared(recipe, [part.opened for part in training], label_names)
    train: Prepared | None = None
    if need_train or recipe.data.holdout:
        train, labels = preparation("train", training, labels, augmenter)
        if not recipe.generative and len(present := np.unique(train.labels)) < 2:
            only = present[0] if recipe.regression else labels.names[int(present[0])]
            raise recipe.error("data.train", f"all {len(train.rows):,} training rows have the one label {only!r}")
    labels = labels or labelling.found(recipe, [chosen.labels() for chosen in choose(training)])
    evaluation: dict[str, Prepared] = {}
    if recipe.data.holdout and train:
        train, evaluation["holdout"] = _cut(recipe, train)
    for name in recipe.data.evaluation:
        evaluation[name], _ = preparation(name, [parts[f"data.evaluation.{name}"]], labels)
    if train and need_train and recipe.training.get("packing"):
        train = pack(train, length=language_limit(recipe, limit), strategy=recipe.training.get("packing_strategy", "bfd"))
    return Corpus(
        train=train if need_train else None,
        evaluation=evaluation,
        label_names=labels.names,
        revisions={part.source.path: part.opened.revision for part in parts.values()}
        | ({str(augmenter.wordnet.folder): augmenter.wordnet.version} if augmenter else {}),
    )


def _streamed(
    recipe: Recipe, tokenizer: PreTrainedTokenizerFast, limit: int, *, need_train: bool, label_names: Sequence[str] | None
) -> Corpus:
    """As `prepare`, for training rows that are read while training; the evaluation sets are prepared as ever."""
    train = recipe.data.train
    assert isinstance(train, Source)  # noqa: S101  # the caller's condition
    fail = _failing(recipe, "data.train", train)
    wanted = _wanted(recipe, train, fail)
    opened, tables = streams.open_stream(train, wanted)
    labels = labelling.declared(recipe, [opened], label_names)
    if labels is None:
        raise recipe.error("data.train.streaming", "the labels are not known before the rows are read; give data.label_names")
    encoding = encoder(recipe, tokenizer, limit)
    part = Part(source=train, wanted=wanted, opened=opened)
    evaluation, parts = {}, {"data.train": part}
    for name, source in recipe.data.evaluation.items():
        parts[name] = _part(recipe, f"data.evaluation.{name}", source)
        evaluation[name], _ = Preparation(recipe, encoding)(name, [parts[name]], labels)
    return Corpus(
        train=streams.streamed(recipe, part, tables, labels, encoding) if need_train else None,
        evaluation=evaluation,
        label_names=labels.names,
        revisions={part.source.path: part.opened.revision for part in parts.values()},
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
    preparation = Preparation(recipe, encoder(recipe, tokenizer, limit))
    prepared, _ = preparation(source.path, [part], labelling.declared(recipe, [], label_names))
    return prepared


def encoder(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, limit: int) -> Encoder:
    """What turns the rows of the recipe's task into token ids."""
    return Language(recipe, tokenizer, limit) if recipe.generative else Texts(recipe, tokenizer, limit)


def language_limit(recipe: Recipe, limit: int) -> int:
    """The longest row in tokens: training.max_length, TRL's default of it, or the model's limit when that is less."""
    default = upstream.fields(upstream.TASK_ARGUMENTS[recipe.task])["max_length"].default
    given = recipe.training.get("max_length", default)
    return limit if given is None else min(int(given), limit)


class Language:
    """The encoder of conversations, prompts with their completions, preferences and plain text."""

    threads = 1

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, limit: int) -> None:
        self.recipe, self.tokenizer = recipe, tokenizer
        options: dict[str, Any] = {"system_prompt": recipe.data.system_prompt, "max_length": language_limit(recipe, limit)}
        if recipe.task == "preference":
            self.rows: Conversations | Preferences = Preferences(tokenizer, **options)
            return
        if recipe.training.get("packing_strategy") == "bfd_split" and recipe.training.get("packing"):
            options["max_length"] = None  # packing cuts what is longer, and loses none of it
        losses = {name: recipe.training.get(name) for name in ("assistant_only_loss", "completion_only_loss")}
        self.rows = Conversations(tokenizer, **losses, **options)

    @property
    def identity(self) -> Any:
        """The tokenizer, the formats and all that shapes the tokens."""
        return [tokenizer_digest(self.tokenizer), self.rows.identity, self.recipe.data.format]

    @property
    def features(self) -> Mapping[str, Any]:
        """Token ids, labels and lengths, as the task's trainer names them."""
        features: Mapping[str, Any] = self.rows.features
        return features

    def encode(self, rows: Mapping[str, list[Any]], source: Chosen) -> tuple[dict[str, list[Any]], list[Bad | None]]:
        """Tokenise each row as its source's format says, or as its columns tell."""
        format_ = self.format(source)
        found = [self.rows.encode(json.loads(text), format_) for text in rows["0"]]
        good = [row for row in found if not isinstance(row, Bad)]
        names = (*self.features, "truncated")
        return {name: [row[name] for row in good] for name in names}, [row if isinstance(row, Bad) else None for row in found]

    def format(self, source: Chosen) -> str:
        """How the rows of a source tell their turns."""
        columns, part, forms = source.table.columns, source.part, FORMS[self.recipe.task]
        named = part.source.format or self.recipe.data.format
        found = named or recognise(columns, self.recipe.task)
        if found is None or found not in forms:
            told = (
                f"{self.recipe.task} has no format {found!r}"
                if found
                else f"no format has the columns {', '.join(columns)} only"
            )
            known = "; ".join(f"{name}: {form}" for name, form in forms.items())
            raise part.wanted.fail("format" if found else "columns", f"{told}; there are {known}")
        if lacking := forms[found].missing(columns):
            told = (
                f"the format {found} needs {', '.join(lacking)}, and the columns known by their names are {', '.join(columns)}"
            )
            raise part.wanted.fail("columns", f"{told}; say how it is called: {{{lacking[0]}: NAME}}")
        for name, without in _NO_SUCH_PART.items():
            if self.recipe.training.get(name) and found in without:
                told = f"rows of the format {found} ({part.source.path}) have no such part; leave {name} out, or set it false"
                raise self.recipe.error(f"training.{name}", told)
        return found


_NO_SUCH_PART = {"assistant_only_loss": ("text",), "completion_only_loss": ("text", "messages", "conversations")}
"""The formats whose rows have no part that an option would restrict the loss to."""


def _wanted(recipe: Recipe, source: Source, fail: Fail) -> Wanted:
    if recipe.generative:
        renamed = {**recipe.data.columns, **source.columns}
        if unknown := [name for name in renamed if name not in COLUMNS]:
            near = did_you_mean(unknown[0], COLUMNS) or f"; there are {', '.join(COLUMNS)}"
            raise fail("columns", f"no format has a column {unknown[0]!r}{near}")
        return Records(fail=fail, names={name: renamed.get(name, name) for name in COLUMNS}, renamed=[*renamed])
    texts = source.text_columns or recipe.data.text_columns
    label = source.label_column or recipe.data.label_column
    return Wanted(texts=[texts] if isinstance(texts, str) else texts, label=label, label_optional=False, fail=fail)


def _failing(recipe: Recipe, key: str, source: Source) -> Fail:
    """What makes the errors of one source."""

    def fail(name: str, problem: str) -> UserError:
        shared = getattr(source, name) is None and name in recipe.resolved()["data"]
        return recipe.error(f"data.{name}" if shared else f"{key}.{name}", problem)

    return fail


def _part(recipe: Recipe, key: str, source: Source) -> Part:
    wanted = _wanted(recipe, source, _failing(recipe, key, source))
    return Part(source=source, wanted=wanted, opened=open_source(source, wanted))


# --- the held-out part ---------------------------------------------------------------------------------------------


def _cut(recipe: Recipe, train: Prepared) -> tuple[Prepared, Prepared]:
    from sklearn.model_selection import train_test_split

    holdout = recipe.data.holdout
    assert holdout is not None  # noqa: S101  # the caller's condition
    size = holdout.size if holdout.size < 1 else int(holdout.size)
    labelled = not recipe.generative and not recipe.regression
    strata = train.labels[train.originals] if holdout.stratified and labelled else None
    try:
        kept, held = train_test_split(train.originals, test_size=size, random_state=holdout.seed, stratify=strata)
    except ValueError as error:
        hint = "; data.holdout.stratified: false draws without regard to labels" if strata is not None else ""
        raise recipe.error("data.holdout", f"cannot be cut: {one_line(error)}{hint}") from None
    if train.copies:
        kept = np.flatnonzero(np.isin(train.origins, train.origins[kept]))  # with their copies
    rest = _part_of(train, np.sort(kept))
    return rest, replace(_part_of(train, np.sort(held)), name="holdout", dropped={}, truncated=0, copies=0)


def _part_of(train: Prepared, places: Integers) -> Prepared:
    """Some of the rows, with a key of their own."""
    key = hashlib.sha256(train.key.encode() + places.tobytes()).hexdigest()[:32]
    return replace(train, rows=train.rows.select(places), key=key)
