"""The rows of a recipe as the model will see them: `scalepeft preview`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scalepeft import recipe as recipes
from scalepeft import upstream
from scalepeft.console import quiet_upstream, say, table
from scalepeft.errors import UserError, did_you_mean
from scalepeft.fetch import missing_inputs, offline_if_unreachable
from scalepeft.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from scalepeft.data import Corpus
    from scalepeft.prepared import Prepared


@dataclass(frozen=True, kw_only=True)
class Marks:
    """How the pieces of a text that are in the loss are told from the others."""

    before: str
    """Stands before each line of such a piece."""
    behind: str
    told: str
    """What the reader is told of it."""


COLOUR = Marks(before="\x1b[1;32m", behind="\x1b[0m", told="\x1b[1;32mgreen\x1b[0m is in the loss")
BRACKETS = Marks(before="⟦", behind="⟧", told="what stands in ⟦ ⟧ is in the loss")  # rows hold all the usual brackets

_NEWLINE = "↵\n"
_CONTROLS = {code: ascii(chr(code))[1:-1] for code in (*range(32), *range(127, 160))}  # a row must not steer the terminal
_VISIBLE = _CONTROLS | {ord("\n"): _NEWLINE}


def main(arguments: Sequence[str]) -> int:
    """`scalepeft preview RECIPE [section.key=value ...] [-n ROWS] [--set NAME]`."""
    parser = argparse.ArgumentParser(
        prog="scalepeft preview",
        description="Show rows of a recipe as the model will see them, and figures of its sets. Loads no weights.",
    )
    parser.add_argument("recipe", help="a recipe file, or the name of a shipped recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values to change, in YAML")
    parser.add_argument("-n", type=int, default=3, dest="rows", metavar="ROWS", help="how many, spread over the set (3)")
    parser.add_argument("--set", default="train", dest="name", metavar="NAME", help="the set they are taken from (train)")
    options = parser.parse_intermixed_args(arguments)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    recipe = recipes.load(options.recipe, options.overrides)
    for block in preview(recipe, rows=options.rows, name=options.name, marks=COLOUR if coloured else BRACKETS):
        say(block)
    return 0


def preview(recipe: Recipe, *, rows: int = 3, name: str = "train", marks: Marks = BRACKETS) -> Iterator[str]:
    """A legend, rows of a set and the figures of all sets, as blocks of text. Raises UserError as training would."""
    holdout = ["holdout"] if recipe.data.holdout else []
    names = ["train", *holdout, *recipe.data.evaluation]
    if name not in names:
        near = did_you_mean(name, names) or f"; there are {', '.join(names)}"
        raise UserError(f"command line: --set {name!r}: the recipe has no such set{near}")
    if rows < 0:
        raise UserError(f"command line: -n is {rows}; it is 0 or more")
    if recipe.streams:
        told = "is read while training; data.train.streaming=false with data.train.first_rows=1000 shows its beginning"
        raise recipe.error("data.train.streaming", told)
    missing_inputs(recipe)
    offline_if_unreachable(recipe)
    quiet_upstream()
    import numpy as np

    from scalepeft import data, model

    tokenizer = model.tokenizer(recipe)
    window = model.longest_input(recipe, tokenizer)
    corpus = data.prepare(recipe, tokenizer, limit=window)
    limit = data.language_limit(recipe, window) if recipe.generative else min(recipe.data.max_length or window, window)
    shown = Shown(recipe=recipe, tokenizer=tokenizer, corpus=corpus, limit=limit, marks=marks)
    prepared = shown.sets[name]
    if rows:
        yield f"{marks.told}; ↵ ends a line of the row\n" if recipe.generative else "tokens, with a blank between them\n"
        places = np.unique(np.linspace(0, len(prepared.rows) - 1, num=rows, dtype=np.int64))
        for place in places.tolist():
            yield f"{shown.row(prepared, place)}\n"
    yield shown.figures()


@dataclass(frozen=True, kw_only=True)
class Shown:
    """The prepared rows of a recipe, as text."""

    recipe: Recipe
    tokenizer: PreTrainedTokenizerFast
    corpus: Corpus
    limit: int
    """The longest row in tokens."""
    marks: Marks

    @property
    def sets(self) -> dict[str, Prepared]:
        """The sets by their names: none of them is a stream."""
        from scalepeft.prepared import Prepared

        return {name: prepared for name, prepared in self.corpus.sets.items() if isinstance(prepared, Prepared)}

    # --- one row ---------------------------------------------------------------------------------------------------

    def row(self, prepared: Prepared, place: int) -> str:
        """A line about a row, and the row."""
        row = prepared.rows[place]
        if prepared.documents:
            return self._packed(row, f"{prepared.name}, packed row {place + 1:,} of {len(prepared.rows):,}")
        augmented = ", augmented" if prepared.copies and place not in prepared.originals else ""
        cut = self._told_cut(prepared, row["length"])
        body: Callable[[Mapping[str, Any]], tuple[str, str]] = {
            "causal-lm": self._text,
            "preference": self._pair,
            "sequence-classification": self._classified,
        }[self.recipe.task]
        counted, text = body(row)
        return f"{prepared.name}, row {row['row'] + 1:,} of its source{augmented}: {counted}{cut}\n{text}"

    def _text(self, row: Mapping[str, Any]) -> tuple[str, str]:
        ids, labels = row["input_ids"], row["labels"]
        return self._counted(labels), self._marked(ids, labels)

    def _packed(self, row: Mapping[str, Any], name: str) -> str:
        lengths, start = row["seq_lengths"], 0
        parts = [f"{name}: {len(lengths)} documents, {self._counted(row['labels'])}"]
        for number, length in enumerate(lengths, 1):
            ids, labels = (row[column][start : start + length] for column in ("input_ids", "labels"))
            begins = f"document {number}, from token {start + 1:,}: {self._counted(labels)}"
            parts.append(f"{begins}\n{self._marked(ids, labels)}")
            start += length
        return "\n".join(parts)

    def _pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        from scalepeft.conversations import IGNORED, segments

        prompt, texts = row["prompt_ids"], list[str]()
        for name in ("chosen", "rejected"):
            ids = row[f"{name}_ids"]
            pieces = segments(self.tokenizer, [*prompt, *ids], [IGNORED] * len(prompt) + ids)
            if not texts:
                texts.append(f"prompt\n{self._joined(piece for piece in pieces if not piece[1])}")
            texts.append(f"{name}\n{self._joined(piece for piece in pieces if piece[1])}")
        counts = {"prompt": prompt, "chosen": row["chosen_ids"], "rejected": row["rejected_ids"]}
        return ", ".join(f"{name} {len(ids):,} tokens" for name, ids in counts.items()), "\n".join(texts)

    def _classified(self, row: Mapping[str, Any]) -> tuple[str, str]:
        label = row["labels"] if self.recipe.regression else self.corpus.label_names[row["labels"]]
        tokens = " ".join(self.tokenizer.convert_ids_to_tokens(row["input_ids"]))
        return f"{row['length']:,} tokens, label {label!r}", tokens.translate(_VISIBLE)

    def _counted(self, labels: Sequence[int]) -> str:
        from scalepeft.conversations import IGNORED

        return f"{len(labels):,} tokens, {sum(label != IGNORED for label in labels):,} in the loss"

    def _marked(self, ids: Sequence[int], labels: Sequence[int]) -> str:
        from scalepeft.conversations import segments

        return self._joined(segments(self.tokenizer, ids, labels))

    def _joined(self, pieces: Iterator[tuple[str, bool]] | Sequence[tuple[str, bool]]) -> str:
        """Pieces of a text with those in the loss marked, line by line, for a pager forgets colours at the end of one."""
        between = f"{self.marks.behind}{_NEWLINE}{self.marks.before}" if self.marks is COLOUR else _NEWLINE
        parts = []
        for piece, counts in pieces:
            text = piece.translate(_VISIBLE)
            parts.append(f"{self.marks.before}{text.replace(_NEWLINE, between)}{self.marks.behind}" if counts else text)
        return "".join(parts).removesuffix("\n")

    def _told_cut(self, prepared: Prepared, length: int) -> str:
        """Whether a row was cut. One that is as long as the limit may also just fit into it."""
        least, most = self._cut(prepared)
        if length < self.limit or not most:
            return ""
        all_cut = least == (prepared.lengths == self.limit).sum()
        return f", cut at {self.limit:,}" if all_cut else ", as long as the limit: cut, or just fitting"

    def _cut(self, prepared: Prepared) -> tuple[int, int]:
        """The least and the most of a set's rows that were cut."""
        full = int((prepared.lengths == self.limit).sum())
        if not self.recipe.generative:
            return 0, full
        if prepared.documents:  # the lengths are those of packed rows
            return (0 if self.recipe.data.holdout else prepared.truncated), prepared.truncated
        whole = int((prepared.rows.data.column("length").to_numpy() == self.limit).sum())  # before a holdout was cut off
        surplus = whole - prepared.truncated  # these just fit
        return max(0, full - surplus), min(full, prepared.truncated)

    # --- the sets --------------------------------------------------------------------------------------------------

    def figures(self) -> str:
        """What a reader should know of the sets before they are trained on: a column for each."""
        columns = {name: self._of_set(prepared) for name, prepared in self.sets.items()}
        names = list(dict.fromkeys(figure for column in columns.values() for figure in column))
        rows = [(name, *(column.get(name, "-") for column in columns.values())) for name in names]
        return table([("", *columns), *rows])

    def _of_set(self, prepared: Prepared) -> dict[str, str]:
        import numpy as np

        lengths, packed = prepared.lengths, bool(prepared.documents)
        documents = _flat(prepared, "seq_lengths") if packed else lengths
        least, most = self._cut(prepared)
        tokens, counted = self._tokens(prepared)
        found = {"rows": f"{prepared.documents or len(lengths):,}"}
        found |= {f"  dropped: {reason}": f"{count:,}" for reason, count in prepared.dropped.items()}
        if added := prepared.augmented:
            found["  augmented"] = f"{added['added']:,}"
        found |= {
            "  cut": f"{most:,}" if least == most else f"{least:,} to {most:,}",
            "tokens": f"{tokens:,}",
            "  in the loss": f"{counted / tokens:.1%}" if counted else "-",
            "  of a row, mean": f"{documents.mean():.1f}",
            "  of a row, 95th percentile": f"{np.percentile(documents, 95, method='higher'):,}",
            "  of a row, longest": f"{documents.max():,}",
            "  of a row, limit": f"{self.limit:,}",
        }
        if packed:
            found |= {"packed into": f"{len(lengths):,}", "  filled": f"{lengths.sum() / (len(lengths) * self.limit):.1%}"}
        elif prepared is self.corpus.train and not self.recipe.training.get("padding_free"):
            found["padding"] = f"{self._padding(prepared, tokens):.1%}"
        return {name: text for name, text in found.items() if text != "-"}

    def _tokens(self, prepared: Prepared) -> tuple[int, int]:
        """The tokens of a set that the model will read, and how many of them are in the loss; 0 where that is no question."""
        from scalepeft.conversations import IGNORED

        if self.recipe.task == "causal-lm":
            labels = _flat(prepared, "labels")
            return len(labels), int((labels != IGNORED).sum())
        if self.recipe.task == "preference":
            prompt, chosen, rejected = (len(_flat(prepared, f"{of}_ids")) for of in ("prompt", "chosen", "rejected"))
            return 2 * prompt + chosen + rejected, chosen + rejected
        return int(prepared.lengths.sum()), 0

    def _padding(self, prepared: Prepared, tokens: int) -> float:
        """The share of an epoch's tokens that are padding, as one process will batch the rows."""
        from scalepeft.sampler import StepBatches

        seed = self._option("seed") if self._option("data_seed") is None else self._option("data_seed")
        batch, strategy = self._option("per_device_train_batch_size"), self._option("train_sampling_strategy")
        waste = StepBatches(prepared.lengths, batch_size=batch, seed=seed, strategy=strategy).padding_waste()
        copies = 2 if self.recipe.task == "preference" else 1  # both answers, with the prompt, are padded to the longest
        return 1 - tokens * (1 - waste) / (copies * int(prepared.lengths.sum()))

    def _option(self, name: str) -> Any:
        given = self.recipe.training.get(name)
        return upstream.fields(upstream.TASK_ARGUMENTS[self.recipe.task])[name].default if given is None else given


def _flat(prepared: Prepared, column: str) -> Any:
    """The numbers of a column of lists, one after the other."""
    import numpy as np

    batches = prepared.rows.select_columns([column]).with_format("arrow").iter(batch_size=1_000)
    return np.concatenate([batch.column(column).combine_chunks().flatten().to_numpy() for batch in batches])
