"""AdaLoRA's budget: ranks move during training, which peft leaves to its caller (Zhang et al. 2023, arXiv 2303.10512)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_STATE = ("ipt", "exp_avg_ipt", "exp_avg_unc")
"""What the allocator knows of each parameter's importance: its value, and running means of it and of its uncertainty."""


class RankAllocation(TrainerCallback):  # type: ignore[misc]
    """Lets peft reallocate the ranks at every step, between the optimizer's step and the clearing of the gradients."""

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Upstream counts this step only afterwards."""
        model.base_model.update_and_allocate(state.global_step + 1)


def allocates_ranks(model: Any) -> bool:
    """Whether a model's adapter has a budget of ranks."""
    return hasattr(getattr(model, "base_model", None), "rankallocator")


def orthogonality(model: Any) -> torch.Tensor:
    """AdaLoRA's regulariser with its weight: mean distance of P^T P and Q Q^T from the identity.

    peft adds it to a loss that the model computes; ours is computed outside of it.
    """
    adapter = model.base_model.trainable_adapter_name
    distances = []
    for name, p in model.named_parameters():
        if adapter in name and ("lora_A" in name or "lora_B" in name):
            product = p @ p.T if "lora_A" in name else p.T @ p
            distances.append(torch.norm(product - torch.eye(*product.shape, device=p.device, dtype=p.dtype), p="fro"))
    weight: float = model.peft_config[adapter].orth_reg_weight
    return weight * torch.stack(distances).mean()


@contextlib.contextmanager
def ranks_may_be_zero(model: Any) -> Iterator[None]:
    """Silence peft's guess, when an adapter is saved, that a tensor without elements was not gathered from its shards."""
    with warnings.catch_warnings():
        if allocates_ranks(model):
            warnings.filterwarnings("ignore", message="Adapter .* have invalid shape")
        yield


def ranks(model: Any) -> dict[str, dict[str, int]]:
    """Each adapted module's rank at the start and now."""
    adapter = model.base_model.trainable_adapter_name
    found = {}
    for name, p in model.named_parameters():
        if f"lora_E.{adapter}" in name:
            module = name.removeprefix("base_model.model.").partition(".lora_E")[0]
            found[module] = {"initial": len(p), "final": int(p.detach().ne(0).sum())}
    return found


def ranks_state(model: Any) -> dict[str, Any]:
    """What a checkpoint must hold for the allocation to go on as if never interrupted.

    The trained parameters are part of it: peft saves an adapter without the ranks that are masked for now, and a mask may
    still move.
    """
    allocator, adapter = model.base_model.rankallocator, model.base_model.trainable_adapter_name
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pattern = model.peft_config[adapter].rank_pattern
    return {name: getattr(allocator, name) for name in _STATE} | {"rank_pattern": pattern, "parameters": parameters}


def load_ranks_state(model: Any, state: dict[str, Any]) -> None:
    """Put back what `ranks_state` gave."""
    allocator, adapter = model.base_model.rankallocator, model.base_model.trainable_adapter_name
    device = next(model.parameters()).device
    for name in _STATE:
        setattr(allocator, name, {parameter: tensor.to(device) for parameter, tensor in state[name].items()})
    model.peft_config[adapter].rank_pattern = state["rank_pattern"]
    model.load_state_dict(state["parameters"], strict=False)
