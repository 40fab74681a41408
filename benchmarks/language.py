"""LoRA, QLoRA, DoRA and NEFTune on a small chat model, and DPO: the held-out loss before and after, with three seeds.

    python benchmarks/language.py --data DIR [--only NAME ...] [--seeds 0 1 2] [--runs DIR] [--fresh]

DIR holds sft/alpaca_en_demo.json and preference/dpo_en_demo.json. Each recipe of benchmarks/language/ is trained by `scalepeft
train` with each seed, which changes the adapter's first weights, the order of rows, dropout and noise, not the rows that are
held out; dpo with the first seed only. A complete run is left alone unless --fresh is given. Writes
benchmarks/results/language.json, where runs that were not made keep their figures, prints a table, and exits 1 when QLoRA does
not win back half of the loss that 4-bit weights cost, or its quantised layers take more than 0.27 of their bytes in bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from recipes_table import RESULTS, entry

from scalepeft import model
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.console import quiet_upstream, table

HERE = Path(__file__).resolve().parent
RECIPES = {path.stem: path for path in sorted((HERE / "language").glob("*.yaml")) if path.stem != "base"}
LANGUAGE = RESULTS / "language.json"
SCALEPEFT = [sys.executable, "-m", "scalepeft"]
RECOVERED, BYTES = 0.5, 0.27


def main() -> int:
    """Train, compare, record."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder of the data sets")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="these experiments only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the seeds of each experiment")
    parser.add_argument("--runs", type=Path, default=Path("runs/language"), help="where the run directories go")
    parser.add_argument("--fresh", action="store_true", help="train anew where there is a complete run")
    options = parser.parse_args()
    quiet_upstream()
    folder = options.runs.absolute()
    known: dict[str, Any] = json.loads(LANGUAGE.read_text(encoding="utf-8")) if LANGUAGE.is_file() else {"runs": {}}
    commit = runs.commit()
    os.chdir(options.data)  # the recipes' paths are relative to it
    for seed in options.seeds:  # seeds outside: an interrupted series has some of every experiment
        for name in options.only:
            if name == "dpo" and seed != options.seeds[0]:
                continue
            run = runs.Run(folder / f"{name}-{seed}")
            kept = run.record.get("status") == "complete" and not options.fresh
            command = [*SCALEPEFT, "train", str(RECIPES[name]), f"training.output_dir={run.path}", f"training.seed={seed}"]
            subprocess.run([*command, *(["--fresh"] if options.fresh else [])], check=True)
            found = entry(run, RECIPES[name], "holdout")
            key = f"{name}-{seed}"
            found["commit"] = known["runs"].get(key, {}).get("commit") if kept else commit
            known["runs"][key] = {**found, "seed": seed}
            known["bytes"] = known.get("bytes") or sizes()
            known["summary"] = summary(known["runs"])
            RESULTS.mkdir(exist_ok=True)
            runs.write(LANGUAGE, json.dumps(known, indent=2) + "\n")
    print(printed(known))
    recovered = known["summary"].get("qlora", {}).get("recovered")
    return 0 if (recovered is None or min(recovered) >= RECOVERED) and known["bytes"]["quantised_share"] <= BYTES else 1


def sizes() -> dict[str, Any]:
    """The bytes of the 4-bit base: its quantised layers with their scales, the same layers in bf16, and the rest."""
    base = model.build(recipes.load(RECIPES["qlora"], ["adapter=null"]), [], total_steps=1)[0]
    quantised = in_bf16 = rest = 0
    unquantised: dict[str, int] = {}
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is None:
            rest += parameter.numel() * 2
            unquantised[name.rpartition(".")[0].split(".")[-1]] = unquantised.get(name.rpartition(".")[0].split(".")[-1], 0) + 1
            continue
        scales = [state.absmax, state.code, state.offset, *([state.state2.absmax, state.state2.code] if state.nested else [])]
        quantised += parameter.numel() * parameter.element_size()
        quantised += sum(scale.numel() * scale.element_size() for scale in scales if scale is not None)
        in_bf16 += state.shape.numel() * 2
    return {
        "quantised": quantised,
        "quantised_in_bf16": in_bf16,
        "quantised_share": round(quantised / in_bf16, 4),
        "rest_in_bf16": rest,
        "rest": unquantised,
        "whole_share": round((quantised + rest) / (in_bf16 + rest), 4),
    }


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """By experiment: mean and spread of the loss after training over the seeds, and what QLoRA won back."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for key, run in sorted(found.items()):
        by_name.setdefault(key.rpartition("-")[0], []).append(run)
    whole = {}
    for name, of in by_name.items():
        losses = [run["after"]["loss"] for run in of]
        whole[name] = {
            "seeds": [run["seed"] for run in of],
            "loss_before": of[0]["before"]["loss"],
            "loss_after": losses,
            "mean": statistics.fmean(losses),
            "spread": statistics.stdev(losses) if len(losses) > 1 else None,
            "seconds": statistics.median(run["seconds"] for run in of),
        }
    if {"lora", "qlora"} <= set(whole):
        cost = whole["qlora"]["loss_before"] - whole["lora"]["loss_before"]
        whole["qlora"]["cost_of_4_bits"] = cost
        whole["qlora"]["recovered"] = [(whole["qlora"]["loss_before"] - loss) / cost for loss in whole["qlora"]["loss_after"]]
    return whole


def printed(known: dict[str, Any]) -> str:
    """The results as a table."""
    rows = [("", "seeds", "loss before", "after (mean)", "spread", "seconds")]
    for name, of in known["summary"].items():
        spread = "-" if of["spread"] is None else f"{of['spread']:.4f}"
        figures = (f"{of['loss_before']:.4f}", f"{of['mean']:.4f}", spread, f"{of['seconds']:.0f}")
        rows.append((name, str(len(of["seeds"])), *figures))
    lines = [table(rows)]
    if recovered := known["summary"].get("qlora", {}).get("recovered"):
        lines.append(f"QLoRA won back {', '.join(f'{share:.1f}' for share in recovered)} times what 4 bits cost")
    lines.append(f"quantised layers: {known['bytes']['quantised_share']} of bf16; whole model {known['bytes']['whole_share']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
