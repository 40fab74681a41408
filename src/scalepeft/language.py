"""Language models trained by TRL: supervised fine-tuning on answers, and on preferred answers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DPOTrainer, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import use_adapter

from scalepeft import attention
from scalepeft import model as models
from scalepeft.adapters import copy_reference
from scalepeft.data import Corpus
from scalepeft.errors import UserError
from scalepeft.heads import add_fused_lm_head
from scalepeft.recipe import Recipe
from scalepeft.run import Run
from scalepeft.tasks import IGNORED
from scalepeft.trainer import RecipeTraining

PROBE_ROWS, PROBE_TOKENS = 8, 128
"""Rows, and tokens of each, to which a reloaded model must give the same answers: 8 x 128 x 128,000 logits are 0.5 GB."""


class CausalLM:
    """The next token, wherever the row's labels say that it counts."""

    figures: tuple[str, ...] = ("loss", "perplexity", "mean_token_accuracy")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.collator: Any = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, labels and attention_mask (rows x longest row)."""
        batch: dict[str, torch.Tensor] = self.collator(list(rows))
        return batch

    def ready(self, model: Any, run: Run) -> None:  # noqa: ARG002  # of Preference
        """Give a loaded model the head that `measure` uses, as the trainers give it to theirs: it never holds all logits."""
        add_fused_lm_head(_base(model), outputs=("log_probs", "is_top1"))

    def measure(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of each row, over its tokens that count: summed negative log-likelihood, tokens guessed right, tokens (rows x 3)."""
        found = model(**batch, use_cache=False, fused_lm_head=True)
        sums = (-found.log_probs.float().sum(-1), found.is_top1.sum(-1).float(), found.label_mask.sum(-1).float())
        return torch.stack(sums, dim=-1)

    def metrics(self, measured: NDArray[np.floating], references: NDArray[Any]) -> dict[str, float]:  # noqa: ARG002  # of classes
        """Means over all tokens that count, so that batches and processes make no difference."""
        loss, right, tokens = measured.sum(axis=0, dtype=np.float64)
        mean = float(loss / tokens)
        perplexity = math.exp(min(mean, 700))  # e^710 is no float
        return {"loss": mean, "perplexity": perplexity, "mean_token_accuracy": float(right / tokens)}

    def details(self, measured: NDArray[np.floating], references: NDArray[Any]) -> dict[str, Any]:  # noqa: ARG002  # of classes
        """The tokens that counted."""
        return {"tokens": int(measured[:, 2].sum(dtype=np.float64))}

    def tokens_of(self, row: Mapping[str, Any]) -> list[int]:
        """The token ids of a row."""
        return list(row["input_ids"])

    def sample(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """A row's prompt and the answer to it that the data give."""
        labels = list(row["labels"])
        start = next((place for place, label in enumerate(labels) if label != IGNORED), 0)
        end = next((place for place in range(start, len(labels)) if labels[place] == IGNORED), len(labels))
        return list(row["input_ids"])[:start], list(row["input_ids"])[start:end]

    def probe(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The beginnings of rows, all of the length of the shortest: what comes next depends on every one of their tokens."""
        beginnings = [self.tokens_of(row)[:PROBE_TOKENS] for row in rows[:PROBE_ROWS]]
        shortest = min(map(len, beginnings))
        ids = torch.tensor([tokens[:shortest] for tokens in beginnings])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Preference(CausalLM):
    """Which of two answers is the likelier under the trained model, against the one it started from."""

    figures: tuple[str, ...] = ("loss", "rewards_accuracies", "rewards_margins", "rewards_chosen", "rewards_rejected")

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, beta: float, pad_to_multiple_of: int | None) -> None:
        super().__init__(tokenizer)
        self.beta = beta
        self.reference: Any = None
        """The model that rewards are measured from: another one, or the trained one without its adapter or with `ref`."""
        self.collator = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=pad_to_multiple_of)

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Chosen answers, then rejected ones (2 x rows, longest answer), and labels (rows): 0, or IGNORED for no row."""
        labels = torch.tensor([row.get("labels", 0) for row in rows])
        return {**self.collator(list(rows)), "labels": labels}

    def ready(self, model: Any, run: Run) -> None:
        """The same, and the model it started from: its own base, with the adapter it continued from, or a second model."""
        super().ready(model, run)
        recipe, self.reference = run.recipe(), model
        if recipe.adapter is None:
            self.reference = models.load_base(recipe, [])[0].to(model.device).eval()
            super().ready(self.reference, run)
        elif "name_or_path" in recipe.adapter:
            source = {"revision": recipe.adapter["revision"]} if recipe.adapter.get("revision") else {}
            model.load_adapter(models.adapter_path(str(recipe.adapter["name_or_path"])), "ref", **source)

    def reference_log_probs(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of the chosen and the rejected answers by the model that rewards are measured from (rows each)."""
        peft = isinstance(self.reference, PeftModel)
        without = use_adapter(self.reference, "ref" if "ref" in self.reference.peft_config else None) if peft else nullcontext()
        with without:
            return self._log_probs(self.reference, batch)

    @staticmethod
    def _log_probs(model: Any, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORED)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        found = model(**inputs, labels=labels, use_cache=False, fused_lm_head=True)
        chosen, rejected = found.log_probs.float().sum(-1).chunk(2)
        return chosen, rejected

    def measure(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Of each pair: -log sigmoid of the margin (DPO's loss), both rewards, and whether it counts (rows x 4).

        A reward is beta times the log-ratio of the trained model to the reference, over the whole answers.
        """
        return self.rewarded(model, batch, self.reference_log_probs(batch))

    def rewarded(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], before: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """As `measure`, from the reference's log-probabilities as `reference_log_probs` gives them."""
        now = self._log_probs(model, batch)
        rewards = [self.beta * (after - reference) for after, reference in zip(now, before, strict=True)]
        losses = -torch.nn.functional.logsigmoid(rewards[0] - rewards[1])
        return torch.stack([losses, *rewards, (batch["labels"] != IGNORED).float()], dim=-1)

    def metrics(self, measured: NDArray[np.floating], references: NDArray[Any]) -> dict[str, float]:  # noqa: ARG002  # of classes
        """Means over the pairs, under TRL's names."""
        pairs = measured[measured[:, 3] > 0].astype(np.float64)
        loss, chosen, rejected = pairs[:, :3].mean(axis=0)
        return {
            "loss": float(loss),
            "rewards_accuracies": float((pairs[:, 1] > pairs[:, 2]).mean()),
            "rewards_margins": float(chosen - rejected),
            "rewards_chosen": float(chosen),
            "rewards_rejected": float(rejected),
        }

    def details(self, measured: NDArray[np.floating], references: NDArray[Any]) -> dict[str, Any]:  # noqa: ARG002  # of classes
        """The pairs that counted."""
        return {"pairs": int((measured[:, 3] > 0).sum())}

    def tokens_of(self, row: Mapping[str, Any]) -> list[int]:
        """The prompt with the chosen answer."""
        return [*row["prompt_ids"], *row["chosen_ids"]]

    def sample(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """A row's prompt and the chosen answer."""
        return list(row["prompt_ids"]), list(row["chosen_ids"])


class LanguageTraining(RecipeTraining):
    """What the trainers of language models share: evaluation without logits, and no files of upstream's."""

    def adopt(self, recipe: Recipe, task: Any, run: Run, corpus: Corpus) -> None:
        """The same, and the faster attention of CPUs."""
        super().adopt(recipe, task, run, corpus)
        if self.args.device.type == "cpu":
            attention.install(_base(self.model))

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,  # noqa: ARG002  # as upstream passes it
        ignore_keys: Any = None,  # noqa: ARG002
    ) -> tuple[None, torch.Tensor, torch.Tensor]:
        """What the task measures of each row in place of logits: upstream's mean of batches depends on how rows are batched."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            measured = self.task.measure(model, inputs)
        return None, measured, measured[:, -1]

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: upstream would write one into the run directory at each checkpoint."""


class SupervisedTrainer(LanguageTraining, SFTTrainer):  # type: ignore[misc]
    """TRL's SFTTrainer on rows that are prepared already."""

    def __init__(self, recipe: Recipe, *, model: Any, args: Any, task: CausalLM, run: Run, corpus: Corpus) -> None:
        # what these ask for has been done to the rows
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.assistant_only_loss, args.chat_template_path = False, None
        if args.padding_free and not args.packing:
            args.max_length = None
        with _adapter_dtype_kept(model):
            super().__init__(
                model=model,
                args=args,
                processing_class=task.tokenizer,
                train_dataset=corpus.first_seen,
                eval_dataset={name: prepared.rows for name, prepared in corpus.evaluation.items()} or None,
                compute_metrics=self._compute_metrics,
            )
        add_fused_lm_head(_base(self.model), outputs=("log_probs", "entropy", "is_top1"))
        self._sums: dict[str, torch.Tensor] = {}
        self.adopt(recipe, task, run, corpus)
        if self.padding_free:
            self.add_callback(Isolation(self, task))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Upstream's loss, summed over tokens and divided by those of the whole step, and the adapter's own part.

        Upstream also gathers and reads its figures of every micro-batch, and the device waits for that. Here they are summed
        where they are, and `log` reads them.
        """
        own = self.label_smoother is not None or self.aux_loss_enabled or self.accelerator.parallelism_config is not None
        if own or return_outputs or num_items_in_batch is None:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        else:
            found = model(**inputs, use_cache=False, fused_lm_head=True)
            losses = -found.log_probs
            if self.args.loss_type == "dft":
                losses = losses * found.log_probs.exp().detach()
            loss = losses.sum() / torch.as_tensor(num_items_in_batch).clamp(min=1)
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
            self._add(found, inputs)
        if num_items_in_batch is None or return_outputs:
            return loss
        tokens = (inputs["labels"] != IGNORED).sum()
        return loss + self.regularisation(tokens / num_items_in_batch * self.accelerator.num_processes)

    def _add(self, found: Any, inputs: Mapping[str, Any]) -> None:
        seen = (
            inputs["attention_mask"].sum()
            if "attention_mask" in inputs
            else found.label_mask.new_tensor(inputs["input_ids"].numel(), dtype=torch.int64)
        )
        sums = {
            "scored": found.label_mask.sum(),
            "entropy": found.entropy.detach().sum(),
            "right": found.is_top1.sum(),
            "seen": seen,
        }
        self._sums = {name: value + self._sums.get(name, 0) for name, value in sums.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Upstream's entry, whose entropy and token accuracy are means over the tokens in the loss since the last one."""
        if self.model.training and self._sums:
            of = {name: self.accelerator.gather(value.reshape(1)).sum().item() for name, value in self._sums.items()}
            self._sums = {}
            self._total_train_tokens += int(of["seen"])
            scored = max(of["scored"], 1)
            means = {"entropy": of["entropy"] / scored, "mean_token_accuracy": of["right"] / scored}
            self._metrics["train"] |= {
                name: [value] for name, value in {**means, "num_tokens": self._total_train_tokens}.items()
            }
        super().log(logs, start_time)


class PreferenceTrainer(LanguageTraining, DPOTrainer):  # type: ignore[misc]
    """TRL's DPOTrainer on pairs that are prepared already."""

    loss_is_scaled_for_ga = True  # in compute_loss

    def __init__(self, recipe: Recipe, *, model: Any, args: Any, task: Preference, run: Run, corpus: Corpus) -> None:
        with _adapter_dtype_kept(model):
            super().__init__(
                model=model,
                # of a whole model TRL would load a second one by name, without the recipe's revision and configuration
                ref_model=models.load_base(recipe, [])[0] if recipe.adapter is None else None,
                args=args,
                processing_class=task.tokenizer,
                data_collator=task.collate,
                train_dataset=corpus.first_seen,
                eval_dataset={name: prepared.rows for name, prepared in corpus.evaluation.items()} or None,
                compute_metrics=self._compute_metrics,
            )
        weighting = ("log_sum_sq_probs",) if self.use_weighting else ()
        add_fused_lm_head(_base(self.model), outputs=("log_probs", "entropy", "mean_logits", "is_top1", *weighting))
        copy_reference(self.model)
        task.reference = self.ref_model or self.model
        self.adopt(recipe, task, run, corpus)

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device) -> torch.Tensor:
        pairs = torch.stack([(batch["labels"] != IGNORED).sum() for batch in batch_samples]).sum().to(device)
        total: torch.Tensor = self.accelerator.gather(pairs).sum()
        return total.clamp(min=1)  # as RecipeTraining has it

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,  # noqa: ARG002  # nobody asks for them
        num_items_in_batch: Any = None,
    ) -> Any:
        """Upstream's mean over the micro-batch, weighted with its share of the step's pairs, and the adapter's own part.

        Upstream's mean of means depends on the layout where a step's micro-batches differ in size, as an epoch's last do. The
        losses that compare pairs with each other (aot, aot_unpaired) depend on it all the same.
        """
        share = (inputs.pop("labels") != IGNORED).sum() / num_items_in_batch * self.accelerator.num_processes
        with _own_rows(self.accelerator):
            loss = super().compute_loss(model, inputs)
        return loss * share + self.regularisation(share)


class Isolation(TrainerCallback):  # type: ignore[misc]
    """The proof, before the first step, that documents in one packed row do not see each other."""

    def __init__(self, trainer: SupervisedTrainer, task: CausalLM) -> None:
        self.trainer, self.task = trainer, task

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Compare a document's answers behind another one with those to it alone. Raises UserError when they differ."""
        trainer, model = self.trainer, self.trainer.model_wrapped
        ids = torch.tensor(self.task.tokens_of(trainer.train_dataset[0])[:32])
        first, second = ids.tolist(), ids.flip(0).tolist()
        collate, training = trainer.data_collator, model.training
        model.eval()
        with torch.no_grad(), trainer.compute_loss_context_manager():
            rows = {"both": [{"input_ids": first}, {"input_ids": second}], "alone": [{"input_ids": second}]}
            found = {name: self._logits(collate(of)) for name, of in rows.items()}
        model.train(training)
        behind = found["both"][-len(second) :]
        gap = (behind - found["alone"]).abs().max().item() / max(1.0, found["alone"].abs().max().item())
        # by what computes: accelerate gives float32 whatever that was
        if not gap <= _GAP[_MIXED.get(trainer.recipe.precision, trainer.model.dtype)]:
            attention = trainer.model.config._attn_implementation  # noqa: SLF001  # it has no public name
            told = f"{type(trainer.model.config).__name__} with attn_implementation {attention!r} lets a packed document see"
            hint = "set training.packing: false, or another model.attn_implementation"
            raise UserError(f"training.packing: {told} the one before it (logits differ by {gap:.1g} of the largest); {hint}")

    def _logits(self, batch: dict[str, Any]) -> torch.Tensor:
        batch.pop("labels")
        inputs = self.trainer._prepare_inputs(batch)  # noqa: SLF001  # upstream's way of moving a batch to the device
        logits: torch.Tensor = self.trainer.model_wrapped(**inputs, use_cache=False).logits[0]
        return logits


_MIXED = {"bf16": torch.bfloat16, "fp16": torch.float16}
_GAP = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest relative difference of logits that rounding explains, by the dtype that computes."""


def _base(model: Any) -> Any:
    return getattr(model, "get_base_model", lambda: model)()


@contextlib.contextmanager
def _adapter_dtype_kept(model: Any) -> Iterator[None]:
    """Undo TRL's rounding of a 4-bit model's adapter to bf16, whose 8 bits lose the updates of a usual learning rate."""
    before = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before and parameter.dtype != before[name].dtype:
            parameter.data = before[name]


@contextlib.contextmanager
def _own_rows(accelerator: Any) -> Iterator[None]:
    """DPOTrainer's figures of a micro-batch from this process's rows alone.

    It gathers them from all processes, which hangs when these hold different numbers of rows, as an epoch's last ones do.
    """
    gathering = ("gather", "gather_for_metrics")
    for name in gathering:
        setattr(accelerator, name, lambda tensors, *_, **__: tensors)
    try:
        yield
    finally:
        for name in gathering:
            delattr(accelerator, name)
