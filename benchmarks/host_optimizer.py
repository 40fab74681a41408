"""AdamW on the host, as ZeRO with offload steps it: torch's fused one against DeepSpeedCPUAdam, their speed and step lengths.

    python benchmarks/host_optimizer.py [--short]      a minute, after DeepSpeed has compiled its extension (another)

Both hold the same twenty million numbers in float32 and take the same gradients. Writes results/host_optimizer.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from ratios import Ratio, interleaved, keep

RATE = 1e-3
STEPS = 20
"""Of a turn."""


def main() -> int:
    """Compare."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--short", action="store_true", help="one turn each; keeps nothing")
    options = parser.parse_args()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    makers: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "torch, fused": partial(torch.optim.AdamW, fused=True),
        "DeepSpeedCPUAdam": partial(DeepSpeedCPUAdam, adamw_mode=True),
    }
    off = {name: _off(made) for name, made in makers.items()}
    ways = {name: partial(_rate, made([_parameter(20_000_000)], lr=RATE)) for name, made in makers.items()}
    found = interleaved(ways, repetitions=1 if options.short else 7)
    ours, other = makers
    ratios = [Ratio(claim="The recipe's own AdamW is as fast on the host", ours=ours, other=other, least=0.95)]
    notes = [
        f"Step lengths, the furthest of fifty from those in float64, relative: {name} {apart:.1e}."
        for name, apart in off.items()
    ]
    print(*notes, sep="\n")
    return keep("host_optimizer", what=WHAT, unit="steps/s", found=found, ratios=ratios, short=options.short, notes=notes)


WHAT = "AdamW over twenty million numbers in the host's memory, as each step of ZeRO with offload takes it."


def _parameter(size: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
    parameter.grad = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    return parameter


def _rate(optimizer: torch.optim.Optimizer) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        optimizer.step()
    return STEPS / (time.perf_counter() - started)


def _off(made: Callable[..., torch.optim.Optimizer]) -> float:
    """How far the lengths of steps lie from AdamW's in float64: the projection of each on the exact step, less 1."""
    tried, exact = _parameter(4096), _parameter(4096, torch.float64)
    optimizers = made([tried], lr=RATE, weight_decay=0.0), torch.optim.AdamW([exact], lr=RATE, weight_decay=0.0)
    furthest = 0.0
    for _ in range(50):
        with torch.no_grad():  # each step from nought, so that no sum of weights rounds it away
            tried.zero_()
            exact.zero_()
        for optimizer in optimizers:
            optimizer.step()
        furthest = max(furthest, abs(float((tried.double() @ exact / (exact @ exact)).detach()) - 1))
    return furthest


if __name__ == "__main__":
    sys.exit(main())
