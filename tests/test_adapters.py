"""Every adapter of peft by its own name, LoRA's initialisations, new tokens, continuing, and bases in 4 bits."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from scalepeft import adapter_rules, console, model, upstream
from scalepeft import recipe as recipes
from scalepeft.errors import UserError
from scalepeft.run import Run

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "adapters_table.py"
LORA = {"peft_type": "LORA", "r": 4, "target_modules": "all-linear"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def script():
    """The script of the page as a module."""
    found = importlib.util.spec_from_file_location("adapters_table", SCRIPT)
    assert found is not None
    assert found.loader is not None
    module = sys.modules[found.name] = importlib.util.module_from_spec(found)  # where its dataclass looks for it
    found.loader.exec_module(module)
    return module


def told(recipe: Path, *overrides: str) -> list[str]:
    """The problems of a recipe, without their places."""
    with pytest.raises(UserError) as caught:
        recipes.load(recipe, overrides)
    return [problem.partition(": ")[2] for problem in caught.value.problems]


# --- types -----------------------------------------------------------------------------------------------------------------


def test_the_page_has_every_type_of_peft_and_every_initialisation(script):
    page = script.PAGE.read_text(encoding="utf-8")
    missing = [name for name in (*upstream.peft_types(), *script.LORA) if f"\n| {name} | " not in page]
    assert not missing, f"stale: python {SCRIPT.relative_to(SCRIPT.parents[1])}"


@pytest.mark.long
@pytest.mark.filterwarnings("default")
def test_every_type_trains_and_comes_back_or_is_refused_in_one_line(script, tmp_path):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(*script.attempts(tmp_path))


@pytest.mark.parametrize("kind", ["CPT", "MULTITASK_PROMPT_TUNING", "POLY", "XLORA"])
def test_a_type_that_no_task_serves_is_refused_by_check(chat, kind):
    (problem,) = told(chat("run", adapter={"peft_type": kind}))
    assert problem == f"adapter: {kind} {adapter_rules.NO_TYPE[kind]}"


@pytest.mark.parametrize(
    ("adapter", "problem"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "adapter: PREFIX_TUNING needs num_virtual_tokens"),
        ({"peft_type": "ADALORA", "init_r": 4}, "adapter: target_r (8) is above init_r (4), and ranks are only taken away"),
        ({"peft_type": "SHADOW"}, "give auxiliary_loss_weight: 0"),
        ({"peft_type": "ADAMSS", "use_asa": True}, "adapter.use_asa prunes by a state that no checkpoint would hold"),
        (LORA | {"init_lora_weights": "pisssa"}, "peft has no 'pisssa'; did you mean 'pissa'?"),
        (LORA | {"init_lora_weights": "pissa_niter_x"}, "peft has no 'pissa_niter_x'"),
        (LORA | {"init_lora_weights": "loftq"}, "add quantization.load_in_4bit: true"),
        (LORA | {"eva_config": {"roh": 1.0}}, "adapter.eva_config (EvaConfig) has no 'roh'; did you mean 'rho'?"),
        (LORA | {"eva_config": {"rho": "two"}}, "adapter.eva_config.rho is 'two' (str); it takes float"),
        (LORA | {"runtime_config": {"offload": True}}, "adapter.runtime_config (LoraRuntimeConfig) has no 'offload'"),
    ],
)
def test_what_check_says_of_an_adapter(chat, adapter, problem):
    (found,) = told(chat("run", adapter=adapter))
    assert problem in found


@pytest.mark.parametrize("how", ["pissa", "olora", "corda", "lora_ga"])
def test_an_initialisation_that_changes_the_base_fits_neither_4_bits_nor_preferences(chat, how):
    (found,) = told(chat("run", adapter=LORA | {"init_lora_weights": how}, quantization=NF4))
    assert f"{how} changes the base's weights, which quantised ones do not allow" in found
    (found,) = told(chat("run", task="preference", adapter=LORA | {"init_lora_weights": how}))
    assert f"{how} gives the base a part in the adapter" in found


def test_check_knows_the_nested_configurations_and_initialisations_of_peft():
    from dataclasses import is_dataclass

    from peft import LoraConfig

    def members(hint) -> set:
        return {hint} | {m for argument in typing.get_args(hint) if not isinstance(argument, str) for m in members(argument)}

    hints = typing.get_type_hints(LoraConfig)
    nested = {name: kind.__name__ for name, hint in hints.items() for kind in members(hint) if is_dataclass(kind)}
    assert nested == {name: reference.partition(":")[2] for name, reference in adapter_rules.NESTED.items()}
    literal = next(m for m in members(hints["init_lora_weights"]) if typing.get_origin(m) is typing.Literal)
    known = {name for name in typing.get_args(literal) if "[" not in name}
    assert known | {"lora_ga"} == set(adapter_rules.INITIALISATIONS)


@pytest.mark.parametrize("task", ["toy", "chat"])
def test_trained_tokens_alone_are_refused_where_they_could_not_be_kept(request, train, task):
    recipe = request.getfixturevalue(task)("run", adapter={"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 6]})
    with pytest.raises(UserError, match="LORA with trainable_token_indices") as caught:
        train(recipe)
    assert len(caught.value.problems) == 1
    assert not (recipe.parent / "run").exists()


# --- initialisations -------------------------------------------------------------------------------------------------------

PATTERNS = {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}


@pytest.mark.parametrize("more", [{}, PATTERNS], ids=["plain", "patterns"])
@pytest.mark.parametrize("how", ["pissa", "pissa_niter_4", "olora", "corda", "lora_ga"])
def test_the_saved_adapter_gives_the_trained_model_on_the_plain_base(chat, train, tiny_lm, how, more):
    run = train(chat("run", adapter=LORA | {"init_lora_weights": how} | more, training={"eval_on_start": False}))
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    saved = json.loads((run.path / "adapter/adapter_config.json").read_text())
    assert (saved["r"], saved["init_lora_weights"]) == (8, True)
    reference = load_file(run.path / "verification.safetensors")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_lm), run.path / "adapter").eval()
    with torch.inference_mode():
        logits = plain(reference["input_ids"]).logits[:, -1]
        with plain.disable_adapter():
            base = plain(reference["input_ids"]).logits[:, -1]
    assert (logits - reference["logits"]).abs().max() < 1e-4
    assert (base - reference["logits"]).abs().max() > 0.1


@pytest.mark.parametrize(
    "how", ["olora", *(pytest.param(how, marks=pytest.mark.long) for how in ("pissa_niter_4", "lora_ga", "eva"))]
)
def test_a_run_resumed_with_a_changed_base_is_the_straight_one(toy, train, tmp_path, how):
    recipe = toy("run", adapter=LORA | {"init_lora_weights": how, "lora_dropout": 0.1})
    straight = train(recipe)
    again = Run(tmp_path / "again")
    shutil.copytree(straight.path, again.path)
    for later in ("checkpoint-10", "checkpoint-15", "checkpoint-20"):
        shutil.rmtree(again.path / later)
    shutil.rmtree(again.path / "adapter")
    (again.path / "verification.safetensors").unlink()
    again.update(status="running")
    train(recipe, f"training.output_dir={again.path}")
    assert again.lines() == straight.lines()
    name = "adapter/adapter_model.safetensors"
    assert (again.path / name).read_bytes() == (straight.path / name).read_bytes()


def test_eva_gives_ranks_by_what_the_rows_explain(chat, train):
    run = train(chat("run", adapter=LORA | {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}}))
    saved = json.loads((run.path / "adapter/adapter_config.json").read_text())
    assert len(set(saved["rank_pattern"].values())) > 1
    assert max(saved["rank_pattern"].values()) <= 8


@pytest.mark.long
@pytest.mark.parametrize("how", ["eva", "lora_ga"])
def test_an_initialisation_by_data_does_not_depend_on_the_processes(toy, train, how):
    from test_layout import LAYOUTS, STILL, launched

    adapter = LORA | {"init_lora_weights": how, "target_modules": ["query", "value"]}
    made = {
        name: toy(name, model={"config": STILL}, adapter=adapter, training=LAYOUTS[name].training) for name in ("1x16", "2x8")
    }
    launched([made["2x8"]], LAYOUTS["2x8"].file)
    one, two = train(made["1x16"]), Run(made["2x8"].with_suffix(""))
    saved = [load_file(run.path / "adapter/adapter_model.safetensors") for run in (one, two)]
    assert [(name, tensor.shape) for name, tensor in saved[0].items()] == [(n, t.shape) for n, t in saved[1].items()]
    for name, tensor in saved[0].items():
        assert (tensor - saved[1][name]).norm() < 1e-4 * tensor.norm()


def test_loftq_makes_up_for_what_4_bits_lost(chat, train, tiny_lm):
    from transformers import AutoModelForCausalLM

    recipe = recipes.load(chat("run", adapter=LORA | {"r": 16, "init_lora_weights": "loftq"}, quantization=NF4))
    console.quiet_upstream()
    with torch.inference_mode():
        inputs = torch.arange(3, 35)[None]
        built = model.build(recipe, [], total_steps=1)[0].eval()
        wanted = AutoModelForCausalLM.from_pretrained(tiny_lm)(inputs).logits
        with_it = built(inputs).logits
        with built.disable_adapter():
            without = built(inputs).logits
    assert (with_it - wanted).norm() < 0.8 * (without - wanted).norm()
    train(recipe.document.path)


# --- new tokens ------------------------------------------------------------------------------------------------------------

TOKENS = ["<think>", "</think>"]


@pytest.fixture(params=["tied", "untied"])
def base(request, tiny_lm, tmp_path) -> Path:
    """The tiny language model, or the same with a head of its own."""
    if request.param == "tied":
        return tiny_lm
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "untied"
    shutil.copytree(tiny_lm, folder)
    found = AutoModelForCausalLM.from_pretrained(tiny_lm)
    found.config.tie_word_embeddings = False
    head = torch.nn.Linear(64, found.config.vocab_size, bias=False)
    found.lm_head = head
    found.save_pretrained(folder)
    return folder


def test_new_tokens_are_trained_saved_and_continued_with(chat, train, base):
    settings = {"name_or_path": str(base), "added_tokens": TOKENS}
    run = train(chat("run", model=settings, training={"eval_on_start": False}))
    saved = load_file(run.path / "adapter/adapter_model.safetensors")
    rows = {name: tensor for name, tensor in saved.items() if "trainable_tokens_delta" in name}
    assert len(rows) == (1 if base.name != "untied" else 2)
    assert all(len(tensor) == len(TOKENS) for tensor in rows.values())
    assert not [name for name in saved if name.endswith(("embed_tokens.weight", "lm_head.weight"))]  # not whole
    loaded = model.load(run)
    ids = model.tokenizer(run.recipe()).convert_tokens_to_ids(TOKENS)
    assert min(ids) == loaded.get_input_embeddings().weight.shape[0] - 2
    again = train(chat("again", model={"name_or_path": str(base)}, adapter={"name_or_path": str(run.path)}))
    before = run.record["metrics"]["after"]["loss"]
    assert again.record["metrics"]["before"]["loss"] == pytest.approx(before, abs=1e-5)
    assert set(TOKENS) <= set(model.tokenizer(again.recipe()).get_vocab())


def test_new_tokens_of_a_classifier(toy, train):
    run = train(toy("run", model={"added_tokens": TOKENS}, adapter=LORA, training={"num_train_epochs": 1}))
    saved = load_file(run.path / "adapter/adapter_model.safetensors")
    assert [tensor.shape[0] for name, tensor in saved.items() if "trainable_tokens_delta" in name] == [2]


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_a_type_that_cannot_train_single_tokens_needs_embedding_and_head(chat, train):
    ia3 = {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []}
    (problem,) = told(chat("run", model={"added_tokens": TOKENS}, adapter=ia3))
    assert "IA3 would not train the rows of new tokens" in problem
    whole = ["embed_tokens", "lm_head"]
    with pytest.raises(UserError, match=r"adapter\.modules_to_save: \['embed_tokens'\] leaves out the head"):
        train(chat("run", model={"added_tokens": TOKENS}, adapter=ia3 | {"modules_to_save": whole[:1]}))
    run = train(chat("run", model={"added_tokens": TOKENS}, adapter=ia3 | {"modules_to_save": whole}))
    assert run.record["status"] == "complete"


def test_an_adapter_without_the_new_tokens_is_not_continued_with_them(chat, train):
    run = train(chat("run", training={"max_steps": 1}))
    later = chat("later", model={"added_tokens": TOKENS}, adapter={"name_or_path": str(run.path)})
    with pytest.raises(UserError, match=r"model\.added_tokens: 2 of them are not among the tokens"):
        train(later)


# --- continuing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "comes back from a file to answer with"),
        (
            {"peft_type": "ADALORA", "tinit": 1, "tfinal": 1, "target_modules": "all-linear"},
            "has given its ranks out",
        ),
    ],
    ids=["PROMPT_TUNING", "ADALORA"],
)
def test_some_types_are_not_continued_from(chat, train, adapter, reason):
    run = train(chat("run", adapter=adapter))
    with pytest.raises(UserError, match=rf"adapter\.name_or_path: .* is of type {adapter['peft_type']}, which {reason}"):
        train(chat("again", adapter={"name_or_path": str(run.path)}))


@pytest.mark.parametrize(
    "adapter",
    [
        LORA,
        LORA | {"trainable_token_indices": [5, 6]},
        LORA | {"use_dora": True},
        LORA | {"init_lora_weights": "pissa"},
        {"peft_type": "IA3", "target_modules": ["k_proj"], "feedforward_modules": []},
        {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj", "v_proj"]},
    ],
    ids=["LORA", "tokens", "DoRA", "PiSSA", "IA3", "VERA"],
)
@pytest.mark.long
def test_preferences_from_answers_start_with_rewards_of_zero_and_keep_their_reference(chat, train, adapter):
    before = train(chat("run", adapter=adapter))
    run = train(chat("dpo", task="preference", adapter={"name_or_path": str(before.path)}))
    start = run.record["metrics"]["before"]
    assert (start["rewards_chosen"], start["rewards_rejected"], start["rewards_margins"]) == (0, 0, 0)
    assert run.record["metrics"]["after"]["rewards_margins"] != 0
    rank = 2 if "init_lora_weights" in adapter else 1  # a converted adapter has twice as many
    assert run.record["parameters"]["trainable"] == rank * before.record["parameters"]["trainable"]
    saved = load_file(run.path / "adapter/adapter_model.safetensors")
    assert sorted(saved) == sorted(load_file(before.path / "adapter/adapter_model.safetensors"))


def test_the_reference_is_frozen_and_stays(chat, train, monkeypatch):
    from scalepeft.language import PreferenceTrainer

    seen = {}
    step = PreferenceTrainer.training_step

    def spy(self, built, *given, **options):
        found = {name: p for name, p in built.named_parameters() if ".ref" in name}
        assert found
        assert not any(p.requires_grad for p in found.values())
        for name, p in found.items():
            assert torch.equal(p, seen.setdefault(name, p.detach().clone()))
            if self.state.global_step == 0:
                assert torch.equal(p, built.get_parameter(name.replace(".ref", ".default")))
        return step(self, built, *given, **options)

    before = train(chat("run", adapter=LORA, training={"max_steps": 2}))
    monkeypatch.setattr(PreferenceTrainer, "training_step", spy)
    train(chat("dpo", task="preference", adapter={"name_or_path": str(before.path)}, training={"max_steps": 3}))
    assert seen


# --- AdaLoRA ---------------------------------------------------------------------------------------------------------------


def test_adalora_of_a_language_model_ends_at_its_budget_whatever_the_accumulation(chat, train):
    adapter = {
        "peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1,
        "orth_reg_weight": 5.0, "target_modules": ["q_proj", "v_proj"],
    }  # fmt: skip
    run = train(chat("run", adapter=adapter))
    saved = json.loads((run.path / "adapter/adapter_config.json").read_text())
    assert saved["total_step"] == run.record["max_steps"] == 6
    assert sum(found["final"] for found in run.record["ranks"].values()) == 2 * len(run.record["ranks"])
    half = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    other = train(chat("half", adapter=adapter, training=half))
    pairs = itertools.zip_longest(*([x["loss"] for x in r.lines() if "loss" in x] for r in (run, other)))
    assert all(one == pytest.approx(two, rel=1e-4) for one, two in pairs)


# --- 4 bits ----------------------------------------------------------------------------------------------------------------


def test_a_base_in_4_bits_trains_and_comes_back(chat, train):
    run = train(chat("run", quantization=NF4))
    loaded = model.load(run)
    kinds = {name: type(module).__name__ for name, module in loaded.get_base_model().named_modules()}
    assert kinds["model.layers.0.self_attn.q_proj.base_layer"] == "Linear4bit"
    assert (kinds["lm_head"], kinds["model.embed_tokens"]) == ("Linear", "Embedding")
    assert run.record["verification"]["max_difference"] < 1e-4
    record = run.record["metrics"]
    assert record["after"]["loss"] < record["before"]["loss"]


def test_a_base_that_is_quantised_already_is_refused(chat, train, tiny_lm, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    folder = tmp_path / "small"
    shutil.copytree(tiny_lm, folder)
    console.quiet_upstream()
    AutoModelForCausalLM.from_pretrained(tiny_lm, quantization_config=BitsAndBytesConfig(**NF4)).save_pretrained(folder)
    with pytest.raises(UserError, match=r"quantization: .* is quantised already \(bitsandbytes\); leave the section out"):
        train(chat("run", model={"name_or_path": str(folder)}, quantization=NF4))


@pytest.mark.skipif(upstream.installed("flash_attn"), reason="the package is there")
def test_an_attention_without_its_package_is_one_line_that_names_the_key(chat, train):
    with pytest.raises(UserError, match=r"run\.yaml:\d+: model\.attn_implementation: .*Flash") as caught:
        train(chat("run", model={"attn_implementation": "flash_attention_2"}))
    assert len(caught.value.problems) == 1


def test_a_head_that_is_held_in_parts_is_trained_and_saved_whole(toy):
    """As ZeRO-3 leaves parameters when a model is made: empty, with their size in ds_numel."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    from scalepeft import adapters

    base = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=1, n_heads=2))
    for parameter in base.parameters():
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)
    recipe = recipes.load(toy(adapter=LORA))
    found = adapters._whole(recipe, base, [])
    assert found["modules_to_save"] == ["pre_classifier", "classifier"]
    assert "pre_classifier" in found["exclude_modules"]
