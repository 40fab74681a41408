"""`python -m scalepeft.train` with a fault in process 1, as FAULT says: what the other processes of a launch must survive."""

from __future__ import annotations

import os
import signal
import sys

from scalepeft import run, train
from scalepeft.console import quiet_upstream
from scalepeft.errors import program

FAULT = os.environ["FAULT"] if os.environ["RANK"] == "1" else ""


def at_step_2(action):
    """Do something when two steps are done."""
    quiet_upstream()

    from scalepeft.callbacks import StopRequest

    def on_step_end(self, args, state, control, **others):
        if state.global_step == 2:
            action()
        return kept(self, args, state, control, **others)

    kept, StopRequest.on_step_end = StopRequest.on_step_end, on_step_end


def raise_one() -> None:
    raise ArithmeticError("the fault of process 1")


if FAULT == "recipe":
    sys.argv.append("training.learning_rate=0.5")
elif FAULT == "installation":
    packages = run.packages
    run.packages = lambda: packages() | {"peft": "0.0.1"}
elif FAULT == "data":
    os.chdir("other")
elif FAULT == "missing":
    sys.argv[1] = "gone.yaml"
elif FAULT == "raise":
    at_step_2(raise_one)
elif FAULT == "kill":
    at_step_2(lambda: os.kill(os.getpid(), signal.SIGKILL))

if __name__ == "__main__":
    sys.exit(program(train.main))
