"""The head of a language model: log-probabilities of the tokens that count, on CPUs without the work for all others."""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from trl.kernels import ChunkedLogProbFunction
from trl.trainer import utils

_TILE = 2**24
"""Logits that are held at once: 64 MiB in float32. Halving or doubling it moved the head's time by less than 5 %."""


class LogProbs(torch.autograd.Function):
    """Log-probabilities of targets under a frozen head, whose gradient is found beside them.

    The gradient of log p(target) with respect to the hidden state is the target's row of the weight less the rows' mean under
    p. It does not depend on what the loss makes of the log-probabilities, so that the forward pass computes it while it has
    the tile: two products with the weight in all, where a recomputing backward pass takes three, and no logits are kept.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probabilities, entropies, mean logits, is_top1 (N each) from hidden states (N x H), weight (V x H), targets (N).

        Only log-probabilities have a gradient, and entropies are zero where none is asked for. bf16 and fp16 are the dtypes of
        the products alone, as under autocast.
        """
        rows, vocabulary = len(targets), len(weight)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        states, weight = hidden.to(dtype), weight.to(dtype)
        log_probs, entropies, means = (torch.zeros(rows, device=hidden.device) for _ in range(3))
        top = torch.zeros(rows, dtype=torch.bool, device=hidden.device)
        slope = torch.empty_like(hidden, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        size = max(1, _TILE // vocabulary)
        for start in range(0, rows, size):
            of = slice(start, start + size)
            logits = (states[of] @ weight.t()).float()
            largest, likeliest = logits.max(-1)
            scored = logits.gather(1, targets[of, None])[:, 0]
            means[of] = logits.mean(-1)
            # not torch.softmax, whose plain sum over 49,152 tokens is 1e-5 too small: this one is taken in a cascade
            weights = logits.sub_(largest[:, None]).exp_()
            summed = weights.sum(-1)
            total = largest + summed.log()
            log_probs[of], top[of] = scored - total, likeliest == targets[of]
            if slope is not None:
                mean = (weights.to(dtype) @ weight).float() / summed[:, None]
                entropies[of] = total - (mean * states[of].float()).sum(-1)
                torch.sub(weight[targets[of]].float(), mean, out=slope[of])
        ctx.save_for_backward(slope)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(entropies, means, top)
        return log_probs, entropies, means, top

    @staticmethod
    def backward(ctx: Any, slopes: torch.Tensor, *_: Any) -> tuple[torch.Tensor, None, None]:
        """The gradient with respect to the hidden states (N x H)."""
        (slope,) = ctx.saved_tensors
        return (slopes[:, None] * slope).to(ctx.dtype), None, None


class _Head:
    """Stands where TRL's head calls its ChunkedLogProbFunction, and leaves to that what LogProbs does not do."""

    @staticmethod
    def apply(hidden: torch.Tensor, weight: torch.Tensor, *given: Any) -> tuple[torch.Tensor | None, ...]:
        bias, targets, temperature, _, softcap, scale, outputs = given
        plain = bias is None and softcap is None and scale == temperature == 1.0 and "log_sum_sq_probs" not in outputs
        if not plain or hidden.device.type != "cpu" or (weight.requires_grad and torch.is_grad_enabled()):
            found: tuple[torch.Tensor | None, ...] = ChunkedLogProbFunction.apply(hidden, weight, *given)
            return found
        log_probs, entropies, means, top = LogProbs.apply(hidden, weight, targets)  # type: ignore[no-untyped-call]
        return log_probs, entropies, None, means, top


_NAMES = {
    **vars(utils),
    "_ChunkedLogProbFunction": _Head,
    "_use_triton": lambda device: device.type == "cpu" or utils._use_triton(device),  # noqa: SLF001  # upstream's other devices
}
add_fused_lm_head = FunctionType(utils.add_fused_lm_head.__code__, _NAMES, argdefs=utils.add_fused_lm_head.__defaults__)
"""TRL's function of this name, with all that it does for one architecture or another, but for a CPU.

There, TRL projects every position of a batch, computes the tiles again in the backward pass and takes an entropy of each. This
scores the targets alone. The two are chosen by names that TRL's function looks up in its module; here it has other ones. Given
to a model that has TRL's head, it comes before that.
"""


def add_planned_lm_head(model: Any, targets: int, *, accelerator: bool, **options: Any) -> None:
    """The same on tensors without numbers, which cannot say where targets stand: there are so many.

    Labels are to be given as `shift_labels`: TRL then hands over the states of all positions as they are, not a copy.
    """

    class Planned:
        @staticmethod
        def apply(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, labels: torch.Tensor, *given: Any) -> tuple[Any, ...]:
            head = ChunkedLogProbFunction if accelerator else _Head
            found = head.apply(hidden[:targets].clone(), weight, bias, labels[:targets], *given)
            return tuple(x if x is None else torch.nn.functional.pad(x, (0, len(labels) - targets)) for x in found)

    names = {**_NAMES, "_ChunkedLogProbFunction": Planned, "_use_triton": lambda _: False}
    original = utils.add_fused_lm_head
    FunctionType(original.__code__, names, argdefs=original.__defaults__)(model, **options)
