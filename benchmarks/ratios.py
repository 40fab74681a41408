"""Ratios of interleaved runs: how this project's figures on speed and memory are measured, kept and judged.

A script of this folder names its ways of doing one thing and calls `interleaved`, which runs them in turns, so that a busy
moment of the machine falls on all alike; then `Ratio`s, each with its target; then `keep`, which writes them to
benchmarks/results/NAME.json, from which performance_page.py writes docs/performance.md.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import random
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.run import versions

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def interleaved(ways: Mapping[str, Callable[[], float]], *, repetitions: int, warm: bool = True) -> dict[str, list[float]]:
    """One figure of each way a repetition, the ways in another order each time; `warm` runs each once before, uncounted."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    if warm:
        for way in ways.values():
            way()
    order = random.Random(0)  # noqa: S311  # no secret
    for _ in range(repetitions):
        for name in order.sample(list(ways), len(ways)):
            found[name].append(ways[name]())
            print(f"{name}: {found[name][-1]:.4g}", flush=True)
    return found


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """What is claimed of two ways: one's figure over the other's, of the same repetition."""

    claim: str
    """One sentence for the reader of the page, without the figure."""
    ours: str
    other: str
    """Names of ways."""
    least: float | None = None
    most: float | None = None
    """The target, where there is one."""

    def of(self, found: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """Median and spread over the repetitions, and whether the median keeps the target."""
        each = [a / b for a, b in zip(found[self.ours], found[self.other], strict=True)]
        median = statistics.median(each)
        kept = (self.least is None or median >= self.least) and (self.most is None or median <= self.most)
        spread = {"median": median, "lowest": min(each), "highest": max(each)}
        return {"claim": self.claim, "ours": self.ours, "other": self.other, **spread, **self._target(), "kept": kept}

    def _target(self) -> dict[str, float]:
        return {name: value for name in ("least", "most") if (value := getattr(self, name)) is not None}


def keep(
    name: str,
    *,
    what: str,
    unit: str,
    found: Mapping[str, Sequence[float]],
    ratios: Sequence[Ratio] = (),
    short: bool = False,
    **more: Any,
) -> int:
    """Print the ratios and write results/NAME.json (a short form writes nothing); the exit status: 1 when a target is missed.

    `what` says in a sentence what was measured; `unit` is that of the figures in `found`; `more` is kept as it is, `notes` (a
    list of sentences) and `curves` (a list of {title, x, y, series: {name: [[x, y], ...]}}) come onto the page.
    """
    judged = [ratio.of(found) for ratio in ratios]
    for each in judged:
        target = ", ".join(f"{word} {each[key]:g}" for key, word in (("least", "at least"), ("most", "at most")) if key in each)
        spread = f"{each['lowest']:.3g} to {each['highest']:.3g}"
        print(f"{each['ours']} / {each['other']}: {each['median']:.3g} ({spread}) {target}{'' if each['kept'] else '  MISSED'}")
    if not short:
        kept = {"what": what, "unit": unit, "found": found, "ratios": judged, **more, "machine": machine()}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0 if all(each["kept"] for each in judged) else 1


def machine() -> dict[str, Any]:
    """Where, when and with what something was measured."""
    import torch

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else ""),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "accelerator": accelerator,
        "platform": platform.platform(),
        "versions": versions(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    named = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in lines}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in named.get("flags", "").split()]
    return f"{named.get('model name', platform.processor())} ({', '.join(wide)})"
