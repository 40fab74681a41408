"""Attention on a CPU over each document by itself: without the padding behind it, and without the others that share its row."""

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
    """transformers' sdpa (rows x tokens x heads x width), from one call of it a document.

    Upstream's computes all tokens of a batch against all and masks what must not be seen. A document that the collator's
    cu_seq_lens_q marks, or that padding follows, is computed under its own part of that mask, windows and all: the same
    numbers but for rounding. Padding gets zeros, which no document sees. Any other mask is left to upstream.
    """
    tokens, bounds = query.shape[2], options.get("cu_seq_lens_q")
    spans: list[tuple[int, int, int]] = []
    if attention_mask is not None and query.device.type == "cpu" and attention_mask.shape[-2:] == (tokens, key.shape[2]):
        if bounds is not None and len(query) == 1:
            spans = [(0, start, end) for start, end in itertools.pairwise(bounds.tolist())]
        elif bounds is None and tokens == key.shape[2]:
            spans = [(row, 0, length) for row, length in enumerate(_before_padding(attention_mask, len(query)))]
    if not spans:
        found: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return found
    parts = []
    for row, start, end in spans:
        each = (tensor[row : row + 1, :, start:end] for tensor in (query, key, value))
        mask = attention_mask[row : row + 1, :, start:end, start:end]
        parts.append(sdpa_attention_forward(module, *each, mask, **options)[0])
    if bounds is not None:
        return torch.cat(parts, dim=1), None
    return torch.cat([torch.nn.functional.pad(part, (0, 0, 0, 0, 0, tokens - part.shape[1])) for part in parts]), None


def _before_padding(mask: torch.Tensor, rows: int) -> list[int]:
    """The tokens of each row, when its last position sees all of them and padding behind them alone; else nothing."""
    if mask.dtype != torch.bool or mask.shape[:2] != (rows, 1):
        return []
    last = mask[:, 0, -1]
    lengths = last.sum(-1)
    prefix = torch.arange(last.shape[-1]) < lengths[:, None]
    return lengths.tolist() if bool((last == prefix).all()) and 0 < int(lengths.min()) < last.shape[-1] else []


def install() -> None:
    """Let every model of this process whose attention is sdpa compute it so; other devices and masks see no difference."""
    AttentionInterface.register("sdpa", by_document)
