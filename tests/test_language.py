"""Language models: the same numbers on every layout, packed documents that never see each other, noise that leaves no trace."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from test_layout import CLOSE, LAYOUTS, figures

from scalepeft import predict
from scalepeft.console import quiet_upstream
from scalepeft.errors import UserError
from scalepeft.run import Run

LANGUAGE = ("causal-lm", "preference")


@pytest.fixture(autouse=True)
def _quiet():
    quiet_upstream()


@pytest.fixture
def layout(chat, train):
    """Train the tiny language model on a layout by its name."""

    def run(name: str, task: str = "causal-lm", **training) -> Run:
        return train(chat(name, task=task, training={**LAYOUTS[name].training, "learning_rate": 1e-3, **training}))

    return run


def refusal(train, recipe, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        train(recipe, *overrides)
    assert len(caught.value.problems) == 1
    assert not recipe.with_suffix("").exists(), "something was left behind"
    return str(caught.value)


# --- the loss is that of the tokens; on other layouts: test_layout -------------------------------------------------------


@pytest.mark.parametrize("task", LANGUAGE)
def test_evaluation_afterwards_finds_the_same(layout, task):
    run = layout("1x16", task)
    found = predict.evaluate(run)["test"]
    assert found == pytest.approx(run.record["evaluation"]["test"]["after"], rel=CLOSE)
    assert found["loss"] < run.record["metrics"]["before"]["loss"]


def test_evaluation_counts_tokens_not_batches(chat, train):
    losses = [
        train(chat(f"of{size}", training={"per_device_eval_batch_size": size, "max_steps": 1})).record["metrics"]["after"]
        for size in (1, 12)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=CLOSE)
    assert losses[0]["perplexity"] == pytest.approx(math.exp(losses[0]["loss"]))


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compared(monkeypatch):
    """In every training step, the largest difference of any document's logits and losses in its row and alone."""
    from scalepeft.language import SupervisedTrainer

    found: list[tuple[float, float]] = []
    step = SupervisedTrainer.training_step

    def alone(model, ids, labels):
        ids, labels = ids[None], labels[None]
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False, fused_lm_head=True)
        return logits[0], out.log_probs.sum()

    def comparing(self, model, inputs, *rest):
        model.eval()
        batch = {k: v for k, v in inputs.items() if k != "labels"}
        with torch.no_grad():
            logits = model(**batch, use_cache=False).logits[0]
            fused = model(**inputs, use_cache=False, fused_lm_head=True).log_probs[0]
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten().tolist()
        assert len(starts) > self.args.per_device_train_batch_size, "nothing is packed"
        for start, end in zip(starts, [*starts[1:], logits.size(0)], strict=True):
            own, total = alone(model, inputs["input_ids"][0, start:end], inputs["labels"][0, start:end])
            found.append(((own - logits[start:end]).abs().max().item(), (total - fused[start : end - 1].sum()).abs().item()))
        model.train()
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(SupervisedTrainer, "training_step", comparing)
    return found


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_documents_do_not_see_each_other(chat, train, compared, attention, strategy):
    training = {"packing": True, "packing_strategy": strategy, "per_device_train_batch_size": 2}
    run = train(chat(model={"attn_implementation": attention}, training=training))
    assert run.record["data"]["documents"] == {"train": 44}
    assert run.record["data"]["rows"]["train"] < 22
    assert len(compared) >= 44
    assert max(logits for logits, _ in compared) < 1e-4
    assert max(loss for _, loss in compared) < 1e-3, "a sum over tokens"


def test_packing_keeps_every_token_of_the_loss(chat, train):
    """One step over all rows: the same mean over the same tokens, packed or not."""
    one_step = {"per_device_train_batch_size": 44, "max_steps": 1}
    plain = train(chat("plain", training=one_step))
    packed = train(chat("packed", training={**one_step, "packing": True}))
    free = train(chat("free", training={**one_step, "padding_free": True}))
    expected = figures(plain, "loss", "grad_norm")
    for run in (packed, free):
        torch.testing.assert_close(figures(run, "loss", "grad_norm"), expected, rtol=1e-5, atol=1e-6)


def test_rows_are_packed_once_and_then_found(chat, train, capsys):
    train(chat("first", training={"packing": True, "max_steps": 1, "max_length": 101}))
    assert "cached" not in capsys.readouterr().out.partition("test 12 rows")[0]
    train(chat("second", training={"packing": True, "max_steps": 1, "max_length": 101}))
    assert "cached" in capsys.readouterr().out.partition("test 12 rows")[0]


def test_packing_knows_what_was_held_out(chat, train):
    """The first rows of a set are a slice of it, without a list of numbers: their packing must not be that of the whole set."""
    training = {"packing": True, "max_steps": 1, "max_length": 103}
    whole = train(chat("whole", training=training))
    for seed in range(3):
        recipe = chat(f"part{seed}", training=training, data={"holdout": {"size": 1, "seed": seed}})
        part = train(recipe)
        assert part.record["data"]["documents"] == {"train": 43}
        assert part.record["data"]["keys"]["train"] != whole.record["data"]["keys"]["train"]


def test_virtual_tokens_and_packing_are_refused(chat, train):
    adapter = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    told = refusal(train, chat(adapter=adapter, training={"packing": True}))
    assert "training.packing: PROMPT_TUNING puts its virtual tokens before a row" in told


def test_a_model_that_cannot_isolate_is_refused(chat, train):
    """Attention that is given no mask sees everything before it, as one of a model's own making would."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forgetful(module, query, key, value, attention_mask, **options):  # noqa: ARG001  # that is the point
        return sdpa_attention_forward(module, query, key, value, None, **options)

    AttentionInterface.register("forgetful", forgetful)
    AttentionMaskInterface.register("forgetful", lambda *_, **__: None)
    told = refusal(train, chat(model={"attn_implementation": "forgetful"}, training={"packing": True}))
    assert "training.packing" in told
    assert "'forgetful'" in told
    assert "set training.packing: false" in told


# --- NEFTune --------------------------------------------------------------------------------------------------------


def test_neftune_noise_is_uniform_scaled_and_only_in_training(chat, train, monkeypatch):
    from scalepeft.language import SupervisedTrainer

    seen: dict[str, list] = {"train": [], "eval": []}
    step, predicts = SupervisedTrainer.training_step, SupervisedTrainer.prediction_step

    def noise(self, inputs):
        layer = self.accelerator.unwrap_model(self.model).get_input_embeddings()
        ids = inputs["input_ids"]
        return (layer(ids) - torch.nn.functional.embedding(ids, layer.weight)).detach(), ids.size(1)

    def training_step(self, model, inputs, *rest):
        model.train()  # as the step is about to
        seen["train"].append(noise(self, inputs))
        return step(self, model, inputs, *rest)

    def prediction_step(self, model, inputs, *rest, **options):
        seen["eval"].append(noise(self, inputs))
        return predicts(self, model, inputs, *rest, **options)

    monkeypatch.setattr(SupervisedTrainer, "training_step", training_step)
    monkeypatch.setattr(SupervisedTrainer, "prediction_step", prediction_step)
    run = train(chat(training={"neftune_noise_alpha": 5}))
    assert len(seen["train"]) == 6
    width = 64
    for found, length in seen["train"]:
        bound = 5 / math.sqrt(length * width)
        assert found.abs().max() <= bound * (1 + 1e-5)
        assert found.abs().max() > 0.99 * bound
        # the standard deviation of a uniform draw; of a Gaussian one with this bound hardly any would reach it
        assert found.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert seen["eval"]
    assert all(not found.any() for found, _ in seen["eval"])
    assert not any("embed" in name or "neft" in name for name in load_file(run.path / "adapter/adapter_model.safetensors"))
    assert "neft" not in (run.path / "adapter/adapter_config.json").read_text()


def test_neftune_changes_training_and_nothing_before_it(chat, train):
    plain, noisy = train(chat("plain")), train(chat("noisy", training={"neftune_noise_alpha": 5}))
    assert plain.record["metrics"]["before"] == noisy.record["metrics"]["before"]
    assert figures(plain, "loss")[0, 1] != figures(noisy, "loss")[0, 1]


# --- preferences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "training"),
    [
        ({}, {}),
        ({}, {"ld_alpha": 0.0}),
        ({"adapter": None}, {}),
        ({"adapter": None, "model": {"config": {"rms_norm_eps": 0.1}}}, {}),
    ],
    ids=["adapter", "ld_alpha", "full", "another configuration"],
)
def test_policy_and_reference_start_equal(chat, train, changes, training):
    run = train(chat(task="preference", training={"max_steps": 2, "learning_rate": 1e-3, **training}, **changes))
    before = run.record["metrics"]["before"]
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["rewards_margins"] == pytest.approx(0, abs=1e-6)
    found = predict.evaluate(run)["test"]
    assert found["loss"] == pytest.approx(run.record["metrics"]["after"]["loss"], rel=CLOSE)


def test_preferences_after_supervised_training(chat, train):
    first = train(chat("first", training={"learning_rate": 1e-3}))
    recipe = chat("second", task="preference", adapter={"name_or_path": str(first.path)}, training={"learning_rate": 1e-3})
    run = train(recipe)
    assert run.record["metrics"]["before"]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert run.record["metrics"]["after"]["loss"] < math.log(2)
    assert predict.evaluate(run)["test"]["loss"] == pytest.approx(run.record["metrics"]["after"]["loss"], rel=CLOSE)


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("precompute_ref_log_probs", "is not there"),
        ("sync_ref_model", "a resumed run would train another model"),
        ("padding_free", "TRL has turned it off"),
    ],
)
def test_options_that_preferences_cannot_serve_are_refused(chat, train, option, told):
    assert told in refusal(train, chat(task="preference", training={option: True}))


# --- what a run leaves, and its resumption -------------------------------------------------------------------------


@pytest.mark.parametrize("task", LANGUAGE)
def test_a_resumed_run_gives_the_same_bytes(chat, train, monkeypatch, task):
    from scalepeft.trainer import RecipeTraining

    steps = {"save_strategy": "steps", "save_steps": 2}
    adapter = {"lora_dropout": 0.1}
    straight = train(chat("straight", task=task, training=steps, adapter=adapter))
    recipe = chat("broken", task=task, training=steps, adapter=adapter)
    done, step = iter(range(3)), RecipeTraining.training_step
    with monkeypatch.context() as patch:

        def breaking(*arguments, **options):
            if next(done, None) is None:
                raise RuntimeError("the machine is on fire")
            return step(*arguments, **options)

        patch.setattr(RecipeTraining, "training_step", breaking)
        with pytest.raises(RuntimeError):
            train(recipe)
    resumed = train(recipe)
    name = "adapter/adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (straight.path / name).read_bytes()
    assert resumed.lines() == straight.lines()


def test_a_sample_answer_is_recorded(chat, train):
    sample = train(chat()).record["sample"]
    assert sample["prompt"].endswith("<|im_start|>assistant\n")
    assert sample["expected"]
    assert sample["base"] != sample["trained"]


def test_a_sample_answer_stays_within_the_window(chat, train, monkeypatch):
    from scalepeft import generate

    asked, answer = [], generate.answer

    def answering(model, tokenizer, ids, *, max_new_tokens):
        asked.append((len(ids), max_new_tokens))
        return answer(model, tokenizer, ids, max_new_tokens=max_new_tokens)

    monkeypatch.setattr(generate, "answer", answering)
    recipe = chat(training={"max_length": 256, "max_steps": 1})
    row = {"messages": [{"role": "user", "content": "a " * 117}, {"role": "assistant", "content": "b"}]}
    (recipe.parent / "chat_test.jsonl").write_text(json.dumps(row) + "\n")
    assert train(recipe).record["status"] == "complete"
    assert len(asked) == 2
    assert all(prompt > 240 and prompt + new == 256 for prompt, new in asked)


def test_a_trained_run_does_not_look_at_the_template_again(chat, train, tiny_lm, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text((tiny_lm / "chat_template.jinja").read_text())
    run = train(chat(training={"chat_template_path": str(template), "max_steps": 1}))
    template.unlink()
    assert predict.evaluate(run)["test"]["loss"] == pytest.approx(run.record["metrics"]["after"]["loss"], rel=CLOSE)


@pytest.mark.parametrize("task", LANGUAGE)
def test_a_run_directory_holds_no_pickle_and_no_card(chat, train, task):
    run = train(chat(task=task, training={"save_strategy": "epoch"}))
    names = {path.name for path in run.path.rglob("*")}
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pkl", ".pth"))]
    assert not (run.path / "README.md").exists()
    assert not (run.path / "adapter/ref").exists()
    metrics = json.loads((run.path / "run.json").read_text())["metrics"]["after"]
    assert set(metrics) <= {"loss", "perplexity", "mean_token_accuracy"} | {
        f"rewards_{name}" for name in ("accuracies", "margins", "chosen", "rejected")
    }
    assert {"curves.png", "tokenizer.json", "chat_template.jinja"} <= names


# --- bad input -----------------------------------------------------------------------------------------------------


def rows(recipe, *records) -> None:
    (recipe.parent / "chat_train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def turns(*pairs) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


GOOD = turns(("user", "a"), ("assistant", "b"))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (turns(("user", "a"), ("robot", "b")), "robot"),
        (turns(("assistant", "b"), ("user", "a")), "assistant"),
        (turns(("user", "a"), ("assistant", "")), "empty"),
        (turns(("user", "a")), "assistant"),
        (turns(("user", "a" * 400), ("assistant", "b")), "training.max_length"),
        ({"messages": "hello"}, "messages"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_or_dropped(chat, train, record, reason):
    recipe = chat(data={"holdout": None})
    rows(recipe, GOOD, record, *[GOOD] * 9)
    with pytest.raises(UserError) as caught:
        train(recipe)
    assert "chat_train.jsonl:2: row 2" in caught.value.problems[0]
    assert reason in caught.value.problems[0]
    assert "on_bad_rows: drop" in caught.value.problems[-1]
    run = train(recipe, "data.on_bad_rows=drop", "training.max_steps=1")
    assert sum(run.record["data"]["dropped"]["train"].values()) == 1
    assert run.record["data"]["rows"]["train"] == 10


def without(base, folder, **fields):
    """The tiny model with another tokenizer configuration."""
    import shutil

    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").unlink()
    file = folder / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(file.read_text()).items() if k not in fields or fields[k] is not None}
    file.write_text(json.dumps(settings))
    return folder


def test_no_chat_template_is_one_line_that_says_what_helps(chat, train, tiny_lm, tmp_path):
    recipe = chat(model={"name_or_path": str(without(tiny_lm, tmp_path / "bare"))})
    told = refusal(train, recipe)
    assert "chat template" in told
    assert "training.chat_template_path" in told
    template = tmp_path / "own.jinja"
    template.write_text((tiny_lm / "chat_template.jinja").read_text())
    assert train(recipe, f"training.chat_template_path={template}", "training.max_steps=1").record["status"] == "complete"


def test_no_eos_and_no_padding_is_one_line(chat, train, tiny_lm, tmp_path):
    bare = without(tiny_lm, tmp_path / "bare", eos_token=None, pad_token=None)
    told = refusal(train, chat(model={"name_or_path": str(bare)}))
    assert "neither a padding token nor EOS" in told
    assert "training.eos_token" in told


def test_columns_that_no_format_has_are_told(chat, train):
    recipe = chat()
    rows(recipe, {"dialogue": GOOD["messages"]}, {"dialogue": GOOD["messages"]})
    told = refusal(train, recipe)
    assert "'dialogue'" in told
    assert "{messages: NAME}" in told
    run = train(recipe, "data.train.columns={messages: dialogue}", "training.max_steps=1")
    assert run.record["data"]["rows"]["train"] == 2


def test_a_format_that_lacks_a_column_is_told(chat, train):
    told = refusal(train, chat(data={"format": "instruction"}))
    assert "the format instruction needs" in told
    assert "instruction" in told
    assert "messages" in told


@pytest.mark.parametrize("option", ["assistant_only_loss", "completion_only_loss"])
def test_a_loss_on_a_part_that_text_does_not_have_is_refused(chat, train, option):
    recipe = chat(training={option: True})
    rows(recipe, {"text": "all of this counts"}, {"text": "and this, too"})
    assert f"training.{option}: rows of the format text" in refusal(train, recipe)


@pytest.mark.long
def test_attention_without_a_backward_pass_here_is_one_line(chat, command):
    recipe = chat(model={"attn_implementation": "flex_attention"})
    ended = command("train", recipe)  # a process of its own: it loads torch's compiler, which warns of itself
    assert ended.returncode == 2
    assert "FlexAttention does not support backward on CPU" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not recipe.with_suffix("").exists()


def test_what_does_not_page_is_said(chat, train, capsys):
    train(chat(training={"optim": "paged_adamw_32bit", "max_steps": 1}))
    assert "paged_adamw_32bit pages nothing on a CPU" in capsys.readouterr().err


# --- what a step costs beside training -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_what_is_summed_until_the_log_is_what_upstream_reads_each_time(chat, train, monkeypatch, loss_type):
    from trl import SFTTrainer

    from scalepeft.language import SupervisedTrainer

    found: dict[str, list[dict[str, float]]] = {"ours": [], "upstream": []}
    log, add, added = SFTTrainer.log, SupervisedTrainer._add, []
    monkeypatch.setattr(SupervisedTrainer, "_add", lambda *given: (added.append(1), add(*given)))
    for name, kept in found.items():
        if name == "upstream":
            monkeypatch.setattr(SupervisedTrainer, "compute_loss", SFTTrainer.compute_loss)
        monkeypatch.setattr(SFTTrainer, "log", lambda self, logs, *rest, kept=kept: (log(self, logs, *rest), kept.append(logs)))
        train(chat(name, training={"max_steps": 3, "logging_steps": 1, "loss_type": loss_type}))
    assert len(added) == 3, "ours did not run"
    assert len(found["ours"]) == len(found["upstream"])
    for ours, theirs in zip(*found.values(), strict=True):
        names = {"loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens"} & theirs.keys()
        assert {name: ours[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, rel=1e-5)
    steps = [logs for logs in found["ours"] if "loss" in logs]
    assert len(steps) == 3
    assert all(logs.keys() >= {"entropy", "mean_token_accuracy", "num_tokens"} for logs in steps)
