"""Claims about kept states of frozen layers: training on them is training, and what cannot be served is refused."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import toy_rows, train_here, write_csv, write_toy
from peft import LoraConfig, get_peft_model
from stopped import carry_out
from test_layout import CLOSE, STILL, launched, measured
from test_resume import NOISY, same_to_the_byte

from scalepeft import engines, frozen, prefix
from scalepeft import recipe as recipes
from scalepeft.console import quiet_upstream
from scalepeft.errors import Interrupted, UserError
from scalepeft.run import Run

LAST = {"target_modules": ["query", "value", "dense"], "layers_to_transform": [1]}
"""The second of the tiny model's two layers."""
KEPT = {"adapter": LAST, "cache_frozen_layers": "1MB"}


def test_states_change_no_number(toy, train):
    """The adapter's own dropout stays, and so do its masks: the frozen layers draw none."""
    training = {"num_train_epochs": 3, "train_sampling_strategy": "group_by_length"}
    settings = {"training": training, "model": {"config": STILL}, "adapter": LAST}
    run, plain = train(toy("kept", cache_frozen_layers="1MB", **settings)), train(toy("plain", **settings))
    apart = measured(run, plain)
    assert max(apart.values()) < 1e-6, apart
    assert run.record["metrics"]["after"] == pytest.approx(plain.record["metrics"]["after"], rel=1e-6)
    assert not (run.path / frozen.FOLDER).exists()


def test_a_run_goes_on_to_the_bit_with_its_states_or_without(toy, monkeypatch):
    training = NOISY | {"neftune_noise_alpha": None}
    straight = train_here(toy("straight", training=training, **KEPT))
    recipe = toy(training=training, **KEPT)
    run = carry_out(recipe, [("step", 2, 0), ("evaluation", 5, 0)], finish=False, training=train_here)
    computed = []
    monkeypatch.setattr(frozen, "_compute", lambda *given, kept=frozen._compute: computed.append(given[2]) or kept(*given))
    carry_out(recipe, [("step", 7, 0)], finish=False, training=train_here)
    assert not computed
    os.truncate(run.path / frozen.FOLDER / "train" / "0.bin", 100)
    train_here(recipe)
    assert computed == ["train"]
    same_to_the_byte(run, straight)


def test_a_stop_is_heeded_while_the_layers_run(toy, train, monkeypatch):
    training = {"num_train_epochs": 1, "eval_strategy": "no", "dataloader_num_workers": 1}
    recipe, states = toy(**KEPT, training=training), prefix.Prefix.states
    with monkeypatch.context() as patch:
        patch.setattr(prefix.Prefix, "states", lambda *given: os.kill(os.getpid(), signal.SIGTERM) or states(*given))
        with pytest.raises(Interrupted, match="stopped while its frozen layers were run; the same command goes on"):
            train(recipe)
    assert Run(recipe.with_suffix("")).record["status"] == "interrupted"
    assert train(recipe).record["status"] == "complete"


@pytest.mark.long
def test_two_processes_share_the_states_of_both(tmp_path, tiny_model):
    rows = write_csv(tmp_path / "many.csv", toy_rows(600, seed=3))  # more than are computed at a time
    settings = KEPT | {"adapter": LAST | {"lora_dropout": 0.0}, "model": {"config": STILL}, "cache_frozen_layers": "10MB"}
    settings |= {"global_batch_size": 16, "data": {"train": {"path": str(rows)}}}
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8}
    one, two = (write_toy(tmp_path, tiny_model, name, training=training, **settings) for name in ("one", "two"))
    train_here(one)
    launched([two], "multi_cpu")
    apart = measured(Run(tmp_path / "two"), Run(tmp_path / "one"))
    assert max(apart.values()) < CLOSE, apart


ENCODERS = {
    "bert": ({}, ["query", "value"]),
    "distilbert": ({"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64, "dropout": 0.5}, ["q_lin", "v_lin"]),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), ({}, ["query", "value"])),
}
SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.5,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("first", [1, 2])
def test_an_encoder_answers_from_states_as_from_tokens_and_keeps_the_dropout_of_what_is_trained(kind, first, toy):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    quiet_upstream()
    own, targets = ENCODERS[kind]
    config = AutoConfig.for_model(kind, **(own or SMALL), pad_token_id=0)
    reached = LoraConfig(target_modules=targets, layers_to_transform=list(range(first, 3)), modules_to_save=["classifier"])
    model = get_peft_model(AutoModelForSequenceClassification.from_config(config), reached).eval()
    found = prefix.find(recipes.load(toy()), model)
    assert (found.count, len(found.layers)) == (first, 3)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    mask = (ids != 0).long()
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=mask).logits
        states = found.states({"input_ids": ids, "attention_mask": mask})
        rows = [{"states": of[:length], "labels": 0} for of, length in zip(states, (4, 2), strict=True)]
        batch = prefix.collate(rows)
        with found.passed_over():
            assert torch.allclose(model(**batch).logits, whole, atol=1e-6)
            model.train()
            assert not torch.allclose(model(**batch).logits, whole, atol=1e-3)
        assert torch.equal(model.eval()(input_ids=ids, attention_mask=mask).logits, whole)


def test_a_row_finds_its_states_whichever_process_computed_them(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setattr(prefix, "_TOKENS", 12)
    lengths = np.array([3, 5, 1, 4, 4, 2, 7, 1])
    states = prefix.States([], lengths, tmp_path, width=2, dtype=torch.bfloat16, parts=3)
    for part in range(3):  # a token's state tells its row and place
        rows = [row for batch in states.batches()[part::3] for row in batch]
        tokens = [[row, place] for row in rows for place in range(lengths[row])]
        content = torch.tensor(tokens, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
        assert len(content) == states.size(part)
        states.file(part).write_bytes(content)
    assert len(states.batches()) > 3
    states.rows = SimpleNamespace(__getitems__=lambda indices: [{"labels": 0} for _ in indices])
    found = states.__getitems__(range(8))
    assert [row["states"].tolist() for row in found] == [[[r, p] for p in range(n)] for r, n in enumerate(lengths)]
    states.rows = None
    assert "maps" not in pickle.loads(pickle.dumps(states)).__dict__  # noqa: S301  # its own


REFUSED = {
    "size": ({"cache_frozen_layers": "much"}, "cache_frozen_layers 'much': is no size; it takes one like 80GiB or 24GB"),
    "task": ({"task": "causal-lm"}, "cache_frozen_layers serves encoders: the task is causal-lm, not sequence-classification"),
    "noise": ({"training": {"neftune_noise_alpha": 5}}, "training.neftune_noise_alpha: adds noise to embeddings"),
    "adapter": ({"adapter": None}, "without an adapter no layer is frozen"),
    "prompt": ({"adapter": {"peft_type": "P_TUNING", "num_virtual_tokens": 4}}, "P_TUNING puts its virtual tokens before"),
    "shadow": ({"adapter": {"peft_type": "SHADOW", "auxiliary_loss_weight": 0}}, "SHADOW looks at the token ids"),
    "checkpointing": (
        {"training": {"activation_checkpointing_kwargs": {"use_reentrant": True}}},
        "use_reentrant: would give the first trained layer no gradient",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_kept_states_cannot_serve_is_refused_without_torch(toy, name):
    changes, told = REFUSED[name]
    with pytest.raises(UserError, match="cache_frozen_layers") as raised:
        recipes.load(toy(**KEPT | changes))
    assert sum(told in problem for problem in raised.value.problems) == 1, raised.value


def test_a_stream_is_refused(toy, tmp_path):
    streamed = {"train": {"path": str(tmp_path / "train.csv"), "streaming": True}}
    with pytest.raises(UserError, match=r"data\.train\.streaming: rows of a stream are met once; prepare them"):
        recipes.load(toy(data=streamed, training={"max_steps": 3}, **KEPT))


BEFORE_TRAINING = {
    "first": ({"adapter": {"target_modules": "all-linear"}}, "the adapter reaches the first of the 2 layers, so that none is"),
    "embeddings": ({"adapter": LAST | {"modules_to_save": ["word_embeddings"]}}, "the embeddings are trained, and nothing"),
    "limit": ({"cache_frozen_layers": "9kB"}, r"tokens of train, test take 257.12 KiB \(32 x 4 bytes each\), and 9kB is the m"),
    "disk": ({}, r"take 257.12 KiB .*, and /.* has 1.00 KiB left"),
}


@pytest.mark.parametrize("name", BEFORE_TRAINING)
def test_what_cannot_be_kept_is_refused_before_it_is_computed(toy, train, monkeypatch, name):
    changes, told = BEFORE_TRAINING[name]
    if name == "disk":
        usage = shutil.disk_usage("/")._replace(free=1024)
        monkeypatch.setattr(frozen.shutil, "disk_usage", lambda _: usage)
    recipe = toy(**KEPT | changes)
    with pytest.raises(UserError, match=rf"^{recipe}:\d+: cache_frozen_layers: .*{told}"):
        train(recipe)
    assert not recipe.with_suffix("").exists()


def test_divided_models_are_refused(toy):
    on = {"engine": "ZeRO-2", "offloads": False}
    with pytest.raises(UserError, match="cache_frozen_layers: is not served under ZeRO-2; use --launch multi_gpu"):
        engines.refuse(recipes.load(toy(**KEPT)), on, optim="adamw_torch", cpu=True)


def test_gradient_checkpointing_changes_no_number(toy, train):
    training = {"num_train_epochs": 1}
    run = train(toy("kept", training=training, **KEPT))
    again = train(toy("again", training=training | {"activation_checkpointing": True}, **KEPT))
    assert max(measured(again, run).values()) < 1e-6
