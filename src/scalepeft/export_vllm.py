"""A whole model for vLLM, SGLang and their like: a folder that their loaders, old and new, read without a word more."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import beside
from scalepeft.errors import RunFailed, UserError

if TYPE_CHECKING:
    import torch

    from scalepeft.export_source import Source

KINDS = ("ForCausalLM", "ForSequenceClassification")
"""How the names of the classes end that such servers serve."""
_WRITTEN_BY_US = ("merge.json", "export.json")
_TOKENIZER = (".json", ".txt", ".model", ".jinja", ".spm", ".tiktoken")
"""Endings of the files of a tokenizer and of configurations. No pickles, no code."""
_SAMPLE = [{"role": "user", "content": "Name three fruits."}]


def check(source: Source, options: argparse.Namespace) -> None:
    """A language model or a classifier, with its tokenizer."""
    del options
    if not source.kind.endswith(KINDS):
        raise UserError(f"{source.path}: --format vllm is for language models and classifiers, not for {source.kind}")
    if source.tokenizer is None:
        raise UserError(f"{source.path}: has no tokenizer, which a server needs; save it beside the model")


def write(source: Source, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The weights as they are, and configuration and tokenizer so that transformers 4 understands them, too."""
    import transformers

    from scalepeft.shards import Checkpoint

    del options
    model, tokenizer = source.folders
    _copy_weights(model, folder)
    for file in model.iterdir():
        if file.suffix in _TOKENIZER and not file.name.startswith("adapter_") and file.name not in _WRITTEN_BY_US:
            shutil.copyfile(file, folder / file.name)
    kind = source.kind
    if kind.startswith("Auto"):
        kind = source.config.architectures[0]
    assert hasattr(transformers, kind)  # noqa: S101  # from a configuration that made the model
    given = json.loads((folder / "config.json").read_bytes())
    config = given | {"architectures": [kind], "dtype": Checkpoint(model).widest()}
    (folder / "config.json").write_text(json.dumps(for_transformers_4(config), indent=2) + "\n", encoding="utf-8")
    make_tokenizer_plain(folder)
    return {"kind": kind, "dtypes": [config["dtype"]], **reading(tokenizer)}


def _copy_weights(model: Path, folder: Path) -> None:
    """The safetensors and their index; linked where they were merged a moment ago: a user's own may be written over."""
    files = [p for p in model.iterdir() if p.name.endswith((".safetensors", ".safetensors.index.json"))]
    ours = model.parent == folder.parent
    if not ours:
        beside.check_space(folder, sum(file.stat().st_size for file in files))
    for file in files:
        (os.link if ours else shutil.copyfile)(file, folder / file.name)


def for_transformers_4(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration with the keys of before transformers 5, too.

    vLLM with transformers 4 knows no rope_parameters and computes with the base 10,000, in silence
    (vllm-project/vllm#42624); `dtype` was `torch_dtype` until 4.56.
    """
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        config.setdefault("rope_scaling", scaling if scaling.get("rope_type", "default") != "default" else None)
    return config | {"torch_dtype": config["dtype"]}


def make_tokenizer_plain(folder: Path) -> None:
    """Name what transformers 5 alone knows as transformers 4 does, which 5 reads just as well."""
    file = folder / "tokenizer_config.json"
    given = json.loads(file.read_bytes())
    if given.get("tokenizer_class") == "TokenizersBackend":
        given["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(given.get("extra_special_tokens"), list):  # 4 takes it for a mapping
        given["additional_special_tokens"] = given.pop("extra_special_tokens")
    file.write_text(json.dumps(given, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def reading(tokenizer: Path) -> dict[str, Any]:
    """What a tokenizer makes of some texts and of a conversation, for the proof to compare."""
    from transformers import AutoTokenizer

    from scalepeft.proof import SENTENCES

    reader = AutoTokenizer.from_pretrained(tokenizer)
    template = bool(reader.chat_template)
    return {
        "texts": list(SENTENCES),
        "tokens": reader(list(SENTENCES))["input_ids"],
        "chat": reader.apply_chat_template(_SAMPLE, tokenize=False, add_generation_prompt=True) if template else None,
    }


# --- in the proof's process -------------------------------------------------------------------------------------------


def inspect(folder: Path, plan: Mapping[str, Any]) -> None:
    """What servers ask of a folder before they load a weight."""
    from scalepeft.shards import Checkpoint

    config = json.loads((folder / "config.json").read_bytes())
    checkpoint = Checkpoint(folder)
    tied, head = bool(config.get("tie_word_embeddings", True)), any(n.endswith("lm_head.weight") for n in checkpoint.names)
    wrong = {
        f"its configuration names {config.get('architectures')}": config.get("architectures") != [plan["kind"]],
        "its configuration is of quantised weights": "quantization_config" in config,
        "there is an adapter in it": bool(list(folder.glob("adapter_*"))),
        "it holds pickles": any(p.suffix in (".bin", ".pt", ".pth") for p in folder.iterdir()),
        "it has no head of its own": plan["kind"].endswith("ForCausalLM") and not tied and not head,
        "its weights are of another dtype than it says": checkpoint.widest() != config["dtype"],
    }
    if found := [what for what, is_so in wrong.items() if is_so]:
        raise RunFailed(f"{folder}: {'; '.join(found)}")
    inspect_tokenizer(folder, plan)


def inspect_tokenizer(folder: Path, plan: Mapping[str, Any]) -> None:
    """The tokenizer reads texts and conversations as the model's own."""
    found = reading(folder)
    if changed := [key for key in ("tokens", "chat") if found[key] != plan[key]]:
        raise RunFailed(f"{folder}: its tokenizer reads otherwise than the model's: {', '.join(changed)}")


def answers(folder: Path, plan: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """By plain transformers."""
    from scalepeft import proof

    return proof.answers(proof.opened(plan["kind"], folder), inputs)


def same_tensors(folder: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors are the model's, bit by bit; that these are right was proved when it was merged."""
    import torch

    from scalepeft.shards import Checkpoint

    model, written = Checkpoint(Path(plan["model"])), Checkpoint(folder)
    if set(model.names) != set(written.names):
        raise RunFailed(f"{folder}: does not hold the tensors of the model")
    differing = [
        name
        for name in model.names
        if not torch.equal(*(of.get(name).contiguous().reshape(-1).view(torch.uint8) for of in (model, written)))
    ]
    return {
        "method": "tensors",
        "reason": "the model does not fit into memory",
        "tensors": len(model.names),
        "max_difference": float(len(differing)),
        "bound": 0.0,
        "passed": not differing,
    }


def closing(output: Path, record: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """The line that serves it."""
    del record
    return [("serve", f"vllm serve {output}"), ("", f"python -m sglang.launch_server --model-path {output}")]
