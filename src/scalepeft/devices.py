"""What devices do otherwise than the tensors of a plan show: temporaries inside an operation, and an accelerator's own kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch.overrides import TorchFunctionMode

_aten = torch.ops.aten


def hidden(func: Any, args: Any, kwargs: Any) -> int:
    """The bytes that an operation takes and gives back within itself."""
    own = _WITHIN.get(func)
    return own(*args, **kwargs) if own is not None else 0


def _dequantised(given: Any, _: Any, shape: Any, *__: Any, absmax_8bit: Any = None, **___: Any) -> int:
    """bitsandbytes multiplies by a whole weight matrix in the dtype of the input, which it makes of the 4 bits."""
    return int(shape[0] * shape[1] * given.element_size()) + (4 * absmax_8bit.numel() if absmax_8bit is not None else 0)


_WITHIN: dict[Any, Callable[..., int]] = {}


class _Accelerator(TorchFunctionMode):
    """Calls in place of a CPU's functions those that an accelerator would run."""

    def __init__(self, *, autocasts: bool) -> None:
        super().__init__()
        self.autocasts = autocasts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002  # upstream's
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _IN_FP32 and self.autocasts and torch.is_autocast_enabled("cpu"):
            args = tuple(a.float() if isinstance(a, torch.Tensor) and a.dtype in _HALF else a for a in args)
            kwargs = {n: a.float() if isinstance(a, torch.Tensor) and a.dtype in _HALF else a for n, a in kwargs.items()}
        return func(*args, **kwargs)


_HALF = (torch.bfloat16, torch.float16)
_IN_FP32 = {F.layer_norm, F.softmax, F.log_softmax, F.cross_entropy, F.mse_loss, torch.softmax, torch.log_softmax, torch.pow}
"""Of the functions that CUDA's autocast runs in float32, and a CPU's does not, those that models here use."""


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    if not training or p == 0 or inplace:
        return F.dropout(x, p, training, inplace)
    return torch.native_dropout(x, p, True)[0]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is None and query.dtype in _HALF:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=query.dtype).masked_fill_(~bias, float("-inf"))
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    found = _aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p, is_causal, scale=scale)
    return found[0]  # type: ignore[no-any-return]


@contextlib.contextmanager
def as_accelerator(*, autocasts: bool) -> Iterator[None]:
    """Run what an accelerator would, where that holds other bytes than a CPU. `autocasts`: under mixed precision."""
    from trl.kernels import chunked_logprob

    def nothing(*_: Any, **__: Any) -> None:
        """TRL's Triton kernels work within their tile."""

    before = {name: getattr(chunked_logprob, name) for name in ("_forward_tile", "_backward_tile")}
    for name in before:
        setattr(chunked_logprob, name, nothing)
    try:
        with _Accelerator(autocasts=autocasts):
            yield
    finally:
        for name, function in before.items():
            setattr(chunked_logprob, name, function)


def _register() -> None:
    import bitsandbytes  # noqa: F401  # defines the operations
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    multiply = torch.ops.bitsandbytes.gemm_4bit
    _WITHIN[multiply.default] = _dequantised
    if multiply not in flop_registry:

        @register_flop_formula(multiply)
        def _flops(a: Any, b: Any, shape: Any, *_: Any, **__: Any) -> int:  # noqa: ARG001
            rows = 1
            for size in a[:-1]:
                rows *= size
            return int(2 * rows * shape[0] * shape[1])


_register()
