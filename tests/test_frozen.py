"""Claims about kept states of frozen layers: training on them is training, and what cannot be served is refused."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import train_here, write_toy
from stopped import carry_out
from test_layout import CLOSE, STILL, figures, launched, measured, steps, weights
from test_resume import NOISY, same_to_the_byte

from scalepeft import frozen, stops
from scalepeft import recipe as recipes
from scalepeft.errors import Interrupted, UserError
from scalepeft.run import Run

LAST = {"target_modules": ["query", "value", "dense"], "layers_to_transform": [1]}
"""The second of the tiny model's two layers."""
KEPT = {"model": {"config": STILL}, "adapter": LAST, "cache_frozen_layers": "1MB"}


def apart(run: Run, other: Run) -> float:
    return max(measured(run, other).values())


def test_states_change_no_number(toy, train):
    """The adapter's own dropout stays, and so do its masks: the frozen layers draw none."""
    training = {"num_train_epochs": 3, "train_sampling_strategy": "group_by_length"}
    run = train(toy("kept", training=training, **KEPT))
    plain = train(toy("plain", training=training, **KEPT | {"cache_frozen_layers": None}))
    print(measured(run, plain))
    assert apart(run, plain) < 1e-6
    assert run.record["metrics"]["after"] == pytest.approx(plain.record["metrics"]["after"], rel=1e-6)
    assert not (run.path / frozen.FOLDER).exists()
