"""The work of a step: how long the rows are, a micro-batch of such rows, and its loss as the task's trainer computes it."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scalepeft import data, kinds, model
from scalepeft.fetch import PREFIX, asset_path, is_local, sources
from scalepeft.prepared import Prepared
from scalepeft.recipe import Recipe
from scalepeft.sampler import StepBatches
from scalepeft.tasks import SequenceClassification, SequenceRegression

Batch = Mapping[str, torch.Tensor]


_MOST = 2**22
"""Tokens of a micro-batch that a plan takes for meant."""
_MASK = 2**30
"""Bytes of an attention mask that a plan makes, for a mask is looked at: the models make one only where it is needed."""


def batch(recipe: Recipe, lengths: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """A micro-batch of rows, each given as the lengths in tokens of the documents in it (one, unless it is packed).

    Token ids are all 0: no operation's memory depends on them. Of a preference, a row is the prompt with its longer answer.
    Raises UserError for more tokens than anybody trains on at once.
    """
    _bearable(recipe, sum(map(sum, lengths)))
    rows = [sum(documents) for documents in lengths]
    if not recipe.generative:
        labels = torch.zeros(len(rows), dtype=torch.float32 if recipe.regression else torch.int64)
        return {**_padded(rows), "labels": labels}
    if recipe.task == "preference":
        padded = _padded([*rows, *rows])
        return {**padded, "completion_mask": padded["attention_mask"]}
    if _end_to_end(recipe):
        documents = [length for row in lengths for length in row]
        positions = torch.cat(list(map(torch.arange, documents)))
        ids = torch.zeros(1, len(positions), dtype=torch.int64)
        bounds = torch.tensor([0, *itertools.accumulate(documents)], dtype=torch.int32)
        found = {"input_ids": ids, "position_ids": positions[None], "labels": ids}
        return found | {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    padded = _padded(rows)
    return {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)}


def _bearable(recipe: Recipe, tokens: int) -> None:
    if tokens > _MOST:
        key = "training.max_length" if recipe.generative else "data.max_length"
        raise recipe.error(key, f"makes micro-batches of {tokens:,} tokens; at most {_MOST:,} are planned")


def without_mask(recipe: Recipe, lengths: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """The lengths with which attention needs no mask, where one would be too large to be made here, or the kernel has none."""
    if mask(recipe, lengths) <= _MASK and not str(recipe.model.attn_implementation).startswith("flash"):
        return lengths
    return [[max(map(sum, lengths))] for _ in lengths] if not _end_to_end(recipe) else [[sum(map(sum, lengths))]]


def mask(recipe: Recipe, lengths: Sequence[Sequence[int]]) -> int:
    """Elements of the attention mask of a micro-batch."""
    longest = max(map(sum, lengths))
    return sum(map(sum, lengths)) ** 2 if _end_to_end(recipe) else len(lengths) * longest**2


def _end_to_end(recipe: Recipe) -> bool:
    """Whether the rows of a micro-batch lie one behind the other, without padding."""
    return recipe.task == "causal-lm" and bool(kinds.option(recipe, "packing") or kinds.option(recipe, "padding_free"))


def _padded(rows: Sequence[int]) -> dict[str, torch.Tensor]:
    longest = max(rows)
    mask = (torch.arange(longest)[None] < torch.tensor(rows)[:, None]).long()
    return {"input_ids": torch.zeros_like(mask), "attention_mask": mask}


def loss(
    recipe: Recipe, base: Any, lengths: Sequence[Sequence[int]], *, accelerator: bool
) -> Callable[[Any, Batch], torch.Tensor]:
    """The loss of a micro-batch of such rows, from the model that is trained and the batch.

    `base` is the model without its adapter; it gets the head and the attention that training gives it. Every token but the
    first of a document is taken for a target.
    """
    if recipe.training.get("neftune_noise_alpha"):
        _noise(base, float(recipe.training["neftune_noise_alpha"]))
    if not recipe.generative:
        kind = SequenceRegression if recipe.regression else SequenceClassification
        task = kind(None, [], label_smoothing=float(kinds.option(recipe, "label_smoothing_factor")))

        def classified(model: Any, given: Batch) -> torch.Tensor:
            outputs = model(**{name: tensor for name, tensor in given.items() if name != "labels"})
            found: torch.Tensor = task.loss(outputs, given["labels"], len(given["labels"]))
            return found

        return classified
    from scalepeft import attention
    from scalepeft.heads import add_planned_lm_head

    if not accelerator:
        attention.install(base)
    targets = sum(length - 1 for documents in lengths for length in documents)
    if recipe.task == "preference":
        add_planned_lm_head(base, 2 * targets, accelerator=accelerator)
        return _preferred(float(kinds.option(recipe, "beta")))
    add_planned_lm_head(base, targets, accelerator=accelerator, outputs=("log_probs", "entropy", "is_top1"))

    def continued(model: Any, given: Batch) -> torch.Tensor:
        inputs = {name: tensor for name, tensor in given.items() if name != "labels"}
        found = model(**inputs, shift_labels=given["labels"], use_cache=False, fused_lm_head=True)
        return torch.neg(found.log_probs.sum() / found.label_mask.sum())

    return continued


def _preferred(beta: float) -> Callable[[Any, Batch], torch.Tensor]:
    """DPO's loss. Without an adapter the reference is a second model, which the plan adds to the weights."""

    def log_probs(model: Any, given: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        labels = given["input_ids"].masked_fill(given["completion_mask"] == 0, -100)
        inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
        found = model(**inputs, shift_labels=labels, use_cache=False, fused_lm_head=True).log_probs.float().sum(-1)
        chosen, rejected = found.chunk(2)
        return chosen, rejected

    def preferred(model: Any, given: Batch) -> torch.Tensor:
        with torch.no_grad(), getattr(model, "disable_adapter", contextlib.nullcontext)():
            before = log_probs(model, given)
        now = log_probs(model, given)
        margins = [after - reference for after, reference in zip(now, before, strict=True)]
        return -torch.nn.functional.logsigmoid(beta * (margins[0] - margins[1])).mean()

    return preferred


def _noise(base: Any, alpha: float) -> None:
    from transformers.integrations.neftune import neftune_post_forward_hook

    embedding = base.get_input_embeddings()
    embedding.neftune_noise_alpha = alpha
    embedding.register_forward_hook(neftune_post_forward_hook)


# --- the rows ----------------------------------------------------------------------------------------------------------

_SMALL = 64 * 2**20
"""Bytes of data files up to which a plan prepares the rows, as training would: seconds."""
_LEAST = 2
"""Tokens: of one there is nothing to tell the next of."""
_EPOCHS = 3
"""Epochs in which the longest micro-batch is looked for."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of training, as far as they are known."""

    longest: Sequence[Sequence[int]]
    """The largest micro-batch: of each row the lengths of its documents."""
    told: str
    """Where the lengths are from."""
    labels: list[str]
    evaluated: Sequence[Sequence[int]] = ()
    """The largest batch of the evaluation sets, likewise."""
    rows: int | None = None
    """Rows of an epoch."""
    tokens: int | None = None
    """Tokens of an epoch, without padding."""
    padding: float = 0.0
    """The share of an epoch's tokens that are padding, on top of these."""


def rows(recipe: Recipe) -> Rows:
    """The rows of a recipe where its files are here and small, and else what the recipe says of them.

    Raises UserError for data that are here and cannot be used, and for a configuration that cannot be reached.
    """
    return _prepared(recipe) if _at_hand(recipe) else _assumed(recipe)


def _at_hand(recipe: Recipe) -> bool:
    paths = []
    for _, source in sources(recipe):
        if not (is_local(source.path) or source.path.startswith(PREFIX)):
            return False
        paths.append(asset_path(source.path) if source.path.startswith(PREFIX) else Path(source.path).expanduser())
    folder = Path(model.source(recipe))
    tokenizer = folder.is_dir() and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return (
        tokenizer and not recipe.streams and all(p.is_file() for p in paths) and sum(p.stat().st_size for p in paths) < _SMALL
    )


def _prepared(recipe: Recipe) -> Rows:
    tokenizer = model.tokenizer(recipe)
    return of(recipe, data.prepare(recipe, tokenizer, limit=model.longest_input(recipe, tokenizer)))


def of(recipe: Recipe, corpus: data.Corpus) -> Rows:
    """The rows of a recipe that are prepared; of a stream what the recipe says."""
    train = corpus.train
    if not isinstance(train, Prepared):
        return _assumed(recipe)
    batch, lengths = int(kinds.option(recipe, "per_device_train_batch_size")), train.lengths
    seed = kinds.option(recipe, "data_seed")
    seed = int(kinds.option(recipe, "seed") if seed is None else seed)
    order = StepBatches(lengths, batch_size=batch, seed=seed, strategy=kinds.option(recipe, "train_sampling_strategy"))
    found: list[list[int]] = []
    for epoch in range(max(1, min(_EPOCHS, math.ceil(float(kinds.option(recipe, "num_train_epochs")))))):
        order.set_epoch(epoch)
        found += list(order)
    worst = max(found, key=lambda indices: len(indices) * int(lengths[indices].max()))
    documents = [train.rows[i]["seq_lengths"] if train.documents else [int(lengths[i])] for i in worst]
    order.set_epoch(0)
    padding = 0.0 if _end_to_end(recipe) else order.padding_waste()
    return Rows(
        longest=documents,
        told="the largest batch of the prepared rows",
        labels=corpus.label_names,
        evaluated=max(
            (_longest(recipe, each) for each in corpus.evaluation.values()), key=lambda of: sum(map(sum, of)), default=()
        ),
        rows=len(lengths),
        tokens=int(lengths.sum()) * (2 if recipe.task == "preference" else 1),
        padding=padding,
    )


def _longest(recipe: Recipe, prepared: Prepared) -> Sequence[Sequence[int]]:
    """The largest batch in evaluation, which takes the rows by their lengths."""
    rows = prepared.lengths.argsort()[::-1][: int(kinds.option(recipe, "per_device_eval_batch_size"))]
    return [prepared.rows[int(i)]["seq_lengths"] if prepared.documents else [int(prepared.lengths[i])] for i in rows]


def _assumed(recipe: Recipe) -> Rows:
    """Each row as long as can be, but one: where rows differ in length, there is a mask to hold."""
    config = model.configuration(recipe, labels=None)
    window = (model.window(config) or 1024) - ((recipe.adapter or {}).get("num_virtual_tokens") or 0)
    named = kinds.option(recipe, "max_length") if recipe.generative else recipe.data.max_length
    length = min(window, int(named)) if named is not None else window
    key = "training.max_length" if recipe.generative else "data.max_length"
    told = f"{key}: the rows are not at hand" if named and length == named else "the model's window: the rows are not at hand"
    if length < _LEAST:
        raise recipe.error(key, f"{length} is no length to train on; it is {_LEAST} tokens or more")
    batch = int(kinds.option(recipe, "per_device_train_batch_size"))
    evaluated = int(kinds.option(recipe, "per_device_eval_batch_size")) if recipe.data.evaluation else 0
    _bearable(recipe, batch * length)
    documents = [[length]] * batch
    if _end_to_end(recipe) and recipe.training.get("packing"):
        documents = [[length // 2, length - length // 2]] * batch
    elif batch > 1:
        documents = [[length]] * (batch - 1) + [[length - 1]]
    names = recipe.data.label_names
    labels = [str(name) for name in names] if names else list(map(str, range(config.num_labels)))
    labels = ["label"] if recipe.regression else labels
    return Rows(longest=documents, told=told, labels=labels, evaluated=[[length]] * min(evaluated, _MOST // length + 1))
