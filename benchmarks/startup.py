"""How long the light verbs take, against a bare interpreter.

    python benchmarks/startup.py

Prints a table and exits 1 when a verb is over its limit. Runs are interleaved and medians compared, so that a busy moment
of the machine falls on all alike.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 11
SCALEPEFT = str(Path(sys.executable).with_name("scalepeft"))
BARE = "python -c pass"
COMMANDS = {
    BARE: [sys.executable, "-c", "pass"],
    "scalepeft --help": [SCALEPEFT, "--help"],
    "scalepeft check quickstart": [SCALEPEFT, "check", "quickstart"],
}
LIMITS = {"scalepeft --help": (0.060, True), "scalepeft check quickstart": (0.300, False)}
"""Seconds, and whether they are counted above the bare interpreter."""


def seconds(command: list[str]) -> float:
    """The wall time of one run, which must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> int:
    """Measure, print, judge."""
    for command in COMMANDS.values():  # byte code and file cache
        seconds(command)
    measured: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(RUNS):
        for name, command in COMMANDS.items():
            measured[name].append(seconds(command))
    median = {name: statistics.median(times) for name, times in measured.items()}
    over = 0
    print(f"{'command':28}{'median ms':>10}{'above bare':>12}{'limit':>8}")
    for name, value in median.items():
        above = value - median[BARE]
        limit, from_bare = LIMITS.get(name, (float("inf"), False))
        late = (above if from_bare else value) > limit
        over += late
        shown = "" if name == BARE else f"{limit * 1e3:.0f}"
        print(f"{name:28}{value * 1e3:10.1f}{above * 1e3:12.1f}{shown:>8}{'  OVER' if late else ''}")
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
