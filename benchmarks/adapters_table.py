"""docs/adapters.md, written from what happens when every type of peft, and every initialisation of LoRA, is trained.

    python benchmarks/adapters_table.py           write it anew (three minutes)

Each is trained for a few steps on a small encoder (a classifier) and a small decoder (a language model), saved, reloaded and
compared by the verification; what was saved from the decoder is then continued from. Models and rows are those of the tests.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adapters.md"

EVERYWHERE: dict[str, Any] = {"target_modules": "all-linear"}
PROMPT: dict[str, Any] = {"num_virtual_tokens": 4}
IN_4_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
ENCODER, DECODER = "encoder", "decoder"

OPTIONS: Mapping[str, dict[str, Any]] = {
    "ADALORA": EVERYWHERE | {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 1, "deltaT": 1},
    "ADAMSS": EVERYWHERE | {"r": 8, "num_subspaces": 2},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": EVERYWHERE | {"block_size": 16},
    "CARTRIDGE": PROMPT,
    "CPT": {"cpt_token_ids": [5, 6]},
    "FOURIERFT": EVERYWHERE | {"n_frequency": 50},
    "GRALORA": EVERYWHERE | {"r": 8},
    "IA3": {
        ENCODER: {"target_modules": ["query", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
        DECODER: {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    },
    "LN_TUNING": {
        ENCODER: {"target_modules": ["LayerNorm"]},
        DECODER: {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    },
    "MULTITASK_PROMPT_TUNING": PROMPT,
    "OFT": EVERYWHERE | {"oft_block_size": 8},
    "P_TUNING": PROMPT | {"encoder_hidden_size": 16},
    "PREFIX_TUNING": PROMPT,
    "PROMPT_TUNING": PROMPT,
    "PVERA": EVERYWHERE | {"r": 8},
    "ROAD": EVERYWHERE | {"group_size": 16},
    "SHADOW": {
        ENCODER: {"auxiliary_loss_weight": 0, "target_modules": ".*layer\\.\\d+$"},
        DECODER: {"auxiliary_loss_weight": 0},
    },
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "VBLORA": EVERYWHERE | {"num_vectors": 16, "vector_length": 16},
    "VERA": EVERYWHERE | {"r": 8},
    "WAVEFT": EVERYWHERE | {"n_frequency": 50},
    "XLORA": {"adapters": {}},
}
"""What a type is tried with, where that is more than all linear layers (and r: 4, where it has one)."""

LORA: Mapping[str, dict[str, Any]] = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "fast PiSSA": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "CorDA": {"init_lora_weights": "corda"},
    "LoRA-GA": {"init_lora_weights": "lora_ga"},
    "EVA": {"init_lora_weights": "eva"},
    "LoftQ": {"init_lora_weights": "loftq"},
    "PiSSA with DoRA, rsLoRA and patterns": {
        "init_lora_weights": "pissa",
        "use_dora": True,
        "use_rslora": True,
        "rank_pattern": {"query|q_proj": 2},
        "alpha_pattern": {"value|v_proj": 3},
    },
    "ranks and alphas by pattern": {"rank_pattern": {"query|q_proj": 2}, "alpha_pattern": {"value|v_proj": 3}},
    "some layers": {"target_modules": ["query", "q_proj"], "layers_to_transform": [1]},
    "some tokens": {"trainable_token_indices": [5, 6]},
    "whole modules": {"target_modules": ["query", "q_proj"], "modules_to_save": ["embed_tokens", "word_embeddings"]},
    "biases of LoRA": {"lora_bias": True},
    "KaSA": {"kasa_config": {}},
    "MonteCLoRA": {"monteclora_config": {}},
    "VeLoRA": {"velora_config": {"num_groups": 8}},
    "QALoRA": {"use_qalora": True},
}
"""Initialisations and variants of LORA, beside r: 4 on all linear layers."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one attempt."""

    served: bool
    """Whether it was trained and verified."""
    continued: bool = False
    """Whether the run could be continued from, and began where it had ended."""
    told: str = ""
    """Why not, without the place."""
    parameters: int = 0
    """Trained parameters."""


def main() -> int:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(*attempts(Path(folder))), encoding="utf-8")
    return 0


def attempts(folder: Path) -> tuple[dict[str, dict[str, Outcome]], dict[str, dict[str, Outcome]]]:
    """Every type, and every variant of LORA, on both models."""
    from scalepeft import upstream

    attempt = attempter(folder)
    types = {kind: attempt(kind, OPTIONS.get(kind)) for kind in upstream.peft_types()}
    return types, {name: attempt("LORA", EVERYWHERE | {"r": 4} | given) for name, given in LORA.items()}


def attempter(folder: Path) -> Callable[[str, dict[str, Any] | None], dict[str, Outcome]]:
    """A function that tries an adapter on both models; they are made here."""
    sys.path.insert(0, str(ROOT / "tests"))
    import conftest

    def make(name: str) -> Path:
        (made := folder / name).mkdir()
        return made

    makes = SimpleNamespace(mktemp=make)
    bases = {
        ENCODER: (conftest.write_toy, conftest.tiny_model.__wrapped__(conftest.tiny_tokenizer.__wrapped__(), makes)),
        DECODER: (conftest.write_chat, conftest.tiny_lm.__wrapped__(makes)),
    }
    runs = make("runs")

    def attempt(kind: str, options: dict[str, Any] | None) -> dict[str, Outcome]:
        found = {}
        for name, (write, base) in bases.items():
            adapter = {"peft_type": kind, **given(kind, options, name)}
            quantization = IN_4_BITS if adapter.get("init_lora_weights") == "loftq" else None
            training = {"max_steps": 4, "save_strategy": "no", "eval_strategy": "no"}
            settings = {"quantization": quantization, "training": training}
            found[name] = one(conftest.train_here, partial(write, runs, base, **settings), adapter)
            for run in ("run", "again"):
                shutil.rmtree(runs / run, ignore_errors=True)
        return found

    return attempt


def given(kind: str, options: dict[str, Any] | None, model: str) -> dict[str, Any]:
    """The options of an adapter for one of the models."""
    from scalepeft import upstream

    if options is None:
        ranked = "r" in upstream.fields(upstream.peft_types()[kind])
        options = EVERYWHERE | ({"r": 4} if ranked else {})
    found: dict[str, Any] = options.get(model, options)
    return found


def one(train: Callable[..., Any], write: Callable[..., Path], adapter: dict[str, Any]) -> Outcome:
    """Train, save, reload, compare, and continue where that is a language model's."""
    from scalepeft.errors import UserError

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = train(write("run", adapter=adapter))
    except UserError as error:
        (problem,) = error.problems
        return Outcome(served=False, told=re.sub(r"^.*?:\d+: (adapter(\.init_lora_weights)?:? )?", "", problem))
    record, figures = run.record, run.record["metrics"]
    if figures["before"]["loss"] == figures["after"]["loss"]:
        raise AssertionError(f"{adapter}: nothing was trained")
    parameters = record["parameters"]["trainable"]
    if not run.recipe().generative:
        return Outcome(served=True, parameters=parameters)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            again = train(write("again", adapter={"name_or_path": str(run.path)})).record["metrics"]["before"]
    except UserError as error:
        (problem,) = error.problems
        told = re.sub(r"^.*?:\d+: adapter.name_or_path: \S+ is of type \w+, which ", "it ", problem)
        return Outcome(served=True, parameters=parameters, told=told)
    if abs(again["loss"] - figures["after"]["loss"]) > 1e-4:
        raise AssertionError(f"{adapter}: goes on from another state: {figures['after']}, {again}")
    return Outcome(served=True, continued=True, parameters=parameters)


# --- the page ----------------------------------------------------------------------------------------------------------


PROSE = """\
<!-- Written by benchmarks/adapters_table.py: change what it tries, then run it. -->
# Adapters

`adapter.peft_type` is any type of peft by its own name, and beside it stand peft's own options for it. Each was trained here
for four steps on a small encoder ({encoder}) and a small decoder ({decoder}),
saved, reloaded and found to answer as the trained model did; what the decoder learned was then continued from
(`adapter.name_or_path`). What cannot be served is refused before anything is made, with the line in the last column.
Measured with {versions}.

The trained parameters are those of the two small models, the encoder's with its new head of {head}, and say only how types
compare. `r: 4` and the other sizes are for models of this size, too: peft's defaults are for larger ones.

{types}

## LORA

Its initialisations and variants, all with `r: 4` on all linear layers unless said. PiSSA, OLoRA, CorDA and LoRA-GA take a part
of the base's weights into the adapter. The saved adapter is converted: it has twice the rank, and gives the trained model on
the plain base for anybody who loads it with peft. A preference is learned against the base without the adapter, which these
change: train answers with them first, then continue from that adapter. CorDA, LoRA-GA and EVA look at the first 256 training
rows. LoftQ makes up for what a 4-bit base (`quantization.load_in_4bit: true`) has lost.

{lora}

## New tokens

`model.added_tokens` makes the embedding longer, and LORA trains and keeps the rows of the new tokens
(`trainable_token_indices`), in the embedding and in the head, whether these share their rows or not. With another type, name
both in `modules_to_save`. Continuing from such an adapter takes its tokenizer, too.
"""


def page(types: Mapping[str, Mapping[str, Outcome]], lora: Mapping[str, Mapping[str, Outcome]]) -> str:
    """The text of docs/adapters.md."""
    from importlib.metadata import version

    return PROSE.format(
        encoder="BERT, two layers of 32",
        decoder="Llama, two layers of 64, embedding and head tied",
        head="66 parameters",
        versions=", ".join(f"{name} {version(name)}" for name in ("peft", "transformers", "trl", "torch")),
        types=rows(("type", "encoder", "decoder", "continued", "parameters", "in the recipe", "note"), lines(types, OPTIONS)),
        lora=rows(("LORA with", "encoder", "decoder", "continued", "parameters", "in the recipe", "note"), lines(lora, LORA)),
    )


def lines(found: Mapping[str, Mapping[str, Outcome]], options: Mapping[str, dict[str, Any]]) -> Iterable[tuple[str, ...]]:
    """The lines of a table."""
    for name, models in found.items():
        encoder, decoder = models[ENCODER], models[DECODER]
        served = [found for found in (encoder, decoder) if found.served]
        told = {f"{model}: {found.told}" for model, found in models.items() if found.told}
        if encoder.told == decoder.told and encoder.told:
            told = {encoder.told}
        yield (
            name,
            *("yes" if yes else "no" for yes in (encoder.served, decoder.served, decoder.continued)),
            " / ".join(f"{found.parameters:,}" if found.served else "-" for found in (encoder, decoder)) if served else "-",
            recipe(name, options) if served else "",
            "; ".join(re.sub(r"/\S+/(\S+)", r"\1", text) for text in sorted(told)),
        )


def recipe(name: str, options: Mapping[str, dict[str, Any]]) -> str:
    """What to say in the recipe, in YAML's short form."""
    if options is LORA:
        return f"`{written(LORA[name])}`"
    if ENCODER in options.get(name, ()):
        return "; ".join(f"{model}: `{written(given(name, options[name], model))}`" for model in (ENCODER, DECODER))
    return f"`{written(given(name, options.get(name), DECODER))}`"


def written(given: Mapping[str, Any]) -> str:
    """Options as they stand between the braces of YAML."""
    return ", ".join(
        f"{k}: {v if isinstance(v, str) and v.isidentifier() else json.dumps(v)}" for k, v in given.items()
    ).replace('"all-linear"', "all-linear")


def rows(head: tuple[str, ...], body: Iterable[tuple[str, ...]]) -> str:
    """A Markdown table."""
    found = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in found)


if __name__ == "__main__":
    sys.exit(main())
