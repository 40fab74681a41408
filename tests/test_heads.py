"""The head on a CPU: what TRL's gives, from the targets alone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl.trainer.utils import add_fused_lm_head as upstream

from scalepeft import heads
from scalepeft.heads import LogProbs, add_fused_lm_head

OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    """Several tiles to a batch, and a last one that is not full."""
    monkeypatch.setattr(heads, "_TILE", 7 * 40)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Three rows of 12 tokens, of which some count, and none in the last row."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 30, (3, 12), generator=drawn)
    labels = ids.where(torch.rand(3, 12, generator=drawn) < 0.6, torch.tensor(-100))
    labels[2] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def found(add, folder, batch, *, trained=False, config=(), dtype="float32"):
    """Outputs of a head over a tiny model, and the gradients of DFT's loss."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(requires_grad=trained)
    for name, value in dict(config).items():
        setattr(model.config, name, value)
    norm = model.model.norm.weight.requires_grad_()
    add(model, outputs=OUTPUTS)
    outputs = model(**batch, fused_lm_head=True)
    loss = -(outputs.log_probs * outputs.log_probs.exp().detach()).sum()
    loss.backward()
    return outputs, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, norm


@pytest.mark.parametrize(
    ("trained", "config"), [(False, {}), (True, {}), (False, {"final_logit_softcapping": 3.0}), (False, {"logit_scale": 0.5})]
)
def test_outputs_and_gradients_are_those_of_trl(tiny_lm, batch, trained, config):
    ours, gradients, _ = found(add_fused_lm_head, tiny_lm, batch, trained=trained, config=config)
    theirs, wanted, _ = found(upstream, tiny_lm, batch, trained=trained, config=config)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert torch.equal(ours.is_top1, theirs.is_top1)
    for name in ("loss", "log_probs", "entropy", "mean_logits"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=2e-6)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_in_bf16_it_is_as_near_to_the_truth_as_trls(tiny_lm, batch):
    """Both round the products to 8 bits; the log-probabilities of float32 lie beside."""
    true, _, _ = found(upstream, tiny_lm, batch)
    apart = [
        (found(add, tiny_lm, batch, dtype="bfloat16")[0].log_probs - true.log_probs).abs().max()
        for add in (add_fused_lm_head, upstream)
    ]
    assert apart[0] <= 1.5 * apart[1]


def test_a_batch_without_targets_gives_zeros(tiny_lm, batch):
    batch["labels"][:] = -100
    outputs, gradients, norm = found(add_fused_lm_head, tiny_lm, batch)
    assert outputs.loss == 0
    assert not norm.grad.any()
    assert gradients


def test_only_targets_are_projected(tiny_lm, batch, monkeypatch):
    seen = []
    apply = LogProbs.apply
    monkeypatch.setattr(LogProbs, "apply", lambda hidden, *rest: seen.append(len(hidden)) or apply(hidden, *rest))
    found(add_fused_lm_head, tiny_lm, batch)
    assert seen == [int((batch["labels"][:, 1:] != -100).sum())]


def test_the_gradient_is_that_of_differences():
    drawn = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 6, generator=drawn, dtype=torch.float32) for n in (5, 40))
    targets = torch.randint(40, (5,), generator=drawn)
    states = hidden.clone().requires_grad_()
    direction = torch.randn(5, 6, generator=drawn)
    LogProbs.apply(states, weight, targets)[0].sum().backward()
    step = 1e-2
    ahead, behind = (LogProbs.apply(hidden + s * step * direction, weight, targets)[0].double() for s in (1, -1))
    slope = (ahead - behind).sum() / (2 * step)
    assert (states.grad * direction).sum().item() == pytest.approx(slope.item(), rel=1e-3)
