"""An encoder's classifier as ONNX: one graph for any number of rows of any length, run by onnxruntime."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import beside, export_vllm
from scalepeft.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

    from scalepeft.export_source import Source

MODEL, DATA = "model.onnx", "model.onnx_data"
"""The names by which optimum looks for the graph, and for weights that lie beside it."""

ENCODERS = (
    "albert",
    "bert",
    "camembert",
    "deberta",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)
"""The types of model whose classifiers have been exported and compared."""

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
OPSET = 18
LARGEST = 2**31 - 2**20
"""Bytes that one protobuf file can hold, with some room for the graph: more lies beside it."""

BATCHES = (1, 2, 3, 5, 8)
"""How many rows at a time are given to the graph in its proof."""


def check(source: Source, options: argparse.Namespace) -> None:
    """A classifier or regressor on an encoder."""
    del options
    if not source.kind.endswith("ForSequenceClassification") or source.config.model_type not in ENCODERS:
        what = f"{source.kind} of type {source.config.model_type}"
        raise UserError(f"{source.path}: --format onnx is for classifiers on {', '.join(ENCODERS)}, not for {what}")
    if source.tokenizer is None:
        raise UserError(f"{source.path}: has no tokenizer; save it beside the model")


def write(source: Source, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The graph with its weights in float32, and configuration and tokenizer as they are."""
    import onnx
    import torch
    from transformers import AutoTokenizer

    from scalepeft import proof
    from scalepeft.shards import Checkpoint

    del options
    whole, tokenizer = source.folders
    if not proof.fits_as(whole):
        raise UserError(f"{source.path}: {_TOO_LARGE}")
    model, reader = proof.opened(source.kind, whole), AutoTokenizer.from_pretrained(tokenizer)
    given = reader(["a row", "another row that is longer"], padding=True, return_tensors="pt")
    inputs = {name: given[name] for name in INPUTS if name in given}
    beside.check_space(folder, 2 * 4 * sum(p.numel() for p in model.parameters()))  # as it is traced, and as it is kept
    graph = folder.parent / "graph"
    graph.mkdir()
    with _quiet(), torch.no_grad():
        # By tracing: the newer exporter of torch 2.13 takes many times as long, and one more package, for the same graphs.
        torch.onnx.export(
            model,
            kwargs=inputs,
            f=str(graph / MODEL),
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_axes={name: {0: "batch_size", 1: "sequence_length"} for name in inputs} | {"logits": {0: "batch_size"}},
            opset_version=OPSET,
            dynamo=False,
        )
    large = sum(file.stat().st_size for file in graph.iterdir()) > LARGEST
    traced = onnx.load(graph / MODEL)
    taken = [given.name for given in traced.graph.input]  # not what the model has no use for, as types of tokens
    onnx.save_model(traced, folder / MODEL, save_as_external_data=large, location=DATA if large else None)
    if large:
        (folder / DATA).chmod(0o644)  # onnx makes it private
    config = json.loads((whole / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
    for file in tokenizer.iterdir():
        if file.name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copyfile(file, folder / file.name)
    export_vllm.make_tokenizer_plain(folder)
    return {"inputs": taken, "dtypes": ["float32", Checkpoint(whole).widest()], **export_vllm.reading(tokenizer)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's account of its steps."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# --- in the proof's process -------------------------------------------------------------------------------------------


def inspect(folder: Path, plan: Mapping[str, Any]) -> None:
    """The graph is valid, of the inputs and the output that it should have, for any number of rows of any length."""
    import onnx

    onnx.checker.check_model(folder / MODEL)
    graph = onnx.load(folder / MODEL, load_external_data=False).graph
    axes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    if any(found != ["batch_size", "sequence_length"] for found in axes.values()) or not set(INPUTS[:2]) <= set(axes):
        raise RunFailed(f"{folder / MODEL}: its inputs are {axes}")
    if [output.name for output in graph.output] != ["logits"]:
        raise RunFailed(f"{folder / MODEL}: its outputs are {[output.name for output in graph.output]}")
    export_vllm.inspect_tokenizer(folder, plan)


def answers(folder: Path, plan: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """By onnxruntime: in batches of several sizes, each as long as its longest row."""
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(folder / MODEL, providers=["CPUExecutionProvider"])
    rows, sizes, start = len(inputs["input_ids"]), itertools.cycle(BATCHES), 0
    while start < rows:
        stop = start + next(sizes)
        length = int(inputs["attention_mask"][start:stop].any(dim=0).nonzero().max()) + 1
        batch = {name: inputs[name][start:stop, :length].numpy() for name in plan["inputs"] if name in inputs}
        yield from (row[None] for row in torch.from_numpy(session.run(["logits"], batch)[0]))
        start = stop


def same_tensors(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """There is no such proof: a graph is compared by its answers, and traced in memory before."""
    del plan
    raise UserError(f"{folder}: {_TOO_LARGE}")


_TOO_LARGE = "the model does not fit into the memory that is free; export it as ONNX where it does"


def closing(output: Path, record: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """How it is opened."""
    del record
    return [("use", f"onnxruntime.InferenceSession({str(output / MODEL)!r})")]
