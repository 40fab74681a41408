"""What a stream of training rows cannot serve: rules of a recipe's data section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scalepeft.document import Document, Key, mapping

_NOT_STREAMED = {
    ("data", "holdout"): "cuts rows that are there before training; give data.evaluation",
    ("data", "augmentation"): "copies rows that are there before training",
    ("data", "train", "sample_rows"): "draws from all rows; give first_rows, or prepare them",
    ("data", "train", "first_rows"): "needs no streaming: so many rows are prepared before",
    ("data", "train", "weight"): "mixes sources, and one is streamed",
    ("training", "packing"): "fits rows together that are there before training",
    ("training", "train_sampling_strategy"): "orders rows that are there before training; data.train.buffer_size says how far"
    " the rows of a stream are shuffled",
    ("training", "dataloader_num_workers"): "would read the stream once more in each of them",
}
"""What a stream of training rows cannot serve."""


def problems(document: Document, values: Mapping[str, Any]) -> Iterator[str]:
    """Each as one line with its place."""
    data, training = mapping(values.get("data")), mapping(values.get("training"))
    given = data.get("train")
    others: dict[Key, Any] = {
        ("data", "train", str(n)): source for n, source in enumerate(given if isinstance(given, list) else ())
    }
    others |= {("data", "evaluation", name): source for name, source in mapping(data.get("evaluation")).items()}
    for key, source in others.items():
        if mapping(source).get("streaming"):
            told = "a stream is the only source of training rows" if key[1] == "train" else "evaluation sets are prepared"
            yield f"{document.where((*key, 'streaming'))}: {'.'.join(key)}.streaming: {told}"
    train = mapping(data.get("train"))
    if isinstance(size := train.get("buffer_size"), int) and size < 1:
        yield f"{document.where(('data', 'train', 'buffer_size'))}: data.train.buffer_size must be at least 1"
    if train.get("streaming") is not True:
        return
    for place, told in _NOT_STREAMED.items():
        found: Any = values
        for name in place:
            found = mapping(found).get(name)
        if found and found != "random":  # the sampling strategy that is none
            yield f"{document.where(place)}: {'.'.join(place)} {told} (data.train.streaming)"
    if not training.get("max_steps"):
        yield f"{document.where(('data', 'train', 'streaming'))}: data.train.streaming needs training.max_steps"
