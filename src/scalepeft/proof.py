"""Proof of a merge, in a process of its own: what was written answers as base and adapter do, and which base comes nearest."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft.console import quiet_upstream
from scalepeft.errors import RunFailed, UserError, one_line, program

if TYPE_CHECKING:
    import torch

    from scalepeft.base import Order

PLAN = "merge.part.json"
INPUTS = "rows.part.safetensors"
RECIPE = "recipe.part.yaml"

BOUNDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2, "q8_0": 1e-1}
"""Largest difference of logits by the dtype of the merged weights, relative to the largest logit (at least 1). Both models
compute in float32, so that it is what the rounding of the merged weights does, and in float32 another order of sums."""

LAST_POSITIONS = 8
"""Of each row of a language model: the logits of all positions of a large vocabulary would outweigh the model."""

LAYER_ROWS = 4
"""Random inputs by which the layers are compared one by one."""

SENTENCES = (
    "The ship left the harbour at dawn, and nobody on the quay knew where it was bound.",
    "Water boils at a lower temperature in the mountains than at the sea.",
    "What I liked least about the film was its ending; the music, though, was wonderful.",
    "She counted the coins twice: eleven, twelve, thirteen.",
)
"""The rows of the proof where neither a run nor --verify brings any."""


def main(arguments: Sequence[str]) -> int:
    """`python -m scalepeft.proof prove|measure FOLDER`: prints what was found as JSON, on one line."""
    if len(arguments) != 2 or arguments[0] not in ("prove", "measure"):
        raise UserError("usage: python -m scalepeft.proof prove|measure FOLDER")
    quiet_upstream()
    folder = Path(arguments[1])
    plan = json.loads((folder / PLAN).read_bytes())
    found = measure(folder, plan) if arguments[0] == "measure" else prove(folder, plan)
    print(f"\n{json.dumps(found)}", flush=True)
    return 0


def prove(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the merged model with base and adapter: logits of real rows, or, where these do not fit, layer by layer."""
    from scalepeft.base import Order

    order = Order(**plan["order"])
    if fits(order):
        return _compare_logits(order, folder / "model", folder / INPUTS)
    return _compare_layers(order, folder / "model")


def fits(order: Order) -> bool:
    """Whether a model computes in float32 in the memory that is free, with a fifth to spare for what its layers give."""
    from scalepeft.base import dtype

    # the base as it is loaded stands beside its copy in float32, layer for layer less of the one and more of the other
    return fits_as(Path(order.base), held=dtype(order.dtype).itemsize if order.dtype else 4)


def fits_as(folder: Path, *, held: int = 4) -> bool:
    """The same for the model in a folder, of which a value takes `held` bytes while it is loaded."""
    import psutil

    from scalepeft.shards import Checkpoint

    checkpoint = Checkpoint(folder)
    values = sum(checkpoint.get(name).numel() for name in checkpoint.names)
    return bool(values * max(4, held) * 1.2 <= psutil.virtual_memory().available)


def save_rows(file: Path, run: str | None, tokenizer: str | None, name: str, *, trust_remote_code: bool = False) -> None:
    """Write the rows of a proof: those by which a run was verified, or a few sentences as a model's tokenizer reads them.

    Raises UserError when there is neither; `name` is the model's.
    """
    from safetensors.torch import load_file, save_file

    from scalepeft.run import VERIFICATION

    kept = Path(run) / VERIFICATION if run else None
    if kept and kept.is_file():
        rows = {key: tensor for key, tensor in load_file(kept).items() if key != "logits"}
    elif tokenizer:
        from transformers import AutoTokenizer

        reader = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        reader.pad_token = reader.pad_token or reader.eos_token
        reader.padding_side = "right"
        rows = dict(reader(list(SENTENCES), return_tensors="pt", padding=bool(reader.pad_token)))
    else:
        raise UserError(f"{name}: neither it nor the adapter has a tokenizer to read the rows of the proof with")
    save_file({key: tensor.contiguous() for key, tensor in rows.items()}, file)


# --- the models -------------------------------------------------------------------------------------------------------


def reference(order: Order) -> Any:
    """Base and adapter, unmerged, in float32: the base as from_pretrained loads it, rounded and quantised as in training."""
    from scalepeft.folding import attached

    return _ready(attached(_in_float32(_loaded(order, quantised=order.dequantized), order), order))


def as_trained(order: Order) -> Any:
    """Base and adapter as they were trained: on the quantised weights where there are such."""
    from scalepeft.folding import attached

    model = _loaded(order, quantised=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its kernel computes in bf16, whatever was asked for
            module.support_avx512bf16_for_cpu = False
    if order.vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(order.vocabulary, mean_resizing=False)
    return _ready(attached(model, order))


def merged_in_memory(order: Order) -> Any:
    """What a merge would write, in float32: merged by peft and rounded once to the dtype that is written."""
    import torch

    from scalepeft.base import dtype

    model = reference(order).merge_and_unload()
    for parameter in model.parameters():
        wanted = order.output_dtype or order.dtype
        kept = dtype(wanted) if wanted else parameter.dtype
        parameter.data = parameter.data.to(kept).to(torch.float32)
    return model


def merged(order: Order, folder: Path) -> Any:
    """The merged model from its folder, in float32. Raises RunFailed when it does not load as it is."""
    return opened(order.kind, folder, trust_remote_code=order.trust_remote_code)


def opened(kind: str, folder: Path, **given: Any) -> Any:
    """A whole model from its folder, in float32, by a class of transformers. Raises RunFailed when it does not load whole."""
    import torch
    import transformers

    try:
        model, loading = getattr(transformers, kind).from_pretrained(
            str(folder), dtype=torch.float32, output_loading_info=True, **given
        )
    except Exception as error:
        raise RunFailed(f"{folder}: cannot be loaded: {type(error).__name__}: {one_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if loading[what]:
            raise RunFailed(f"{folder}: does not load whole: {what.replace('_', ' ')} {sorted(map(str, loading[what]))[:3]}")
    return _ready(model)


def _loaded(order: Order, *, quantised: bool) -> Any:
    import transformers
    from transformers import BitsAndBytesConfig

    from scalepeft.base import configuration

    given: dict[str, Any] = {"dtype": order.dtype or "auto", "trust_remote_code": order.trust_remote_code}
    if not order.packed:
        given["config"] = configuration(order)
        if quantised and order.quantization:
            given["quantization_config"] = BitsAndBytesConfig.from_dict(order.quantization)
    return getattr(transformers, order.kind).from_pretrained(order.base, **given)


def _in_float32(model: Any, order: Order) -> Any:
    import torch

    if getattr(model, "is_quantized", False):
        model = model.dequantize()
    if order.vocabulary > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(order.vocabulary, mean_resizing=False)
    model.config.dtype = torch.float32
    return model.float()


def _ready(model: Any) -> Any:
    return model.eval().requires_grad_(False)  # torch's own signature


# --- logits -----------------------------------------------------------------------------------------------------------


def _compare_logits(order: Order, folder: Path, rows: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    inputs = load_file(rows)
    expected = list(answers(reference(order), inputs))
    return compared(expected, list(answers(merged(order, folder), inputs)), _dtype_of(folder))


def compared(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor], *kinds: str) -> dict[str, Any]:
    """The largest difference of rows' logits, against the bound of the dtypes that the weights went through."""
    difference = max(
        (a - b).abs().max().item() if a.shape == b.shape else float("inf") for a, b in zip(expected, found, strict=True)
    )
    largest = max(logits.abs().max().item() for logits in expected)
    kind = max(kinds, key=lambda kind: BOUNDS.get(kind, BOUNDS["float32"]))
    bound = BOUNDS.get(kind, BOUNDS["float32"]) * max(1.0, largest)
    if not all(logits.isfinite().all() for logits in found):
        difference = float("inf")
    return {
        "method": "logits",
        "rows": len(expected),
        "max_difference": difference,
        "bound": bound,
        "dtype": kind,
        "passed": difference <= bound,
    }


def answers(model: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The logits of each row alone: padding costs time, and a row's answer is its own."""
    import torch

    rows = len(next(iter(inputs.values())))
    encoder_decoder = model.config.is_encoder_decoder
    for row in range(rows):
        given = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
        if "attention_mask" in given:
            kept = given["attention_mask"][0].bool()
            given = {name: tensor[:, kept] for name, tensor in given.items()}
        if encoder_decoder:
            given["decoder_input_ids"] = given["input_ids"][:, :LAST_POSITIONS]
        with torch.no_grad():
            out = model(**given)
        logits = out.logits if "logits" in out else out[0]
        yield (logits[:, -LAST_POSITIONS:] if logits.dim() == 3 else logits).float().clone()


def _dtype_of(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_bytes())["dtype"])


# --- layer by layer ---------------------------------------------------------------------------------------------------


def _compare_layers(order: Order, folder: Path) -> dict[str, Any]:
    """Each changed layer's answers to random inputs, unmerged, against those by the written tensors; the others bit by bit.

    The unmerged layer computes base and adapter apart from each other, by code that a merge has no part in.
    """
    import torch

    from scalepeft.folding import Fold
    from scalepeft.shards import Checkpoint

    fold, written = Fold(order), Checkpoint(folder)
    slots = [slot for group in fold.slots() for slot in group]
    if {slot.name for slot in slots} != set(written.names):
        raise RunFailed(f"{folder}: does not hold the tensors of the model")
    torch.manual_seed(0)
    worst, differing = 0.0, []
    for unit in fold.units:
        own = {slot.key.removeprefix(f"{unit}."): written.get(slot.name) for slot in slots if slot.key.startswith(f"{unit}.")}
        if own:
            worst = max(worst, fold.difference(unit, own, LAYER_ROWS))
    for slot in slots:
        if not any(slot.key.startswith(f"{unit}.") for unit in fold.units):
            tensor = fold.tensor(slot)
            if not torch.equal(
                written.get(slot.name).reshape(-1).view(torch.uint8), tensor.contiguous().reshape(-1).view(torch.uint8)
            ):
                differing.append(slot.name)
    kind = _dtype_of(folder)
    bound = BOUNDS.get(kind, BOUNDS["float32"])
    return {
        "method": "tensors",
        "reason": "the model does not fit into memory",
        "tensors": len(slots),
        "layers": len(fold.units),
        "differing": differing,
        "max_difference": worst,
        "bound": bound,
        "dtype": kind,
        "passed": worst <= bound and not differing,
    }


# --- which base -------------------------------------------------------------------------------------------------------


def measure(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Loss and logits over rows: of the adapter on its base, and of it merged into each base that there is to choose."""
    from dataclasses import replace

    from safetensors.torch import load_file

    from scalepeft.base import Order

    order = Order(**plan["order"])
    if not fits(order):
        return {"reason": "the model does not fit into memory"}
    rows = _Rows(plan, folder) if plan.get("data") else None
    inputs = rows.inputs() if rows else load_file(folder / INPUTS)
    model = as_trained(order)
    expected = list(answers(model, inputs))
    found: dict[str, Any] = {"rows": len(expected), "data": plan.get("data"), "adapter_on_base": {}}
    if rows:
        found["loss_rows"] = len(rows.prepared.rows)
        found["adapter_on_base"] = {"loss": rows.loss(model)}
    choices = {"dequantized": True, "original": False}
    if not order.quantization:
        choices.pop("dequantized")
    if order.packed:
        choices.pop("original")
    for name, dequantized in choices.items():
        del model
        model = merged_in_memory(replace(order, dequantized=dequantized))
        differences = [(a - b).abs() for a, b in zip(answers(model, inputs), expected, strict=True)]
        found[f"merged_on_{name}"] = {
            "max_difference": max(d.max().item() for d in differences),
            "mean_difference": sum(d.mean().item() for d in differences) / len(differences),
            **({"loss": rows.loss(model)} if rows else {}),
        }
    return found


class _Rows:
    """Held-out rows of a file, as the recipe's task reads them."""

    def __init__(self, plan: Mapping[str, Any], folder: Path) -> None:
        from transformers import AutoTokenizer

        from scalepeft import data, kinds, model
        from scalepeft import recipe as recipes
        from scalepeft.run import Run

        self.run = Run(Path(plan.get("run") or folder))
        self.recipe = self.run.recipe() if plan.get("run") else recipes.load(folder / RECIPE)
        self.labels = plan["labels"]
        tokenizer = AutoTokenizer.from_pretrained(plan["order"]["tokenizer"])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.task = kinds.task(self.recipe, tokenizer, self.labels)
        limit = model.longest_input(self.recipe, tokenizer)
        self.prepared = data.prepare_file(self.recipe, tokenizer, plan["data"], limit=limit, label_names=self.labels)
        self.before: list[Any] = []
        """Of preferences: the reference's log-probabilities, batch by batch."""

    def inputs(self) -> dict[str, torch.Tensor]:
        """The first rows, as inputs of the model."""
        from scalepeft.trainer import Rows

        rows = Rows(self.prepared.rows)
        return self.task.probe(rows.__getitems__(list(range(min(32, len(rows))))))

    def loss(self, model: Any) -> float:
        """The task's loss. The first model asked for is the trained one: preferences are measured from its own reference."""
        import numpy as np
        import torch

        from scalepeft.language import CausalLM, Preference

        task, measured = self.task, []
        if isinstance(task, Preference) and not self.before:
            task.ready(model, self.run)
            with torch.no_grad():
                self.before = [task.reference_log_probs(batch) for batch in self._batches()]
        elif isinstance(task, CausalLM):
            CausalLM.ready(task, model, self.run)
        with torch.no_grad():
            for number, batch in enumerate(self._batches()):
                if isinstance(task, Preference):
                    found = task.rewarded(model, batch, self.before[number])
                else:
                    found = task.measure(model, batch)
                measured.append(found.float().numpy())
        references = np.empty(0) if self.recipe.generative else self.prepared.labels
        return task.metrics(np.concatenate(measured), references)["loss"]

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        from scalepeft.trainer import Rows

        rows = Rows(self.prepared.rows)
        for start in range(0, len(rows), 8):
            yield self.task.collate(rows.__getitems__(list(range(start, min(start + 8, len(rows))))))


if __name__ == "__main__":
    sys.exit(program(main))
