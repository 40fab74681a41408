"""The model card of a run: what it is, where it comes from, what it measured and how it is loaded."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scalepeft import fetch, report
from scalepeft import recipe as recipes
from scalepeft.assets import ASSETS
from scalepeft.recipe import Recipe
from scalepeft.run import Run

_TASKS = {
    "sequence-classification": ("text-classification", "AutoModelForSequenceClassification", "text classification"),
    "causal-lm": ("text-generation", "AutoModelForCausalLM", "supervised fine-tuning of a language model"),
    "preference": ("text-generation", "AutoModelForCausalLM", "preference optimisation of a language model"),
}
"""By task: the Hub's word for it, the class that loads the model, and what a sentence calls it."""

_METRICS = {
    "accuracy": ("accuracy", "accuracy"),
    "f1_macro": ("f1", "macro F1"),
    "f1_weighted": ("f1", "weighted F1"),
    "matthews_correlation": ("matthews_correlation", "Matthews correlation"),
    "pearson": ("pearsonr", "Pearson correlation"),
    "spearman": ("spearmanr", "Spearman correlation"),
    "perplexity": ("perplexity", "perplexity"),
    "mean_token_accuracy": ("accuracy", "token accuracy"),
    "rewards_accuracies": ("accuracy", "reward accuracy"),
    "loss": ("loss", "loss"),
}
"""The figures of the model index: the Hub's id and the name that is shown."""

_LICENCE = ("license", "license_name", "license_link")
_MOST_LABELS = 20
"""Label names that are written into the lines that load the model."""
_FOLDERS = re.compile(r"(?<![\w.:/~-])(?:file://)?~?/(?:[^\s/'\",:;()\[\]{}<>|]+/)+")
"""The folders of an absolute path, in a text."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the base or the rows come from, as far as a stranger can follow."""

    name: str
    """The Hub id; of what is on this machine alone, its last name."""
    hub_id: str | None = None
    revision: str | None = None
    licence: Mapping[str, str] = field(default_factory=dict)
    """The Hub's metadata of it; empty when it is unknown."""

    @property
    def shown(self) -> str:
        """As Markdown."""
        return f"[{self.hub_id}](https://huggingface.co/{self.hub_id})" if self.hub_id else f"`{self.name}`"

    @property
    def licence_shown(self) -> str:
        """The licence in words."""
        named = self.licence.get("license_name") or self.licence.get("license")
        link = self.licence.get("license_link")
        return "unknown" if not named else f"[{named}]({link})" if link else named


def base_of(run: Run, named: str | None) -> Origin:
    """The base of a run; `named` is its Hub id for one that was trained from a folder."""
    model = run.recipe().model
    here = origin(model.name_or_path, "model", run.record["revisions"].get(model.name_or_path) or model.revision)
    if not named:
        return here
    there = origin(named, "model", None)
    return replace(there, licence=there.licence or here.licence)


def card(
    run: Run, repo_id: str, base: Origin, *, merge: Mapping[str, Any] | None, adapter_in: str | None, pictures: Sequence[str]
) -> str:
    """README.md of a repository that holds a run's result: its adapter at `adapter_in`, its whole model, or both.

    `merge` is what merge.json says of the merged model, where that is published.
    """
    recipe, record, merged = run.recipe(), run.record, merge is not None
    rows = {key: _data(source, record) for key, source in fetch.sources(recipe)}
    kind = _kind(recipe)
    versions = {name: version for name, version in record["versions"].items() if name != "platform"}
    made = f"{kind} merged into its base" if merged else "Full fine-tuning" if recipe.adapter is None else f"{kind} adapter"
    parts = [
        f"# {repo_id.rpartition('/')[2]}",
        f"{made}: {_TASKS[recipe.task][2]}, from {base.shown}, trained by scalepeft from the recipe below."
        + ("" if base.hub_id else " The base was a folder of the machine that trained; the Hub does not have it by this name."),
        f"## Results\n\n{_results(record)}",
        _merged(merge or {}),
        "\n\n".join(f"![{Path(name).stem}]({name})" for name in pictures),
        f"## How to load it\n\n```python\n{_loading(recipe, record, repo_id, base, merged=merged, adapter_in=adapter_in)}\n```",
        _sample(record),
        f"## Base and data\n\n{_origins(base, rows, record)}",
        f"## Recipe\n\n{_recipe(recipe)}",
        f"## Training\n\n{_training(record)}",
        f"## Versions\n\n{_table(('package', 'version'), versions.items())}",
    ]
    body = "\n\n".join(part for part in parts if part)
    return f"---\n{_metadata(run, repo_id, base, rows, merged=merged)}\n---\n\n{body}\n"


def plain_card(repo_id: str, base: Origin | None, *, adapter: bool, auto: str, told: Mapping[str, Any]) -> str:
    """README.md for a folder of weights of which no run is at hand; `told` is what lies beside the weights about them."""
    from huggingface_hub import ModelCardData

    data: dict[str, Any] = {
        "base_model": base.hub_id if base else None,
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": {auto: task for task, auto, _ in _TASKS.values()}[auto],
        "tags": ["scalepeft"],
        **(_licence_of(base) if base else {}),
    }
    lines = [f"from transformers import {auto}, AutoTokenizer", "", f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")']
    if adapter:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f'base = {auto}.from_pretrained("{base.hub_id or base.name if base else "BASE"}")')
        lines.append(f'model = PeftModel.from_pretrained(base, "{repo_id}")')
    else:
        lines.append(f'model = {auto}.from_pretrained("{repo_id}")')
    code = "\n".join(lines)
    about = f"Licence of the base: {base.licence_shown}.\n\n" if base else ""
    beside = f"\n\n```json\n{json.dumps(told, indent=2)}\n```" if told else ""
    body = f"# {repo_id.rpartition('/')[2]}\n\n{about}```python\n{code}\n```{beside}"
    return f"---\n{ModelCardData(**data).to_yaml()}\n---\n\n{body}\n"


# --- without what is this machine's own ------------------------------------------------------------------------------


def without_places(value: Any) -> Any:
    """Plain values whose absolute paths have lost their folders, which are nobody else's business."""
    if isinstance(value, str):
        return Path(value).name or value if value.startswith(("/", "~/", "file://")) else places_cut(value)
    if isinstance(value, list):
        return [without_places(item) for item in value]
    if isinstance(value, dict):
        return {without_places(key): without_places(item) for key, item in value.items()}
    return value


def places_cut(text: str) -> str:
    """A text whose absolute paths have lost their folders."""
    return _FOLDERS.sub("", text)


# --- parts -----------------------------------------------------------------------------------------------------------


def origin(path: str, kind: str, revision: str | None) -> Origin:
    """A base or a source of rows: its asset, the README.md beside it, or that of the Hub at its revision."""
    if path.startswith(fetch.PREFIX):
        licence = ASSETS[path.removeprefix(fetch.PREFIX).partition("/")[0]].licence.split(",")[0]
        return Origin(name=path, revision=revision, licence={"license": licence.lower()})
    local = Path(path).expanduser()
    if fetch.is_local(path) or local.exists():
        readme = (local if local.is_dir() else local.parent) / "README.md"
        return Origin(name=local.name, revision=revision, licence=_licence(readme))
    return Origin(name=path, hub_id=path, revision=revision, licence=_licence_on_the_hub(path, kind, revision))


def _licence_on_the_hub(path: str, kind: str, revision: str | None) -> Mapping[str, str]:
    from huggingface_hub import hf_hub_download

    pinned = revision if revision and re.fullmatch(r"[0-9a-f]{40}", revision) else None
    with contextlib.suppress(Exception):  # no README.md, no Hub, no permission: the licence is unknown
        return _licence(Path(hf_hub_download(path, "README.md", repo_type=kind, revision=pinned)))
    return {}


def _licence(readme: Path) -> Mapping[str, str]:
    """The licence that the metadata of a README.md names."""
    import yaml

    with contextlib.suppress(OSError, UnicodeDecodeError, yaml.YAMLError):
        found = re.match(r"---\r?\n(.*?)^---\s*$", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
        data = yaml.safe_load(found[1]) if found else {}
        return {key: str(data[key]) for key in _LICENCE if data.get(key)} if isinstance(data, dict) else {}
    return {}


def _data(source: recipes.Source, record: Mapping[str, Any]) -> Origin:
    return origin(source.path, "dataset", record["revisions"].get(source.path) or source.revision)


def _kind(recipe: Recipe) -> str:
    options = recipe.adapter or {}
    return str(options.get("peft_type", "Continued"))


def _metadata(run: Run, repo_id: str, base: Origin, rows: Mapping[str, Origin], *, merged: bool) -> str:
    from huggingface_hub import ModelCardData

    recipe = run.recipe()
    whole = merged or recipe.adapter is None
    kind = [_kind(recipe).lower()] if recipe.adapter is not None else []
    trainer = {"causal-lm": ["trl", "sft"], "preference": ["trl", "dpo"]}.get(recipe.task, [])
    results = _index(recipe, run.record, rows)
    data: dict[str, Any] = {
        "base_model": base.hub_id,
        "datasets": sorted({found.hub_id for key, found in rows.items() if found.hub_id and key.startswith("data.train")})
        or None,
        "eval_results": results or None,
        "library_name": "transformers" if whole else "peft",
        "metrics": sorted({result.metric_type for result in results}) or None,
        "model_name": repo_id.rpartition("/")[2] if results else None,
        "pipeline_tag": _TASKS[recipe.task][0],
        "tags": ["scalepeft", *kind, *trainer],
        **_licence_of(base),
    }
    if base.hub_id:
        data["base_model_relation"] = "finetune" if whole else "adapter"
    return ModelCardData(**data).to_yaml()


def _licence_of(base: Origin) -> dict[str, str]:
    """The base's licence as metadata of what is made from it, when it is one of the Hub's words."""
    return {k: v for k, v in base.licence.items() if k != "license" or re.fullmatch("[a-z0-9.-]+", v)}


def _index(recipe: Recipe, record: Mapping[str, Any], rows: Mapping[str, Origin]) -> list[Any]:
    """Every set's figures after training as the Hub's evaluation results."""
    from huggingface_hub import EvalResult

    found = []
    for name, measured in record["evaluation"].items():
        source = recipe.data.evaluation.get(name)
        first = next(iter(rows.values()))
        origin = rows.get(f"data.evaluation.{name}", first)  # a held-out part is of the training rows
        for key, (metric, shown) in _METRICS.items():
            value = (measured.get("after") or {}).get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                result = EvalResult(
                    task_type=_TASKS[recipe.task][0],
                    dataset_type=origin.hub_id or origin.name,
                    dataset_name=name,
                    dataset_config=source.name if source else None,
                    dataset_split=source.split if source else None,
                    dataset_revision=origin.revision if origin.hub_id else None,
                    metric_type=metric,
                    metric_name=shown,
                    metric_value=round(value, 6),
                )
                found.append(result)
    return found


def _results(record: Mapping[str, Any]) -> str:
    lines = []
    for name, found in record["evaluation"].items():
        before, after = found.get("before") or {}, found.get("after") or {}
        lines += [
            (name, key, f"{before[key]:.4f}" if key in before else "-", f"{after[key]:.4f}") for key in report.figures(after)
        ]
    if not lines:
        return "No evaluation set was named."
    proof = record.get("verification") or {}
    said = f" on {proof['rows']} rows" if "rows" in proof else ""
    return (
        f"{_table(('set', 'figure', 'before', 'after'), lines)}\n\n"
        f"A fresh process reloaded what was saved and got the trained model's answers{said}; `run.json` has all figures."
    )


def _merged(merge: Mapping[str, Any]) -> str:
    """Into what the adapter was merged, how the merge was proved, and what --verify measured."""
    if "merged_on" not in merge:
        return ""
    why = f": {merge['reason']}" if merge.get("reason") else ""
    told = [f"Merged into the {merge['merged_on']} weights of the base{why}."]
    if proof := merge.get("proof"):
        of = (
            f"the logits of {proof['rows']} rows" if proof["method"] == "logits" else f"the answers of {proof['layers']} layers"
        )
        far = f"by at most {proof['max_difference']:.2g} (allowed: {proof['bound']:.2g})"
        told.append(f"A fresh process compared what was written with base and adapter: {of} differ {far}.")
    lines = []
    for name, found in (merge.get("verify") or {}).items():
        if isinstance(found, dict):
            figures = (found.get(key) for key in ("loss", "mean_difference", "max_difference"))
            lines.append((name.replace("_", " "), *("-" if value is None else f"{value:.4g}" for value in figures)))
    if lines:
        verify = merge["verify"]
        loss = f", the loss over {verify['loss_rows']}" if "loss_rows" in verify else ""
        head = ("", "loss", "logits differ on average", "at most")
        told.append(f"Measured: the logits over {verify['rows']} rows{loss}.\n\n{_table(head, lines)}")
    return f"## The merge\n\n{' '.join(told)}"


def _loading(
    recipe: Recipe, record: Mapping[str, Any], repo_id: str, base: Origin, *, merged: bool, adapter_in: str | None
) -> str:
    """The lines that load the model; of both in one repository, those of the whole model and then those of the adapter."""
    auto = _TASKS[recipe.task][1]
    dtype = "" if recipe.model.dtype == "auto" else f', dtype="{recipe.model.dtype}"'
    lines = [f"from transformers import {auto}, AutoTokenizer", "", f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")']
    if merged or recipe.adapter is None:
        lines.append(f'model = {auto}.from_pretrained("{repo_id}"{dtype})')
    if recipe.adapter is None or adapter_in is None:
        return "\n".join(lines)
    lines.insert(0, "from peft import PeftModel")
    if merged:
        lines += ["", f"# or the adapter alone, which lies in {adapter_in}"]
    lines += [] if base.hub_id else [f"# put here where your copy of {base.name} is"]
    revision = f', revision="{base.revision}"' if base.hub_id and base.revision else ""
    lines.append(f'base = {auto}.from_pretrained("{base.hub_id or base.name}"{revision}{dtype}{_config(recipe, record)})')
    if recipe.model.added_tokens or "name_or_path" in recipe.adapter:
        lines.append("if len(tokenizer) > base.get_input_embeddings().num_embeddings:")
        lines.append("    base.resize_token_embeddings(len(tokenizer))")
    subfolder = f', subfolder="{adapter_in}"' if adapter_in else ""
    lines.append(f'model = PeftModel.from_pretrained(base, "{repo_id}"{subfolder})')
    return "\n".join(lines)


def _config(recipe: Recipe, record: Mapping[str, Any]) -> str:
    """What the base is told of the labels, and the recipe's own changes of its configuration."""
    labels = record["labels"]
    options: dict[str, Any] = {} if recipe.generative else {"num_labels": max(1, len(labels))}
    if not recipe.generative and len(labels) <= _MOST_LABELS:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {name: index for index, name in enumerate(labels)}}
    options |= recipe.model.config
    told = "".join(f", {key}={value!r}" for key, value in options.items())
    return told if recipe.generative else f"{told}, pad_token_id=tokenizer.pad_token_id"


def _sample(record: Mapping[str, Any]) -> str:
    found = record.get("sample") or {}
    named = (("prompt", "asked"), ("base", "base"), ("trained", "trained"))
    lines = [(called, f"`{_inline(found[key])}`") for key, called in named if found.get(key, "").strip()]
    return f"## A sample\n\n{_table(('', ''), lines)}" if lines else ""


def _inline(text: str) -> str:
    line = " ".join(text.replace("`", "'").split())
    return line if len(line) <= 300 else f"{line[:300]}..."


def _origins(base: Origin, rows: Mapping[str, Origin], record: Mapping[str, Any]) -> str:
    counts = record["data"].get("rows", {})
    lines = [("base", base.shown, base.revision or "-", "-", base.licence_shown)]
    for key, found in rows.items():
        name = key.removeprefix("data.").removeprefix("evaluation.")
        rows_of = counts.get(name)
        lines.append((name, found.shown, found.revision or "-", f"{rows_of:,}" if rows_of else "-", found.licence_shown))
    return (
        f"{_table(('', 'from', 'revision or sha256', 'rows', 'licence'), lines)}\n\n"
        "An unknown licence is not a permission: look at where base and data come from before you use or pass on this model."
    )


def _recipe(recipe: Recipe) -> str:
    said = "As training resolved it (`resolved.yaml`); paths are cut to their last part."
    return f"{said}\n\n```yaml\n{recipes.dump(without_places(recipe.resolved()))}```"


def _training(record: Mapping[str, Any]) -> str:
    layout, counts = record["layout"], record["parameters"]
    lines = [
        ("parameters trained", f"{counts['trainable']:,} of {counts['total']:,}"),
        ("steps", f"{record['step']:,} of {layout['global_batch_size']} rows"),
        ("processes", f"{layout['processes']} ({layout['device']})"),
        ("precision", layout["precision"]),
        ("time", f"{record['seconds']:,.0f} s"),
        ("peak memory", f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"),
        ("commit", record.get("commit") or "-"),
        ("begun", record["started"]),
    ]
    return _table(("", ""), lines)


def _table(head: Sequence[str], rows: Any) -> str:
    """Rows of cells as Markdown."""
    cells = [head, ["---"] * len(head), *([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
