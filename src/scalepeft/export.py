"""`scalepeft export`: a model as another program reads it, proved in that form before it has its name."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import beside, merge, proof
from scalepeft import run as runs
from scalepeft.console import quiet_upstream, say, table
from scalepeft.errors import RunFailed, UserError, program
from scalepeft.export_source import Source, configuration, source_of
from scalepeft.proof import INPUTS

if TYPE_CHECKING:
    from scalepeft.base import Order

PLAN = "export.part.json"
ANSWERS = "answers.part.safetensors"
MANIFEST = "export.json"

FORMATS = {
    "vllm": "scalepeft.export_vllm",
    "vllm-lora": "scalepeft.export_lora",
    "onnx": "scalepeft.export_onnx",
    "gguf": "scalepeft.export_gguf",
}
"""The module of each format. All have the same functions:

check(source, options)            refuses what the format has no place for, before anything is written
write(source, folder, options)    writes the files; returns what the proof must know: `dtypes`, all that the weights went
                                  through, and what else the three below read; `told` of it stands in export.json
answers(folder, plan, inputs)     in the proof's process: the logits of each row, by the written files alone
inspect(folder, plan)             there, too: what else must hold of the files; raises RunFailed
same_tensors(folder, plan)        there, in place of the answers, where the model does not fit into memory
closing(output, record)           what is said at the end: how it is used
"""
NEEDED = {"onnx": ("onnx", "onnxruntime")}
"""The packages that a format takes from the extra `export`."""
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


def main(arguments: Sequence[str]) -> int:
    """`scalepeft export SOURCE --format FORMAT --output DIR`."""
    options = _parser().parse_args(arguments)
    if options.format != "gguf" and (given := [f"--{n}" for n in ("outtype", "pre") if getattr(options, n) is not None]):
        raise UserError(f"command line: {given[0]} goes with --format gguf")
    quiet_upstream()
    _no_bars()
    export(options.source, options.output, options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scalepeft export",
        description="Write a model for another program, and prove it in that form: vllm, a folder for vLLM and SGLang; "
        "vllm-lora, the adapter alone for a server that has the base; onnx, an encoder's classifier for onnxruntime; "
        "gguf, a Llama-like language model for llama.cpp.",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SOURCE",
        help="a run directory or adapter folder, which is merged first, or a model folder",
    )
    parser.add_argument("--format", required=True, choices=tuple(FORMATS), help="what to write")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the folder to write; it must be new or empty"
    )
    parser.add_argument("--outtype", choices=OUTTYPES, help="of gguf: the type of the weights; the model's own when absent")
    parser.add_argument(
        "--pre", metavar="NAME", help="of gguf: llama.cpp's name for how the tokenizer splits text, where it is not recognised"
    )
    return parser


def export(path: Path, output: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the model in the format; returns what export.json holds.

    It is made beside, in DIR.part, and renamed when it is complete and proved. Raises UserError for what the format has
    no place for, RunFailed when the files do not answer as the model does.
    """
    started = time.monotonic()
    if not beside.is_free(output):
        raise UserError(f"{output}: is not empty; give another --output, or remove it")
    _check_packages(options.format)
    source = source_of(path)
    form: Any = importlib.import_module(FORMATS[options.format])
    form.check(source, options)
    with beside.writing(output, PLAN) as part:
        for left in (p for p in part.iterdir() if p.name not in (PLAN, ".lock")):  # by an export that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        runs.write(part / PLAN, "{}")
        source, order = _whole(source, part, needed=options.format != "vllm-lora")
        folder = part / "export"
        folder.mkdir()
        written = form.write(source, folder, options)
        plan = {"format": options.format, "kind": source.kind, "model": str(source.model) if source.model else None, **written}
        found = _proved(source, order, part, plan)
        record = {
            "format": options.format,
            "source": path.name,
            **written.get("told", {}),
            "proof": found,
            "files": {p.name: p.stat().st_size for p in sorted(folder.iterdir())},
            "seconds": round(time.monotonic() - started, 1),
            "versions": runs.packages(),
        }
        runs.write(folder / MANIFEST, json.dumps(record, indent=2) + "\n")
        folder.rename(output)
        shutil.rmtree(part)
    say(_closing(output, record, form.closing(output, record)))
    return record


def _no_bars() -> None:
    """Without transformers' bars of loading, which nothing but a call turns off."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _check_packages(form: str) -> None:
    if missing := [name for name in NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]:
        raise UserError(f"--format {form}: needs {' and '.join(missing)}: pip install 'scalepeft[export]'")


def _whole(source: Source, part: Path, *, needed: bool) -> tuple[Source, Order | None]:
    """The source with its model whole, and the order of the merge with its base decided."""
    asked = source.asked
    if asked is None:
        return source, None
    if not needed:
        return source, asked.order
    kept = Path(asked.run) / "merged" if asked.run else None
    if kept and merge.is_of(kept, asked.identity()):
        record, model = json.loads((kept / merge.MANIFEST).read_bytes()), kept
    else:
        # the answers of the exported files are compared with those of base and adapter: that proves the merge, too
        model = part / "merged"
        record = merge.merge(asked, model, prove=not proof.fits(asked.order))
    source = replace(source, model=model, tokenizer=model if source.tokenizer else None, config=configuration(model))
    return source, replace(asked.order, dequantized=record["merged_on"] == "dequantized")


# --- proof ------------------------------------------------------------------------------------------------------------


def _proved(source: Source, order: Order | None, part: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """What a fresh process found: whether the files answer as base and adapter do, or as the model whose form they are."""
    _expect(source, order, part, plan)
    runs.write(part / PLAN, json.dumps(plan))
    found = beside.in_fresh_process("scalepeft.export_proof", str(part))
    if not found.pop("passed"):
        what = f"largest difference {found['max_difference']:.3g}, allowed {found['bound']:.3g}"
        raise RunFailed(f"{source.path}: what was written does not answer as the model does ({what}); nothing is kept")
    return found


def _expect(source: Source, order: Order | None, part: Path, plan: dict[str, Any]) -> None:
    """Write the rows of the proof and the answers to them, of base and adapter or of the model itself."""
    from safetensors.torch import load_file, save_file

    fits = proof.fits(order) if order else proof.fits_as(source.model or source.path)
    plan["by"] = "answers" if fits else "tensors"
    if not fits:
        return
    tokenizer = str(source.tokenizer) if source.tokenizer else None
    proof.save_rows(part / INPUTS, source.run, tokenizer, str(source.path))
    model = proof.reference(order) if order else proof.opened(source.kind, source.model or source.path)
    save_file({str(n): t for n, t in enumerate(proof.answers(model, load_file(part / INPUTS)))}, part / ANSWERS)


def _closing(output: Path, record: Mapping[str, Any], more: Sequence[tuple[str, str]]) -> str:
    found, size = record["proof"], sum(record["files"].values())
    of = f"{found['rows']} rows' logits" if found["method"] == "logits" else f"{found['tensors']} tensors"
    told = f"largest difference of {of} {found['max_difference']:.2g}, allowed {found['bound']:.2g}"
    lines = [
        ("exported", f"{output}: {record['format']}, {size / 1e6:,.1f} MB, {record['seconds']:.0f} s"),
        ("proved", f"in a fresh process without peft: {told}"),
        *more,
    ]
    return table(lines, right=False)


if __name__ == "__main__":
    sys.exit(program(main))
