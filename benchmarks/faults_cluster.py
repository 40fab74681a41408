"""Faults of jobs on a real Slurm of three nodes: after each the run goes on, and its adapter is that of a run without it.

    python benchmarks/faults_cluster.py [TIMES]       each fault on each layout, a minute or two of two cores each

The faults are those of tests/test_cluster.py, which holds each run to the undisturbed one byte for byte. It can stop and go on:
what was seen is kept in benchmarks/results/faults_cluster.json, and a fault that was survived so often is not tried again. Ends
with 1 when one was not survived, or cost a step where there was time to save.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "faults_cluster.json"
PART = KEPT.with_suffix(".part")
"""A line for each fault that was survived, until the next session takes it over."""
TIMES = ("queued", "first step", "first step when new")
TEST = "test_whatever_befalls_a_job_it_goes_on"

sys.path.insert(0, str(ROOT / "tests"))

from test_cluster import ALONE  # noqa: E402  # the folder is known only now

from scalepeft.run import versions  # noqa: E402


def main() -> int:
    """Try what is lacking, keep what was seen, and print it."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    status = 0
    for _ in range(times):
        seen = _kept()
        lacking = [case for case in ALONE if _count(seen, case) < times]
        names = [f"tests/test_cluster.py::{TEST}[{layout}, {fault}, alone]" for layout, (fault,) in lacking]
        environment = os.environ | {"SCALEPEFT_RECORD_FAULTS": str(PART)}
        if names:
            done = subprocess.run([sys.executable, "-m", "pytest", "-q", *names], cwd=ROOT, env=environment, check=False)
            status = status or done.returncode
    print("\n".join(_table(_kept())))
    return status


def _kept() -> list[dict[str, Any]]:
    """All that was seen, with what the last session left."""
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {"seen": []}
    if PART.exists():
        told = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True).stdout.strip()
        new = [json.loads(line) for line in PART.read_text(encoding="utf-8").splitlines()]
        kept = {"versions": {"slurm": told, **versions()}, "seen": kept["seen"] + new}
        KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        PART.unlink()
    seen: list[dict[str, Any]] = kept["seen"]
    return seen


def _count(seen: Sequence[Mapping[str, Any]], case: tuple[str, tuple[str]]) -> int:
    return sum((each["layout"], (each["fault"],)) == case for each in seen)


def _table(seen: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "layout             fault              survived  steps lost  s to the start  s to a step  of a new job (medians)"
    for layout, (fault,) in ALONE:
        found = [each for each in seen if (each["layout"], each["fault"]) == (layout, fault)]
        if not found:
            yield f"{layout:18} {fault:18} {0:8}"
            continue
        lost = max(each["lost"] for each in found)
        queued, first, new = (statistics.median(each[key] for each in found) for key in TIMES)
        yield f"{layout:18} {fault:18} {len(found):8}  {lost:10}  {queued:14.1f}  {first:11.1f}  {new:12.1f}"


if __name__ == "__main__":
    sys.exit(main())
