"""The frozen beginning of an encoder, and what it makes of rows: states in files, from which a model goes on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.utils.data import Dataset

from scalepeft.model import Trained
from scalepeft.recipe import Recipe
from scalepeft.sampler import token_batches

LAYERS = {
    "bert": "encoder.layer",
    "camembert": "encoder.layer",
    "distilbert": "transformer.layer",
    "roberta": "encoder.layer",
    "xlm-roberta": "encoder.layer",
}
"""By model type: the layers of a backbone that computes nothing between its `embeddings` and them, nor from layer to layer, but
the hidden states and a mask that it makes from the attention mask alone."""

_TOKENS = 16_384
"""Tokens computed at a time: 200 MB of a feed-forward layer of 3,072 in fp32."""


@dataclass(frozen=True, kw_only=True)
class Prefix:
    """The frozen beginning of an encoder: its embeddings and the first `count` of its `layers`."""

    backbone: Any
    layers: Sequence[torch.nn.Module]
    count: int

    @property
    def width(self) -> int:
        """Numbers of a token's state."""
        return int(self.backbone.config.hidden_size)

    @property
    def dtype(self) -> torch.dtype:
        """That of the states that leave a layer norm: of the weights, under mixed precision, too."""
        found: torch.dtype = next(p.dtype for p in self.backbone.embeddings.parameters())
        return found

    def digest(self) -> str:
        """The same for prefixes that give the same states: the sha256 of their weights and of the configuration."""
        found = hashlib.sha256(json.dumps(self.backbone.config.to_dict(), sort_keys=True, default=str).encode())
        for module in (self.backbone.embeddings, *self.layers[: self.count]):
            for name, tensor in module.state_dict().items():
                if isinstance(tensor, torch.Tensor):
                    found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                    found.update(tensor.detach().contiguous().flatten().cpu().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """What rows of token ids give to the first layer after it (rows x tokens x width), in evaluation mode."""
        with _passing(self.layers[self.count :]):
            found: torch.Tensor = self.backbone(**inputs).last_hidden_state
        return found

    @contextlib.contextmanager
    def passed_over(self) -> Iterator[None]:
        """Let the model take `states` as `inputs_embeds`, in the place of token ids."""
        embeddings = self.backbone.embeddings
        given = inspect.signature(embeddings.forward)

        def embed(*args: Any, **options: Any) -> torch.Tensor:
            states: torch.Tensor = given.bind(*args, **options).arguments["inputs_embeds"]
            return states.to(self.dtype)

        with _calling(embed, [embeddings]), _passing(self.layers[: self.count]):
            yield


def _passing(layers: Sequence[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Let layers give on what they are given."""

    def as_it_is(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return hidden_states

    return _calling(as_it_is, layers)


@contextlib.contextmanager
def _calling(forward: Callable[..., torch.Tensor], modules: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Let modules compute something else."""
    before = [vars(module).get("forward") for module in modules]  # accelerate's hooks stand there
    for module in modules:
        module.forward = forward
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            if own is None:
                del module.forward
            else:
                module.forward = own


def find(recipe: Recipe, model: Trained) -> Prefix:
    """The frozen beginning of a model with its adapter. Raises UserError where there is none, or the model is not known."""

    def fail(told: str) -> Exception:
        return recipe.error("cache_frozen_layers", told)

    backbone: Any = getattr(model, "get_base_model", lambda: model)().base_model
    kind = backbone.config.model_type
    if kind not in LAYERS:
        raise fail(f"the layers of {kind} are not known here; those of {', '.join(LAYERS)} are")
    if _trained(backbone.embeddings):
        raise fail("the embeddings are trained, and nothing before them is left to keep")
    layers = list(backbone.get_submodule(LAYERS[kind]))
    count = next((number for number, layer in enumerate(layers) if _trained(layer)), len(layers))
    if not count:
        hint = "name the last ones in adapter.target_modules or layers_to_transform, or leave this out"
        raise fail(f"the adapter reaches the first of the {len(layers)} layers, so that none is frozen; {hint}")
    return Prefix(backbone=backbone, layers=layers, count=count)


def _trained(module: torch.nn.Module) -> bool:
    adapted = any(isinstance(inner, BaseTunerLayer) for inner in module.modules())
    return adapted or any(parameter.requires_grad for parameter in module.parameters())


class States(Dataset[dict[str, Any]]):
    """The states of a set's rows, by the numbers of the rows.

    They lie in one file for each process that computed some: the rows longest first, cut into batches that are dealt in turn.
    """

    def __init__(
        self, rows: Dataset[Any], lengths: NDArray[np.integer], folder: Path, *, width: int, dtype: torch.dtype, parts: int
    ) -> None:
        """`rows` give the labels; `lengths` has one entry a row; `width` and `dtype` are those of a token's state."""
        self.rows, self.lengths, self.folder, self.width, self.dtype, self.parts = rows, lengths, folder, width, dtype, parts
        self.part, self.start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
        self.tokens = [0] * parts
        for number, batch in enumerate(self.batches()):
            part, ends = number % parts, np.cumsum(lengths[batch].astype(np.int64))
            self.part[batch], self.start[batch] = part, self.tokens[part] + ends - lengths[batch]
            self.tokens[part] += int(ends[-1])

    def batches(self) -> list[NDArray[np.integer]]:
        """The numbers of the rows that are computed together, whatever the processes: padding is part of the rounding."""
        return list(token_batches(self.lengths, tokens=_TOKENS))

    def file(self, part: int) -> Path:
        """The states that one process has computed."""
        return self.folder / f"{part}.bin"

    def size(self, part: int) -> int:
        """Bytes of that file."""
        return self.tokens[part] * self.width * self.dtype.itemsize

    @functools.cached_property
    def maps(self) -> list[torch.Tensor]:
        """The files as tensors (tokens x width), of which memory holds what the system keeps of them."""
        flat = [
            torch.from_file(str(self.file(part)), size=count * self.width, dtype=self.dtype) if count else torch.empty(0)
            for part, count in enumerate(self.tokens)
        ]
        return [tensor.view(-1, self.width) for tensor in flat]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "maps"}  # a process that reads maps them anew

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.rows.__getitems__(indices)  # type: ignore[attr-defined]  # Rows has it
        for row, index in zip(rows, indices, strict=True):
            number = max(index, 0)
            start = int(self.start[number])
            row["states"] = self.maps[self.part[number]][start : start + int(self.lengths[number])]
        return rows


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of `States` as tensors, padded to the longest with nought, which the mask hides."""
    states = [row["states"] for row in rows]
    lengths = torch.tensor([len(of) for of in states])
    return {
        "inputs_embeds": torch.nn.utils.rnn.pad_sequence(states, batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }
