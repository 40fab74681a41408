"""Operators that torch computes slowly on some processors, computed there by faster ones of its own.

Two are worth it. Without bf16 in hardware (AVX2: most desktops and laptops), torch multiplies matrices of bf16 and fp16 number
by number: forward 5, backward 70 times slower than fp32. And where MKL does not draw dropout's masks, which it does on Intel's
processors alone, each element takes 7 ns of a single thread: 29 % of a step of the quickstart.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

_HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def computes(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of a dtype of two bytes in hardware."""
    supported = getattr(torch.ops.mkldnn, f"_is_mkldnn_{_HALVES[dtype]}_supported", None)  # torch has no public word for it
    return bool(supported and supported())


@functools.cache  # once in a process; what it returns would undo it when it is forgotten
def speed_up() -> torch.library.Library:
    """Use the faster operators on CPUs, in the whole process. What is computed on other devices is not touched.

    Products of halves differ from torch's as two of torch's own kernels do: the same numbers are multiplied, summed in float32
    and rounded once. Masks are of the same distribution and other draws, now the same ones on every processor.
    """
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)  # that they are replaced
        library.impl("bernoulli_.float", bernoulli_, "CPU")  # type: ignore[no-untyped-call]
        for name in PRODUCTS if slow() else ():
            library.impl(name, _in_float32(name), "CPU")  # type: ignore[no-untyped-call]
    return library


@functools.cache
def slow() -> frozenset[torch.dtype]:
    """The dtypes of two bytes whose products this processor has no hardware for."""
    return frozenset(dtype for dtype in _HALVES if not computes(dtype))


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")
_FEW = 8
"""Rows up to which torch's own product with a transposed matrix is faster, as in generation: of one row and a vocabulary of
49,152 it takes 2 ms, and to make the matrix one of float32 57 ms."""


def widens(dtype: torch.dtype, rows: int, *, transposed: bool) -> bool:
    """Whether a product of matrices of a dtype is computed from copies in float32; `rows` are the first one's."""
    return dtype in slow() and not (rows <= _FEW and transposed)


def _in_float32(name: str) -> Callable[..., torch.Tensor]:
    # the variant that writes into a given tensor is an operator of its own, and stays torch's
    product: Callable[..., torch.Tensor] = getattr(torch.ops.aten, name).out

    def multiplied(*tensors: torch.Tensor, **scales: Any) -> torch.Tensor:
        left, right = tensors[-2:]
        # torch refuses other ones in its own words
        alike = min(left.dim(), right.dim()) > 1 and all(tensor.dtype is right.dtype for tensor in tensors)
        if alike and widens(right.dtype, left.shape[-2], transposed=right.stride(-2) == 1):
            return product(*(tensor.float() for tensor in tensors), **scales, out=torch.empty(0)).to(right.dtype)
        return product(*tensors, **scales, out=left.new_empty(0))

    return multiplied


def bernoulli_(mask: torch.Tensor, p: float = 0.5, *, generator: torch.Generator | None = None) -> torch.Tensor:
    """Fill with ones, each with probability p to within 2^-17, and zeros: 16 random bits decide over an element."""
    if not 0 <= p <= 1:
        raise RuntimeError(f"bernoulli_ expects p to be between 0 and 1, but got p={p}")
    ones = round(p * 2**16)
    if ones in (0, 2**16):  # neither is to be told from all draws by a number of 16 bits
        return mask.fill_(ones > 0)
    bits = torch.empty(-(-mask.numel() // 4), dtype=torch.int64)
    bits.random_(-(2**63), None, generator=generator)  # all 64 bits
    draws = bits.view(torch.int16)[: mask.numel()].view(mask.shape)
    return mask.copy_(draws < ones - 2**15)
