"""Attention on a CPU over each document by itself: without the padding behind it, and without the others that share its row."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


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
    spans = _spans(attention_mask, len(query), bounds) if query.device.type == "cpu" and tokens == key.shape[2] else []
    if attention_mask is None or not spans:
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


def _spans(mask: torch.Tensor | None, rows: int, bounds: torch.Tensor | None) -> list[tuple[int, int, int]]:
    """Row, first token and end of each document; none where the mask (rows x 1 x tokens x tokens) is of another kind.

    Padding is known by the last position of each row, which sees all tokens of the document and nothing behind it.
    """
    if mask is None or mask.dtype != torch.bool or mask.shape[:2] != (rows, 1) or mask.shape[2] != mask.shape[3]:
        return []
    if bounds is not None:
        return [(0, start, end) for start, end in itertools.pairwise(bounds.tolist())] if rows == 1 else []
    last = mask[:, 0, -1]
    lengths = last.sum(-1)
    prefix = torch.arange(last.shape[-1]) < lengths[:, None]
    padded = bool((last == prefix).all()) and 0 < int(lengths.min()) < last.shape[-1]
    return [(row, 0, length) for row, length in enumerate(lengths.tolist())] if padded else []


NAME = "sdpa_by_document"
AttentionInterface.register(NAME, by_document)
AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model: PreTrainedModel) -> None:
    """Let a model whose attention is sdpa compute it so: other models of the process, and what is saved, see no difference."""
    if model.config._attn_implementation == "sdpa" and model._can_set_attn_implementation():  # noqa: SLF001  # no public names
        model.set_attn_implementation(NAME)
