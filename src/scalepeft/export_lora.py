"""An adapter alone, for a server that holds the base: the part of LoRA that vLLM computes, and nothing that it passes over."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import export_vllm
from scalepeft.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

    from scalepeft.export_source import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank can be; 16 is its default."""

REFUSED = {
    "use_dora": "vLLM does not compute DoRA",
    "modules_to_save": "vLLM serves no modules trained whole",
    "trainable_token_indices": "vLLM serves no trained tokens",
    "lora_bias": "vLLM knows no biases of LoRA",
    "rank_pattern": "vLLM scales all layers by one rank",
    "alpha_pattern": "vLLM scales all layers by one alpha",
    "layer_replication": "vLLM replicates no layers",
    "target_parameters": "vLLM reads modules, not parameters",
    "use_qalora": "vLLM does not compute QALoRA",
    "alora_invocation_tokens": "vLLM does not compute activated LoRA by peft's file",
}
"""Options of LoraConfig that vLLM refuses, or worse, passes over (vllm/lora/peft_helper.py and lora_model.py)."""


def check(source: Source, options: argparse.Namespace) -> None:
    """LoRA on linear layers of a language model, and all the trained tensors are its matrices."""
    del options
    if source.asked is None:
        raise UserError(f"{source.path}: has no adapter; --format vllm exports a whole model")
    order, folder = source.asked.order, Path(source.asked.order.adapters[0])
    given = json.loads((folder / CONFIG).read_bytes())
    instead = "; --format vllm exports the merged model"
    if given.get("peft_type") != "LORA":
        raise UserError(f"{source.path}: vLLM serves adapters of LORA only, not of {given.get('peft_type')}{instead}")
    if order.kind != "AutoModelForCausalLM":
        raise UserError(f"{source.path}: vLLM serves adapters of language models, not of classifiers{instead}")
    if order.packed:
        raise UserError(f"{source.path}: its base {order.base_name} holds quantised weights{instead}")
    told = [f"{key}: {why}" for key, why in REFUSED.items() if given.get(key)]
    if given.get("bias", "none") != "none":
        told.append("bias: vLLM serves no trained biases")
    if given["r"] > RANKS[-1]:
        told.append(f"r: {given['r']} is more than vLLM's largest --max-lora-rank, {RANKS[-1]}")
    if not told and (foreign := [name for name in _shapes(folder) if not _layer(name)]):
        told.append(f"{foreign[0]}: vLLM serves the matrices of linear layers only")
    if told:
        raise UserError(*(f"{source.path}: {line}{instead}" for line in told))


def write(source: Source, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """peft's two files as they are, and the tokenizer with its chat template."""
    del options
    assert source.asked  # noqa: S101  # check has seen to it
    order, adapter = source.asked.order, Path(source.asked.order.adapters[0])
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(adapter / name, folder / name)
    if source.tokenizer and source.tokenizer == adapter:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(adapter).save_pretrained(folder)
        export_vllm.make_tokenizer_plain(folder)
    given = json.loads((adapter / CONFIG).read_bytes())
    return {
        "dtypes": ["float32"],
        "base": order.base,
        "base_dtype": order.dtype,
        "adapter": str(adapter),
        **(export_vllm.reading(source.tokenizer) if source.tokenizer == adapter else {}),
        "told": {
            "base": order.base_name,
            "r": given["r"],
            "trained_on": "4 or 8 bits" if order.quantization else "plain weights",
        },
    }


def _shapes(folder: Path) -> dict[str, list[int]]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as stream:
        return {key: stream.get_slice(key).get_shape() for key in stream.keys()}  # noqa: SIM118  # not a dict


def _layer(name: str) -> str | None:
    """The weight of the base that a tensor of the adapter changes; None when vLLM does not read it so."""
    owner, _, end = name.removeprefix("base_model.model.").rpartition(".lora_")
    linear = owner and name.startswith("base_model.model.") and end in ("A.weight", "B.weight")
    return f"{owner}.weight" if linear and not owner.endswith(("embed_tokens", "lm_head")) else None


# --- in the proof's process -------------------------------------------------------------------------------------------


def inspect(folder: Path, plan: Mapping[str, Any]) -> None:
    """Both matrices of every layer are there, of the rank that the configuration says, and the tokenizer reads as before."""
    shapes, rank = _shapes(folder), json.loads((folder / CONFIG).read_bytes())["r"]
    for name, shape in shapes.items():
        other = name.replace(".lora_A.", ".lora_?.").replace(".lora_B.", ".lora_A.").replace(".lora_?.", ".lora_B.")
        if other not in shapes or shape[0 if ".lora_A." in name else 1] != rank:
            raise RunFailed(f"{folder}: {name} is not one of two matrices of rank {rank}")
    if "tokens" in plan:
        export_vllm.inspect_tokenizer(folder, plan)


def answers(folder: Path, plan: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """By the base and what vLLM reads of the folder: two matrices a layer, times alpha over the rank, or over its root."""
    import torch
    from safetensors.torch import load_file

    from scalepeft import proof

    given = json.loads((folder / CONFIG).read_bytes())
    scale = given["lora_alpha"] / (math.sqrt(given["r"]) if given.get("use_rslora") else given["r"])
    model = proof.opened("AutoModelForCausalLM", Path(plan["base"]))
    for parameter in model.parameters() if plan["base_dtype"] else ():  # what training held of it
        parameter.copy_(parameter.to(getattr(torch, plan["base_dtype"])))
    matrices = load_file(folder / WEIGHTS)
    for name in (n for n in matrices if ".lora_A." in n):
        weight = model.get_parameter(_layer(name) or name)
        delta = matrices[name.replace(".lora_A.", ".lora_B.")].float() @ matrices[name].float()
        weight.add_(delta.T if given.get("fan_in_fan_out") else delta, alpha=scale)
    return proof.answers(model, inputs)


def same_tensors(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The adapter's files are those that were trained, byte by byte."""
    differing = [n for n in (CONFIG, WEIGHTS) if (folder / n).read_bytes() != (Path(plan["adapter"]) / n).read_bytes()]
    return {
        "method": "tensors",
        "reason": "the base does not fit into memory",
        "tensors": len(_shapes(folder)),
        "max_difference": float(len(differing)),
        "bound": 0.0,
        "passed": not differing,
    }


def closing(output: Path, record: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The line that serves it beside its base."""
    rank = next(rank for rank in RANKS if rank >= record["r"])
    lora = f"--enable-lora --max-lora-rank {rank} --lora-modules {output.name}={output}"
    told = [("serve", f"vllm serve {record['base']} {lora}")]
    if (output / "chat_template.jinja").is_file():
        told[0] = ("serve", f"{told[0][1]} --chat-template {output / 'chat_template.jinja'}")
    if record["trained_on"] != "plain weights":
        told.append(("", "it was trained on quantised weights, and proved on those of the files: they differ as these do"))
    return told
