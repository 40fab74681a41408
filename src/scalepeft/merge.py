"""`scalepeft merge`: adapter and base become one model, tensor by tensor, and the model is proved before it has its name."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scalepeft import beside, orders, proof
from scalepeft import run as runs
from scalepeft.console import quiet_upstream, say, table
from scalepeft.errors import RunFailed, UserError, one_line, program
from scalepeft.orders import Asked
from scalepeft.proof import INPUTS, PLAN, RECIPE

if TYPE_CHECKING:
    from scalepeft.base import Order

MANIFEST = "merge.json"

COMBINATIONS = (
    "linear",
    "cat",
    "svd",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties",
    "dare_linear_svd",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)


def main(arguments: Sequence[str]) -> int:
    """`scalepeft merge RUN --output DIR`."""
    options = _parser().parse_args(arguments)
    quiet_upstream()
    merge(orders.asked(options), options.output, prove=options.proof)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scalepeft merge",
        description="Fold an adapter into its base: a folder for from_pretrained, proved against base and adapter.",
    )
    parser.add_argument("adapters", nargs="+", metavar="RUN", help="a run directory or adapter folder; several are combined")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder to write; it must be new or empty"
    )
    parser.add_argument(
        "--base-model", metavar="MODEL", help="the base of an adapter folder, where that names none or another place"
    )
    parser.add_argument(
        "--base",
        choices=("dequantized", "original"),
        help="after training on quantised weights: merge into what those stand for, or into the files'; measured when absent",
    )
    parser.add_argument(
        "--quantization", nargs="+", metavar="KEY=VALUE", help="how the base of an adapter folder was quantised in training"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="the dtype to write; kept when absent")
    parser.add_argument("--verify", type=Path, metavar="DATA", help="measure loss and logits over the rows of this file, too")
    parser.add_argument("--shard-size", default="5GB", metavar="SIZE", help="the largest file (5GB)")
    parser.add_argument("--weights", nargs="+", type=float, metavar="W", help="the weight of each of several adapters (1)")
    parser.add_argument(
        "--combination", choices=COMBINATIONS, default="linear", help="how several adapters are combined (linear)"
    )
    parser.add_argument("--density", type=float, help="the share of values that ties, dare and magnitude_prune keep")
    parser.add_argument("--seed", type=int, default=42, help="of what dare drops (42)")
    parser.add_argument("--in-memory", action="store_true", help="load the model and let peft merge it")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with an adapter's base")
    parser.add_argument("--no-proof", dest="proof", action="store_false", help="leave out the comparison with base and adapter")
    return parser


def asked_for(source: Path) -> Asked:
    """What `scalepeft merge` would do with a run or an adapter folder, without any option."""
    return orders.asked(_parser().parse_args([str(source), "--output", "-"]))


def merge(asked: Asked, output: Path, *, prove: bool = True) -> dict[str, Any]:
    """Write the merged model; returns what merge.json holds.

    It is made beside, in DIR.part, and renamed when it is complete and proved. A merge that was killed goes on with the
    shards that it has. Raises UserError for what does not fit, RunFailed when the model does not answer as it should.
    """
    started = time.monotonic()
    identity = asked.identity()
    if _finished(output, identity):
        return dict(json.loads((output / MANIFEST).read_bytes()))
    with beside.writing(output, PLAN, ours=("model",)) as part:
        plan = _begun(asked, part, identity)
        order, reason = _choose(asked, part, plan)
        model = part / "model"
        shards, size = _in_memory(order, asked, model) if asked.in_memory else _write(order, asked, part, plan)
        _save_tokenizer(order, model)
        found = _proved(part, plan) if prove else None
        record = {
            "base": order.base_name,
            "merged_on": "dequantized" if order.dequantized else "original",
            "reason": reason,
            "adapters": dict(zip(order.adapters, order.weights or [1.0] * len(order.adapters), strict=True)),
            "combination": order.combination if len(order.adapters) > 1 else None,
            "files": shards,
            "total_size": size,
            "proof": found,
            "verify": plan.get("measured"),
            "seconds": round(time.monotonic() - started, 1),
            "versions": runs.packages(),
            "identity": identity,
        }
        runs.write(model / MANIFEST, json.dumps(record, indent=2) + "\n")
        model.rename(output)
        shutil.rmtree(part)
    say(_closing(record, output))
    return record


# --- beside, then renamed ---------------------------------------------------------------------------------------------


def is_of(folder: Path, identity: str) -> bool:
    """Whether a folder holds the complete model of the merge with this identity."""
    try:
        return bool(json.loads((folder / MANIFEST).read_bytes())["identity"] == identity)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _finished(output: Path, identity: str) -> bool:
    """Whether the same merge is complete already. Raises UserError when the folder holds anything else."""
    if beside.is_free(output):
        return False
    if not is_of(output, identity):
        raise UserError(f"{output}: is not empty; give another --output, or remove it")
    # of a merge that was killed after its last step
    shutil.rmtree(output.with_name(f"{output.name}.part"), ignore_errors=True)
    say(f"{output}: is complete already")
    return True


def _begun(asked: Asked, part: Path, identity: str) -> dict[str, Any]:
    """The plan of this merge: one that was interrupted, or a new one."""
    try:
        plan: dict[str, Any] = json.loads((part / PLAN).read_bytes())
        if plan["identity"] == identity:
            return plan
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(part / "model", ignore_errors=True)
    (part / "model").mkdir()
    plan = {
        "identity": identity,
        "order": asked.order.dump(),
        "shards": {},
        "run": asked.run,
        "labels": asked.labels,
        "data": asked.data,
    }
    if asked.data and not asked.run:
        if asked.task is None:
            raise UserError(
                f"--verify: rows are read for classifiers and language models, not for {asked.order.kind}; leave it out"
            )
        recipe: dict[str, Any] = {
            "task": asked.task,
            "model": {"name_or_path": asked.order.base},
            "data": {"train": {"path": asked.data}},
        }
        (part / RECIPE).write_text(yaml.safe_dump(recipe), encoding="utf-8")
    order = asked.order
    proof.save_rows(part / INPUTS, asked.run, order.tokenizer, order.base_name, trust_remote_code=order.trust_remote_code)
    _keep(part, plan)
    return plan


def _keep(part: Path, plan: Mapping[str, Any]) -> None:
    runs.write(part / PLAN, json.dumps(plan))


# --- which base -------------------------------------------------------------------------------------------------------


def _choose(asked: Asked, part: Path, plan: dict[str, Any]) -> tuple[Order, str | None]:
    """The order with its base decided, and why; measured once, before anything is written."""
    order = asked.order
    undecided = bool(order.quantization) and not order.packed and asked.choice is None
    if (undecided or asked.data) and "measured" not in plan:
        plan["measured"] = _in_fresh_process("measure", part)
        _keep(part, plan)
    measured = plan.get("measured") or {}
    dequantized, reason = order.packed, None
    if order.packed:
        reason = "the base holds quantised weights only"
    elif asked.choice:
        dequantized, reason = asked.choice == "dequantized", "asked for"
    elif undecided and "reason" in measured:
        dequantized, reason = True, f"what the adapter was trained against; not measured: {measured['reason']}"
    elif undecided:
        away = {name: measured[f"merged_on_{name}"]["mean_difference"] for name in ("dequantized", "original")}
        dequantized = away["dequantized"] <= away["original"]
        told = ", ".join(f"{name} {value:.3g}" for name, value in away.items())
        reason = f"nearer to what was trained: mean difference of logits {told} over {measured['rows']} rows"
    if reason:
        say(f"merging into the {'dequantized' if dequantized else 'original'} base: {reason}")
    order = replace(order, dequantized=dequantized)
    plan["order"] = order.dump()
    _keep(part, plan)
    return order, reason


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(order: Order, asked: Asked, part: Path, plan: dict[str, Any]) -> tuple[dict[str, str], int]:
    """Write what is not written yet of the shards, then the index and the configuration; returns their sha256 and bytes."""
    from scalepeft import shards
    from scalepeft.folding import Fold

    model, fold = part / "model", Fold(order)
    planned = shards.planned(fold.slots(), asked.shard_size)
    size = sum(slot.bytes for shard in planned for slot in shard)
    kept = _kept(model, plan["shards"])
    beside.check_space(
        part, sum(s.bytes for n, shard in enumerate(planned) if shards.shard_name(n, len(planned)) not in kept for s in shard)
    )
    plan["shards"] = kept
    for number, shard in enumerate(planned):
        name = shards.shard_name(number, len(planned))
        if name in kept:
            continue
        plan["shards"][name] = shards.write(model / name, shard, fold.parts)
        _keep(part, plan)
        say(f"{name}: {len(shard):,} tensors, {sum(slot.bytes for slot in shard) / 1e9:.2f} GB")
    if len(planned) > 1:
        runs.write(model / shards.INDEX, json.dumps(shards.index(planned), indent=2) + "\n")
    fold.config.save_pretrained(model)
    _save_generation(order, fold.base.model, model)
    return plan["shards"], size


def _kept(model: Path, recorded: Mapping[str, str]) -> dict[str, str]:
    """The shards of an interrupted merge that are whole."""
    from scalepeft.fetch import file_sha256

    found = {}
    for name, digest in recorded.items():
        if (model / name).is_file():
            with (model / name).open("rb") as stream:
                if file_sha256(stream) == digest:
                    found[name] = digest
    return found


def _in_memory(order: Order, asked: Asked, model: Path) -> tuple[dict[str, str], int]:
    """peft's own way: the model is loaded, merged and saved whole."""
    import torch

    from scalepeft.base import dtype
    from scalepeft.fetch import file_sha256

    if not proof.fits(order):
        raise UserError(f"{order.base_name}: does not fit into the memory that is free; leave out --in-memory")
    try:
        merged = proof.reference(order).merge_and_unload()
    except (ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise UserError(f"{order.adapters[0]}: peft does not merge it: {one_line(error)}; load it with peft") from error
    wanted = order.output_dtype or order.dtype or "float32"
    merged = merged.to(dtype(wanted))
    merged.config.dtype = getattr(torch, wanted)
    merged.save_pretrained(model, max_shard_size=asked.shard_size)
    files = sorted(model.glob("*.safetensors"))
    size = sum(p.numel() * p.element_size() for p in merged.parameters())
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[file.name] = file_sha256(stream)
    return digests, size


def _save_generation(order: Order, model: Any, folder: Path) -> None:
    """The generation config: the base's own file, or what its configuration says."""
    given = Path(order.base) / "generation_config.json"
    if given.is_file():
        shutil.copyfile(given, folder / given.name)
    elif model.can_generate() and getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def _save_tokenizer(order: Order, folder: Path) -> None:
    """The tokenizer with its chat template, as it stands beside the adapter or the base."""
    if order.tokenizer is None:
        return
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(order.tokenizer, trust_remote_code=order.trust_remote_code).save_pretrained(folder)


# --- proof ------------------------------------------------------------------------------------------------------------


def _proved(part: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The proof's findings; raises RunFailed when the model does not answer as base and adapter do."""
    found = _in_fresh_process("prove", part)
    if not found.pop("passed"):
        what = f"largest difference {found['max_difference']:.3g}, allowed {found['bound']:.3g}"
        if differing := found.get("differing"):
            what = f"{len(differing)} tensors are not the base's: {differing[0]}, ..."
        raise RunFailed(
            f"{plan['order']['adapters'][0]}: the merged model does not answer as base and adapter do ({what}); nothing is kept"
        )
    return found


def _in_fresh_process(what: str, part: Path) -> dict[str, Any]:
    return beside.in_fresh_process("scalepeft.proof", what, str(part))


def _closing(record: Mapping[str, Any], output: Path) -> str:
    proved, size = record["proof"], record["total_size"]
    files = len(record["files"])
    lines = [("merged", f"{output}: {size / 1e9:.2f} GB in {files} file{'s' if files > 1 else ''}, {record['seconds']:.0f} s")]
    if proved:
        of = f"{proved['rows']} rows' logits" if proved["method"] == "logits" else f"{proved['layers']} layers' answers"
        lines.append(
            (
                "proved",
                f"in a fresh process: largest difference of {of} {proved['max_difference']:.2g}, allowed {proved['bound']:.2g}",
            )
        )
    for name, found in (record["verify"] or {}).items():
        if isinstance(found, dict):
            loss = f"loss {found['loss']:.4f}" if found.get("loss") is not None else ""
            away = f"logits differ by {found['mean_difference']:.3g} on average" if "mean_difference" in found else ""
            lines.append((name.replace("_", " "), ", ".join(part for part in (loss, away) if part) or "the reference"))
    return table(lines, right=False)


if __name__ == "__main__":
    sys.exit(program(main))
