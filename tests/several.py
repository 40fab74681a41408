"""Train several recipes, one after the other, in the processes of one launch: to start processes costs more than to train.

    accelerate launch ... tests/several.py RECIPE ...

Beside each run directory NAME, NAME.rows.RANK.json lists the training rows of every micro-batch. With
SCALEPEFT_TESTS_FSDP_ON_CPU accelerate takes processes on CPUs for ones on GPUs, and divides the model by FSDP2.
"""

from __future__ import annotations

import json
import os
import sys

ON_CPU = "SCALEPEFT_TESTS_FSDP_ON_CPU" in os.environ
if ON_CPU:
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"

from accelerate import Accelerator, PartialState  # noqa: E402  # after its variable is set
from accelerate.state import AcceleratorState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from scalepeft import engines, launch  # noqa: E402
from scalepeft import recipe as recipes  # noqa: E402
from scalepeft.train import train  # noqa: E402
from scalepeft.trainer import Rows  # noqa: E402

taken: dict[Rows, list[list[int]]] = {}
getitems = Rows.__getitems__


def recording(self: Rows, indices: list[int]) -> list[dict]:
    taken.setdefault(self, []).append(list(indices))
    return getitems(self, indices)


def prepared() -> list[str]:
    """Let one process train several recipes, and on CPUs, when that is asked for, as on GPUs; the overrides for that."""
    Accelerator.end_training = lambda _: None  # it would take the group of processes away
    if not ON_CPU:
        return []
    engines.make_ready = lambda: None  # which refuses FSDP on a CPU
    launch.on_cpu = lambda: False
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    return ["training.use_cpu=false"]


def main() -> None:
    Rows.__getitems__ = recording
    overrides = prepared()
    for path in sys.argv[1:]:
        AcceleratorState._reset_state()
        taken.clear()
        run = train(recipes.load(path, overrides))
        rows = max(taken, key=len)  # the training rows are the most
        file = run.path.with_name(f"{run.path.name}.rows.{os.environ.get('RANK', '0')}.json")
        file.write_text(json.dumps(taken[rows]), encoding="utf-8")


if __name__ == "__main__":
    main()
