"""Attention over documents that lie end to end in one row, on a CPU: each by itself, not all against all under a mask."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def by_document(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa (1 x heads x tokens x width), computed for each document that the collator's cu_seq_lens_q marks.

    Upstream's builds the mask that keeps documents apart, and computes what it masks. Here each document has its own part of
    that mask, windows and all: the same numbers but for rounding, in time linear in the number of documents.
    """
    bounds = options.get("cu_seq_lens_q")
    square = attention_mask is not None and attention_mask.shape[-2] == attention_mask.shape[-1] == key.shape[2]
    if bounds is None or not square or query.device.type != "cpu":
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    parts = []
    for start, end in itertools.pairwise(bounds.tolist()):
        of = slice(start, end)
        each = (tensor[:, :, of] for tensor in (query, key, value))
        parts.append(sdpa_attention_forward(module, *each, attention_mask[:, :, of, of], **options)[0])
    return torch.cat(parts, dim=1), None


def install() -> None:
    """Let every model of this process whose attention is sdpa compute it so. Other devices and other rows see no difference."""
    AttentionInterface.register("sdpa", by_document)
