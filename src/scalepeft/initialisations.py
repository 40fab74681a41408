"""LoRA's initialisations that look at training rows, or at what quantisation has lost."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftModel, get_eva_state_dict, initialize_lora_eva_weights
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.loftq_utils import _SafetensorLoader
from transformers import PreTrainedModel

from scalepeft.fetch import asset_path
from scalepeft.recipe import Recipe

Batch: TypeAlias = Mapping[str, torch.Tensor]
Examples: TypeAlias = Callable[[], Iterable[Batch]]
"""Training batches for an initialisation that looks at data: the same on every process."""

EXAMPLE_ROWS = 256
"""Training rows that an initialisation by data looks at: what CorDA's authors take; EVA goes through them again as it needs."""

EXAMPLE_BATCH = 16
"""Rows of a batch of them: the same on every layout."""

_EVA_BATCHES = 1_000
"""Batches after which EVA is given up: upstream goes on until the last layer's components stand still."""


def needed(examples: Examples | None) -> Iterator[Batch]:
    """The batches as inputs of the base, with labels that its own loss understands."""
    if examples is None:
        raise ValueError("this initialisation looks at training rows, and none were given")
    for batch in examples():
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids", "labels") if name in batch}
        if "completion_mask" in batch:  # of preferences, whose labels are one a pair
            inputs["labels"] = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        yield inputs


def _singly(model: PreTrainedModel, batches: Iterable[Batch]) -> Iterator[dict[str, torch.Tensor]]:
    """Each row alone and without its padding, on the model's device."""
    for batch in batches:
        for row, kept in enumerate(batch["attention_mask"].bool()):
            parts = {name: t[row : row + 1, kept] if t.dim() == 2 else t[row : row + 1] for name, t in batch.items()}
            yield _on(model, parts)


def _with_losses(base: PreTrainedModel, config: LoraConfig, batches: Sequence[Batch]) -> None:
    def step() -> None:
        for inputs in _singly(base, batches):
            base(**inputs).loss.backward()

    with warnings.catch_warnings():  # of hooks on the first layer, whose input is a lookup
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(base, config, step)


def _with_covariances(base: PreTrainedModel, config: LoraConfig, batches: Sequence[Batch]) -> None:
    @torch.no_grad()
    def rows() -> None:
        for inputs in _singly(base, batches):
            base(**{name: tensor for name, tensor in inputs.items() if name != "labels"})

    try:
        preprocess_corda(base, config, rows)
    except IndexError:
        told = "CorDA needs layers that see every token; spell target_modules out without those that see one a row (a pooler)"
        raise ValueError(told) from None


def _eva(recipe: Recipe, model: PeftModel, examples: Examples | None) -> None:
    hidden = () if recipe.generative else ("labels",)  # one a row: upstream takes them for a mask of tokens
    batches = [{name: tensor for name, tensor in batch.items() if name not in hidden} for batch in needed(examples)]
    calls = 0

    def forward(model: PeftModel, batch: Batch) -> None:
        nonlocal calls
        calls += 1
        if calls > _EVA_BATCHES:
            told = f"EVA's components of some layer do not stand still after {_EVA_BATCHES} batches"
            raise ValueError(f"{told}; lower r or eva_config.rho, or give more rows a batch")
        model(**_on(model, {k: v for k, v in batch.items() if k != "labels"}))

    def tokens(layer: Any, kept: torch.Tensor, _: str) -> torch.Tensor:
        found: torch.Tensor = layer if isinstance(layer, torch.Tensor) else layer[0]
        return (found if found.dim() == 2 else found[kept.T.unbind()]).contiguous()  # a pooler has one a row

    found = get_eva_state_dict(
        model,
        batches,
        forward_fn=forward,
        prepare_layer_inputs_fn=tokens,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )
    initialize_lora_eva_weights(model, eva_state_dict=_of_rank_0(found))


def _loftq(recipe: Recipe, model: PeftModel, _: Examples | None) -> None:
    """LoRA as the best part of its rank of what quantisation has lost.

    As peft's replace_lora_weights_loftq, which works on a CUDA device only and takes no account of the scaling.
    """
    from bitsandbytes.functional import dequantize_4bit
    from peft.tuners.lora import Linear4bit

    name = recipe.model.name_or_path
    folder = asset_path(name) if name.startswith("fetched:") else Path(name).expanduser()
    if not folder.is_dir():
        folder = Path(snapshot_download(name, revision=recipe.model.revision, allow_patterns=["*.safetensors*"]))
    plain = _SafetensorLoader(model, str(folder))
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            weight, rank = module.get_base_layer().weight, module.r["default"]
            kept = dequantize_4bit(weight.data, weight.quant_state).float()
            lost = plain.get_tensor(f"{name.removeprefix('base_model.model.')}.weight").to(kept) - kept
            left, size, right = torch.linalg.svd(lost, full_matrices=False)
            root = (size[:rank] / module.scaling["default"]).sqrt()
            module.lora_A["default"].weight.data.copy_(root[:, None] * right[:rank])
            module.lora_B["default"].weight.data.copy_(left[:, :rank] * root)


BEFORE: Mapping[Any, Callable[[PreTrainedModel, LoraConfig, Sequence[Batch]], None]] = {
    "lora_ga": _with_losses,
    "corda": _with_covariances,
}
AFTER: Mapping[Any, Callable[[Recipe, PeftModel, Examples | None], None]] = {"eva": _eva, "loftq": _loftq}
"""What an initialisation needs to be done before peft makes the adapter, and after."""


def _on(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _of_rank_0(value: Any) -> Any:
    """What rank 0 found, on every process."""
    if not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box)
    return box[0]
