"""What a merge is asked for: a run, or an adapter folder with its base, becomes an order that says everything."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from scalepeft import run as runs
from scalepeft.errors import UserError, did_you_mean, one_line
from scalepeft.run import RECORD, Run

if TYPE_CHECKING:
    from scalepeft.base import Order

_KINDS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
"""The class that makes the model of a task of peft's."""
_TASKS = {"SEQ_CLS": "sequence-classification", "CAUSAL_LM": "causal-lm"}
_TASK_KINDS = {"sequence-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "preference": "CAUSAL_LM"}

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A merge as it is asked for."""

    order: Order
    """What is merged into what."""
    choice: str | None
    """The base that was asked for by name."""
    run: str | None = None
    """The run directory, where one is merged."""
    labels: list[str] = field(default_factory=list)
    """The names of the labels."""
    data: str | None = None
    """A file of held-out rows."""
    task: str | None = None
    """The task, in a recipe's words."""
    shard_size: int = 5 * 10**9
    """The largest shard in bytes."""
    in_memory: bool = False
    """Let peft merge the loaded model."""

    def identity(self) -> str:
        """A digest of what an interrupted merge must have in common with the one that goes on."""
        from scalepeft.shards import Checkpoint

        files = [
            [str(f), f.stat().st_size, f.stat().st_mtime_ns]
            for a in self.order.adapters
            for f in sorted(Path(a).glob("adapter_*"))
        ]
        found = {
            "order": replace(self.order, dequantized=False).dump(),
            "choice": self.choice,
            "data": self.data,
            "shard_size": self.shard_size,
            "in_memory": self.in_memory,
            "base": Checkpoint(Path(self.order.base)).fingerprint(),
            "adapters": files,
            "versions": {k: v for k, v in runs.packages().items() if k in ("scalepeft", "torch", "transformers", "peft")},
        }
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def asked(options: argparse.Namespace) -> Asked:
    """The command line as an Asked; raises UserError with what does not go together."""
    weights = options.weights or [1.0] * len(options.adapters)
    if len(weights) != len(options.adapters):
        raise UserError(f"command line: {len(weights)} --weights for {len(options.adapters)} adapters; give one each")
    if options.verify and not options.verify.is_file():
        raise UserError(f"{options.verify}: does not exist; --verify names a file of held-out rows")
    paths = [Path(a) for a in options.adapters]
    if missing := [p for p in paths if not p.is_dir()]:
        near = did_you_mean(str(missing[0]), map(str, missing[0].parent.glob("*"))) if missing[0].parent.is_dir() else ""
        raise UserError(f"{missing[0]}: there is no such run or adapter folder{near}")
    is_run = (paths[0] / RECORD).is_file()
    found = _of_run(paths[0], options) if is_run else _of_adapter(paths[0], options)
    others = [str(_run(p).weights) if (p / RECORD).is_file() else str(p) for p in paths[1:]]
    order = replace(
        found.order,
        adapters=[*found.order.adapters, *others],
        weights=weights if others else [],
        combination=options.combination,
        density=options.density,
        seed=options.seed,
        output_dtype=options.dtype,
    )
    if options.base and not order.quantization:
        raise UserError(f"{paths[0]}: was not trained on quantised weights; leave out --base, or give --quantization")
    if options.base == "original" and order.packed:
        raise UserError(f"{order.base_name}: holds quantised weights only; --base original has nothing to merge into")
    data = str(options.verify) if options.verify else None
    return replace(
        found, order=order, choice=options.base, data=data, shard_size=_size(options.shard_size), in_memory=options.in_memory
    )


def _size(text: str) -> int:
    number, unit = text[:-2], text[-2:].upper()
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        raise UserError(f"command line: --shard-size {text}: it is a number with KB, MB or GB, as 5GB") from None


def _run(path: Path) -> Run:
    run = Run(path)
    recipe = run.recipe()
    if run.record["status"] != "complete":
        raise UserError(f"{path}: the run is {run.record['status']}; train it to the end first")
    if recipe.adapter is None:
        raise UserError(f"{path}: was trained whole and has no adapter to merge; {run.weights} is the model")
    return run


def _of_run(path: Path, options: argparse.Namespace) -> Asked:
    from scalepeft.base import Order
    from scalepeft.fetch import offline_if_unreachable

    if options.base_model or options.quantization:
        given = "--base-model" if options.base_model else "--quantization"
        raise UserError(f"{path}: a run knows its base and how it was quantised; leave out {given}")
    run = _run(path)
    recipe = run.recipe()
    offline_if_unreachable(recipe)
    from transformers import AutoConfig, AutoTokenizer

    from scalepeft import model

    base = _folder(recipe.model.name_or_path, recipe.model.revision, str(path))
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=recipe.model.trust_remote_code)
    packed = _packed(config, recipe.model.name_or_path)
    quantization = model.quantization(recipe, config).to_dict() if recipe.quantization else packed
    rows = getattr(config.get_text_config(), "vocab_size", 0)
    longer = len(AutoTokenizer.from_pretrained(str(run.weights))) if model.grows(recipe) else 0
    order = Order(
        base=str(base),
        base_name=recipe.model.name_or_path,
        config=str(run.path),
        kind=_KINDS[_TASK_KINDS[recipe.task]],
        adapters=[str(run.weights)],
        dtype=_dtype(recipe.model.dtype, config),
        quantization=_plain(quantization),
        packed=packed is not None,
        vocabulary=longer if longer > rows else 0,
        tokenizer=str(run.weights),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    return Asked(order=order, choice=None, run=str(run.path), labels=run.record["labels"], task=recipe.task)


def _of_adapter(path: Path, options: argparse.Namespace) -> Asked:
    from safetensors import safe_open
    from transformers import AutoConfig, BitsAndBytesConfig

    from scalepeft.base import Order

    try:
        given = json.loads((path / "adapter_config.json").read_bytes())
    except (OSError, ValueError):
        raise UserError(f"{path}: is neither a run (no {RECORD}) nor an adapter (no adapter_config.json)") from None
    name = options.base_model or given.get("base_model_name_or_path")
    if not name:
        raise UserError(f"{path}: names no base; give --base-model")
    base = _folder(name, given.get("revision") if not options.base_model else None, str(path))
    config = AutoConfig.from_pretrained(str(base), trust_remote_code=options.trust_remote_code)
    packed, quantization = _packed(config, name), None
    if options.quantization:
        if packed:
            raise UserError(f"{name}: is quantised already; leave out --quantization")
        quantization = BitsAndBytesConfig(**_pairs(options.quantization)).to_dict()
    shapes: dict[str, list[int]] = {}
    for file in path.glob("adapter_model.safetensors"):
        try:
            with safe_open(file, framework="pt") as stream:
                shapes = {key: stream.get_slice(key).get_shape() for key in stream.keys()}  # noqa: SIM118  # not a dict
        except Exception as error:
            raise UserError(f"{file}: is damaged: {one_line(error)}; save the adapter anew") from error
    kind = _KINDS.get(given.get("task_type") or "") or next(iter(config.architectures or ()), "AutoModel")
    labels = next(
        (s[0] for k, s in shapes.items() if k.endswith(_HEADS) and given.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")), None
    )
    tokenizer = next((str(f) for f in (path, base) if (f / "tokenizer_config.json").is_file()), None)
    order = Order(
        base=str(base),
        base_name=name,
        config=str(base),
        labels=labels,
        kind=kind,
        adapters=[str(path)],
        dtype=_dtype("auto", config),
        quantization=_plain(quantization or packed),
        packed=packed is not None,
        vocabulary=_vocabulary(shapes, path, config),
        tokenizer=tokenizer,
        trust_remote_code=options.trust_remote_code,
    )
    names = [str(config.id2label.get(i, i)) for i in range(labels)] if labels else []
    return Asked(order=order, choice=None, labels=names, task=_TASKS.get(given.get("task_type")))


_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""How the names of heads end whose rows are the labels."""
_EMBEDDINGS = ("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "shared.weight", "lm_head.weight")


def _vocabulary(shapes: Mapping[str, Sequence[int]], path: Path, config: Any) -> int:
    """The rows of the embedding that an adapter was trained with, where these are more than the base's."""
    rows = [shape[0] for key, shape in shapes.items() if key.endswith(_EMBEDDINGS)]
    if any("trainable_tokens" in key for key in shapes) and (path / "tokenizer_config.json").is_file():
        from transformers import AutoTokenizer

        rows.append(len(AutoTokenizer.from_pretrained(str(path))))
    longest = max(rows, default=0)
    return longest if longest > (getattr(config.get_text_config(), "vocab_size", 0) or 0) else 0


def _folder(name: str, revision: str | None, asking: str) -> Path:
    """The folder of a base's files: itself, a fetched asset's, or that of the Hub's cache."""
    from scalepeft.fetch import PREFIX, asset_path, is_local

    if name.startswith(PREFIX):
        return asset_path(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if is_local(name):
        raise UserError(f"{asking}: its base {name} does not exist; bring it back, or give another place with --base-model")
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE

    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=["*.safetensors*", "*.json", "*.txt", "*.model", "*.jinja"]
            )
        )
    except Exception as error:
        told = f"its base {name} is not in the cache ({HF_HUB_CACHE}) and cannot be fetched"
        raise UserError(f"{asking}: {told}; run it where there is a network, or give its folder with --base-model") from error


def _packed(config: Any, name: str) -> dict[str, Any] | None:
    """How the files of a base hold quantised weights; None where they hold plain ones."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    found = dict(found if isinstance(found, dict) else found.to_dict())
    if found.get("quant_method") != "bitsandbytes":
        told = f"holds weights quantised by {found.get('quant_method')}, which peft cannot merge into"
        raise UserError(f"{name}: {told}; give the unquantised model with --base-model")
    return found


def _plain(options: dict[str, Any] | None) -> dict[str, Any] | None:
    """Values that JSON keeps."""
    return json.loads(json.dumps(options, default=lambda v: str(v).removeprefix("torch."))) if options else None


def _pairs(texts: Sequence[str]) -> dict[str, Any]:
    if bad := [text for text in texts if "=" not in text]:
        raise UserError(f"command line: --quantization {bad[0]}: its form is key=value, as load_in_4bit=true")
    return {text.partition("=")[0]: yaml.safe_load(text.partition("=")[2]) for text in texts}


def _dtype(name: str, config: Any) -> str | None:
    found = getattr(config, "dtype", None) if name == "auto" else name
    return str(found).removeprefix("torch.") if found else None
