"""What devices do that the tensors of a plan do not show: temporaries inside an operation, an accelerator's own kernels."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own custom
from torch._subclasses.fake_tensor import FakeTensorMode

from scalepeft import operators

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention  # noqa: SLF001  # what F's function calls
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention  # noqa: SLF001


def hidden(func: Any, args: Any, kwargs: Any, *, accelerator: bool) -> int:
    """The bytes that an operation takes and gives back within itself."""
    own = (_WITHIN if accelerator else _WITHIN_ON_CPU).get(func)
    return own(*args, **kwargs) if own is not None else 0


def _dequantised(given: Any, _: Any, shape: Any, *__: Any, absmax_8bit: Any = None, **___: Any) -> int:
    """bitsandbytes multiplies by a whole weight matrix in the dtype of the input, which it makes of the 4 bits."""
    return int(shape[0] * shape[1] * given.element_size()) + (4 * absmax_8bit.numel() if absmax_8bit is not None else 0)


def _multiplied(*tensors: torch.Tensor, **_: Any) -> int:
    """What a product of two bytes a number takes on a CPU that has it in float32 alone: copies of its tensors, and the sums.

    The result is made of the sums when the copies are gone, so that its bytes, which are there already, are not wanted twice.
    """
    left, right = tensors[-2:]
    if not operators.widens(right.dtype, left.shape[-2], transposed=right.stride(-2) == 1):
        return 0
    sums = left.numel() // left.shape[-1] * right.shape[-1]
    return 4 * sum(tensor.numel() for tensor in tensors) + (4 - right.element_size()) * sums


def _dequantised_on_cpu(given: torch.Tensor, packed: Any, shape: Any, *more: Any, **options: Any) -> int:
    weight = given.new_empty(tuple(shape)).t()
    return _dequantised(given, packed, shape, *more, **options) + _multiplied(given.reshape(-1, given.shape[-1]), weight)


def _drawn(mask: torch.Tensor, *_: Any, **__: Any) -> int:
    """16 bits an element, and whether it stays."""
    return 3 * mask.numel()


_WITHIN: dict[Any, Callable[..., int]] = {}
_WITHIN_ON_CPU: dict[Any, Callable[..., int]] = {
    torch.ops.aten.bernoulli_.float: _drawn,
    **{getattr(torch.ops.aten, name).default: _multiplied for name in operators.PRODUCTS},
}


_HALF = (torch.bfloat16, torch.float16)
_IN_FP32 = ("layer_norm", "softmax", "log_softmax", "cross_entropy")
"""Of the functions that CUDA's autocast runs in float32, and a CPU's does not, those that models here use."""


def _in_fp32(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def found(*args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(map(_raised, args))
            kwargs = {name: _raised(value) for name, value in kwargs.items()}
        return function(*args, **kwargs)

    return found


def _raised(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in _HALF else value


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:  # noqa: ARG001  # in place saves no mask
    if not training or p == 0:
        return x
    return torch.native_dropout(x, p, True)[0]


def _attention(  # noqa: PLR0917  # F.scaled_dot_product_attention's
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
        return _FLASH(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    bias = attn_mask
    if bias is not None and bias.dtype == torch.bool:
        # as torch's, but of the query: masks are real, and those of long rows have GBs
        bias = query.new_zeros(bias.shape).masked_fill_(query.new_empty(bias.shape, dtype=torch.bool), float("-inf"))
    if bias is not None:
        bias = bias.expand(*query.shape[:-1], key.shape[-2])
    found = _EFFICIENT(query, key, value, bias, True, dropout_p, is_causal, scale=scale)
    return found[0]  # type: ignore[no-any-return]


class _Unreal:
    """torch, for a module that makes tensors of its own: they have no storage either."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode

    def __getattr__(self, name: str) -> Any:
        found = getattr(torch, name)
        if name not in ("arange", "empty", "full", "zeros"):
            return found

        def made(*args: Any, **kwargs: Any) -> Any:
            with self.mode:
                return found(*args, **kwargs)

        return made


def _loaded(*names: str) -> list[Any]:
    """Modules of a language model's loss; a classifier's plan does without TRL, whose import takes a second."""
    return [sys.modules[name] for name in names if name in sys.modules]


@contextlib.contextmanager
def without_storage(mode: FakeTensorMode) -> Iterator[None]:
    """Let the loss of language models, TRL's and that of a CPU, make its buffers on the tensors of a plan."""
    modules = _loaded("trl.kernels.chunked_logprob", "scalepeft.heads")
    for module in modules:
        vars(module)["torch"] = _Unreal(mode)
    try:
        yield
    finally:
        for module in modules:
            vars(module)["torch"] = torch


@contextlib.contextmanager
def as_accelerator() -> Iterator[None]:
    """Run what an accelerator would, where that holds other bytes than a CPU."""

    def nothing(*_: Any, **__: Any) -> None:
        """TRL's Triton kernels work within their tile."""

    acting: list[tuple[Any, str, Any]] = [(F, name, _in_fp32(getattr(F, name))) for name in _IN_FP32]
    acting += [(F, "dropout", _dropout), (F, "scaled_dot_product_attention", _attention)]
    kernels = _loaded("trl.kernels.chunked_logprob")
    acting += [(module, name, nothing) for module in kernels for name in ("_forward_tile", "_backward_tile")]
    before = [(module, name, getattr(module, name)) for module, name, _ in acting]
    for module, name, function in acting:
        setattr(module, name, function)
    try:
        yield
    finally:
        for module, name, function in before:
            setattr(module, name, function)


def _register() -> None:
    import bitsandbytes  # noqa: F401  # defines the operations
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    multiply = torch.ops.bitsandbytes.gemm_4bit
    _WITHIN[multiply.default], _WITHIN_ON_CPU[multiply.default] = _dequantised, _dequantised_on_cpu
    if multiply not in flop_registry:

        @register_flop_formula(multiply)
        def _flops(a: Any, b: Any, shape: Any, *_: Any, **__: Any) -> int:  # noqa: ARG001
            rows = 1
            for size in a[:-1]:
                rows *= size
            return int(2 * rows * shape[0] * shape[1])


_register()
