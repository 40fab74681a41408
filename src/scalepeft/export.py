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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import beside, merge, proof
from scalepeft import run as runs
from scalepeft.console import quiet_upstream, say, table
from scalepeft.errors import RunFailed, UserError, did_you_mean, one_line, program
from scalepeft.proof import INPUTS
from scalepeft.run import RECORD, Run

if TYPE_CHECKING:
    from scalepeft.base import Order
    from scalepeft.orders import Asked

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
write(source, folder, options)    writes the files; returns what is recorded, `dtype` among it where weights are rounded
answers(folder, plan, inputs)     in the proof's process: the logits of each row, by the written files alone
inspect(folder, plan)             there, too: what else must hold of the files; raises RunFailed
same_tensors(folder, plan)        there, in place of the answers, where the model does not fit into memory
closing(output, record)           what is said at the end: how it is used
"""
NEEDED = {"onnx": ("onnx", "onnxruntime")}
"""The packages that a format takes from the extra `export`."""
OUTTYPES = ("auto", "f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported."""

    path: Path
    """As it was given."""
    kind: str
    """The class of transformers that makes the model."""
    config: Any
    """The model's configuration; that of an adapter's base where it is not merged yet."""
    asked: Asked | None = None
    """The merge that makes the model, where it is not whole yet."""
    run: str | None = None
    """The run directory, where it is one."""
    model: Path | None = None
    """The folder of the whole model, once there is one."""
    tokenizer: Path | None = None
    """The folder of its tokenizer."""

    @property
    def folders(self) -> tuple[Path, Path]:
        """Those of the whole model and of its tokenizer, which are there when it is written."""
        assert self.model  # noqa: S101  # made whole before
        assert self.tokenizer  # noqa: S101  # every format's check asks for it
        return self.model, self.tokenizer


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
    source = _source(path)
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


# --- what is exported -------------------------------------------------------------------------------------------------


def _source(path: Path) -> Source:
    """A run, an adapter folder or a model folder. Raises UserError for anything else."""
    if not path.is_dir():
        near = did_you_mean(str(path), map(str, path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: there is no such run or folder{near}")
    if (path / RECORD).is_file() and Run(path).recipe().adapter is None:
        run = Run(path)
        if run.record["status"] != "complete":
            raise UserError(f"{path}: the run is {run.record['status']}; train it to the end first")
        return replace(_of_folder(run.weights), path=path, run=str(path))
    if (path / RECORD).is_file() or (path / "adapter_config.json").is_file():
        asked = merge.asked_for(path)
        return Source(
            path=path,
            kind=asked.order.kind,
            config=_configuration(Path(asked.order.config), asked.order.trust_remote_code),
            asked=asked,
            run=asked.run,
            tokenizer=Path(asked.order.tokenizer) if asked.order.tokenizer else None,
        )
    if (path / "config.json").is_file():
        return _of_folder(path)
    raise UserError(f"{path}: is neither a run ({RECORD}), nor an adapter (adapter_config.json), nor a model (config.json)")


def _of_folder(folder: Path) -> Source:
    import transformers

    config = _configuration(folder)
    if packed := getattr(config, "quantization_config", None):
        how = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
        told = f"holds weights quantised by {getattr(how, 'value', how)}"
        raise UserError(f"{folder}: {told}; export the unquantised model, or merge an adapter into what they stand for")
    kind = next(iter(config.architectures or ()), "")
    if not hasattr(transformers, kind):
        raise UserError(f"{folder / 'config.json'}: architectures is {config.architectures}; it names a class of transformers")
    tokenizer = folder if (folder / "tokenizer_config.json").is_file() else None
    return Source(path=folder, kind=kind, config=config, model=folder, tokenizer=tokenizer)


def _configuration(folder: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoConfig

    if trust_remote_code:
        raise UserError(f"{folder}: needs Python code that comes with the model, which an export does not carry")
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'}: is not of a model that transformers knows: {one_line(error)}") from error


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
    source = replace(source, model=model, tokenizer=model if source.tokenizer else None, config=_configuration(model))
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
