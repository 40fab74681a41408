"""The benchmark of QLoRA: it counts what it says it counts, and both sides run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scalepeft.console import quiet_upstream
from scalepeft.run import Run

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu_qlora.py"


@pytest.fixture(scope="module")
def script():
    """The script as a module."""
    found = importlib.util.spec_from_file_location("gpu_qlora", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["gpu_qlora"] = module  # dataclasses look their module up there
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_flops_are_those_that_torch_counts(script, checkpointing):
    """Eager attention has no mask that saves work: every token sees every other one."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM

    quiet_upstream()
    shape, length = script.SHAPES["tiny"], 100
    base = LlamaForCausalLM._from_config(LlamaConfig(**shape.config), attn_implementation="eager")
    model = get_peft_model(base, LoraConfig(r=script.RANK, target_modules="all-linear", task_type="CAUSAL_LM")).train()
    base.enable_input_require_grads()
    if checkpointing:
        base.activation_checkpointing_enable()
    ids = torch.randint(shape.config["vocab_size"], (1, length))
    with FlopCounterMode(display=False) as counted:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    needed, executed = script.flops(shape, length)
    if checkpointing:  # torch leaves out the last product of a block, whose result nobody needs
        assert counted.get_total_flops() / length == pytest.approx(executed, rel=0.005)
    else:
        assert counted.get_total_flops() / length == needed


def test_a_ratio_is_taken_within_each_round_and_a_cpu_is_not_judged(script):
    speeds = {("scalepeft", 0): 90.0, ("trl", 0): 100.0, ("scalepeft", 1): 20.0, ("trl", 1): 10.0, ("scalepeft", 2): 9.0}
    speeds["trl", 2] = 10.0
    found = [
        {
            "round": number,
            "side": side,
            "tokens_per_second": speed,
            "peak_memory_bytes": 100,
            "device": "NVIDIA H200",
            "losses": [2.0],
        }
        for (side, number), speed in speeds.items()
    ]
    options = argparse.Namespace(shape="tiny", attention="sdpa")
    entry = script.entry(options, 6, found)
    assert entry["ratio"]["tokens_per_second"] == {"median": 0.9, "min": 0.9, "max": 2.0}
    assert script.misses(entry) == ["tokens_per_second"]
    assert script.misses({**entry, "device": "cpu"}) == []
    assert script.misses({**entry, "losses_apart": 0.1}) == ["tokens_per_second", "losses"]


def test_fused_kernels_are_compared_with_trl_without_them(script):
    def run(side, speed, loss):
        own = {"round": 0, "side": side, "tokens_per_second": speed, "peak_memory_bytes": 100, "device": "NVIDIA H200"}
        return {**own, "losses": [loss]}

    fused, plain = (
        [run("scalepeft", 130.0, 2.0), run("trl", 120.0, 2.1)],
        [run("scalepeft", 101.0, 2.0), run("trl", 100.0, 2.02)],
    )
    options = argparse.Namespace(shape="tiny", attention="sdpa")
    entry = script.entry(options, 6, script.kernels(fused, plain), least=script.WITH_KERNELS)
    assert entry["ratio"]["tokens_per_second"]["median"] == 1.3
    assert entry["losses_apart"] == pytest.approx(0.02 / 2.02)
    assert script.misses(entry) == []


@pytest.mark.long  # four processes, each with its imports
def test_both_sides_train_the_same_tokens_and_are_recorded(tmp_path):
    output = tmp_path / "result.json"
    command = [sys.executable, SCRIPT, "--shape", "tiny", "--rounds", "1", "--steps", "6"]
    subprocess.run([*command, "--work", tmp_path, "--output", output], check=True, timeout=300)
    found = json.loads(output.read_text())["liger off"]
    ours, trl = found["runs"]
    assert [ours["side"], trl["side"]] == ["scalepeft", "trl"]
    for run in (ours, trl):
        assert run["steps"] == 6
        assert run["tokens"] / run["seconds"] == pytest.approx(run["tokens_per_second"], rel=1e-3)
        assert 0.8 * 6 * found["tokens_per_step"] < run["tokens"] <= 6 * found["tokens_per_step"], "rows are not packed"
        assert run["mfu"] is None, "a CPU's peak is not known"
        assert run["peak_memory_bytes"] > 2**26
    assert Run(tmp_path / "tiny" / "scalepeft").record["status"] == "complete"
    assert found["versions"]["trl"]


def test_no_liger_no_figure(script, monkeypatch, tmp_path):
    if importlib.util.find_spec("liger_kernel"):
        pytest.skip("it is installed")
    monkeypatch.setattr(sys, "argv", ["gpu_qlora.py", "--liger", "on", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="liger_kernel is not installed"):
        script.main()
