"""What a second process costs: two processes of one thread each against one process of two, the same recipe and global batch.

    python benchmarks/layout_overhead.py [PAIRS]      five pairs take some six minutes on two cores

The quickstart's model and rows, 40 steps of 16 rows in fp32, in turn: two processes, one, two, ... A pair's ratio is that of
the rows per second that each run records of its training loop. Writes benchmarks/results/layout_overhead.json.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "benchmarks" / "results" / "layout_overhead.json"
LOOP = [
    *("training.bf16=false", "training.max_steps=40", "training.eval_on_start=false", "training.eval_strategy=no"),
    *("training.save_strategy=no",),
    *("data.train.sample_rows=2000", "data.evaluation.test.sample_rows=32"),
]
LAYOUTS = {
    "two": ("1", ["training.per_device_train_batch_size=8", "--launch", "multi_cpu", "--num-processes", "2"]),
    "one": ("2", ["training.per_device_train_batch_size=16"]),
}
"""Threads of a process, and the words that choose the layout."""


def main() -> int:
    """Measure, print and keep the ratios."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    found: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    versions = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(pairs + 1):  # the first pair warms the caches
            for name in LAYOUTS:
                record = train(Path(folder) / f"{name}{number}", name)
                versions = record["versions"]
                if number:
                    found[name].append(record["samples_per_second"])
                    print(f"{name}: {record['samples_per_second']:.1f} rows/s", flush=True)
    ratios = [two / one for two, one in zip(found["two"], found["one"], strict=True)]
    kept = {"rows_per_second": found, "ratios": ratios, "median": statistics.median(ratios), "versions": versions}
    print(f"two processes / one process: {kept['median']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    KEPT.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    return 0


def train(run: Path, name: str) -> dict[str, object]:
    """Train a run of the quickstart on a layout; its record."""
    threads, words = LAYOUTS[name]
    command = [sys.executable, "-m", "scalepeft", "train", "quickstart", f"training.output_dir={run}", *LOOP, *words]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=True, capture_output=True)
    record: dict[str, object] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return record


if __name__ == "__main__":
    sys.exit(main())
