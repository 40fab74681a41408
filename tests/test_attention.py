"""Attention by document gives what a mask over all of them gives."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.integrations import sdpa_attention
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from scalepeft import attention

SHAPE = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "all before": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE, num_key_value_heads=2)),
    "a window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=4)),
}


@pytest.fixture
def counted(monkeypatch):
    """The tokens of each call that attention by document makes of upstream's."""
    lengths: list[int] = []
    sdpa = sdpa_attention.sdpa_attention_forward

    def counting(module, query, *rest, **options):
        lengths.append(query.shape[2])
        return sdpa(module, query, *rest, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", counting)
    return lengths


def assert_same_both_ways(model, batch, present):
    """Logits of the tokens that are present, and gradients, by document and by upstream's mask."""
    found = []
    for way in (attention.install, lambda model: model.set_attn_implementation("sdpa")):
        way(model)
        model.zero_grad()
        output = model(**batch, use_cache=False)
        output.loss.backward()
        found.append((output.logits.detach()[present], [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(*(logits for logits, _ in found))
    torch.testing.assert_close(*(gradients for _, gradients in found))


@pytest.mark.parametrize("kind", MODELS)
def test_documents_give_the_logits_and_gradients_of_the_mask(counted, kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    assert model.config._attn_implementation == "sdpa"
    rows = [{"input_ids": torch.randint(50, (length,)).tolist()} for length in (9, 3, 1, 14)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(rows)
    assert_same_both_ways(model, batch, torch.ones_like(batch["input_ids"], dtype=torch.bool))
    assert counted == [9, 3, 1, 14] * 2


def test_padding_is_left_out_and_changes_nothing_before_it(counted):
    torch.manual_seed(0)
    model = MODELS["all before"]()
    rows = [{"input_ids": torch.randint(50, (length,)).tolist()} for length in (9, 3, 14)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0)(rows)
    assert_same_both_ways(model, batch, batch["attention_mask"].bool())
    assert counted == [9, 3, 14] * 2


@pytest.mark.parametrize(
    ("kind", "mask"),
    [
        ("all before", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]),
        ("all before", [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]),
        ("all before", [[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0]]),
        ("a window", [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]),
    ],
)
def test_other_masks_are_left_to_upstream(counted, kind, mask):
    model = MODELS[kind]()
    attention.install(model)
    model(input_ids=torch.randint(50, (2, 6)), attention_mask=torch.tensor(mask), use_cache=False)
    assert counted == [6, 6]


def test_other_models_and_what_is_saved_see_no_difference(tmp_path):
    models = [MODELS["all before"]() for _ in range(2)]
    attention.install(models[0])
    assert [model.config._attn_implementation for model in models] == [attention.NAME, "sdpa"]
    models[0].save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert LlamaForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
