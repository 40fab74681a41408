"""Claims about collation, loss and metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from scalepeft import tasks
from scalepeft.tasks import IGNORED, SequenceClassification

NAMES = ["a", "b", "c"]


@pytest.fixture
def task(tiny_tokenizer) -> SequenceClassification:
    return SequenceClassification(tiny_tokenizer, NAMES)


def a_batch(rows: int = 12, classes: int = 3, ignored: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    logits = torch.randn(rows, classes, generator=generator) * 3
    labels = torch.randint(classes, (rows,), generator=generator)
    labels[:ignored] = IGNORED
    return logits.requires_grad_(), labels


# --- collation -----------------------------------------------------------------------------------------------------


def test_rows_are_padded_to_the_longest_with_the_tokenizers_own_token(tiny_tokenizer):
    tiny_tokenizer = type(tiny_tokenizer)(tokenizer_object=tiny_tokenizer.backend_tokenizer, pad_token="good")  # noqa: S106
    tiny_tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    pad = tiny_tokenizer.convert_tokens_to_ids("good")
    assert pad != 0
    rows = [
        {"input_ids": [2, 7, 3], "token_type_ids": [0, 0, 0], "labels": 1},
        {"input_ids": [2, 7, 3, 8, 3], "token_type_ids": [0, 0, 0, 1, 1], "labels": 0},
    ]
    batch = SequenceClassification(tiny_tokenizer, NAMES).collate(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[2, 7, 3, pad, pad], [2, 7, 3, 8, 3]],
        "token_type_ids": [[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
        "labels": [1, 0],
    }


def test_rows_without_token_types_get_none(task):
    batch = task.collate([{"input_ids": [2, 3], "labels": 2}, {"input_ids": [2], "labels": IGNORED}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["labels"].tolist() == [2, IGNORED]


# --- loss ----------------------------------------------------------------------------------------------------------


def test_the_loss_is_torchs_mean_cross_entropy(task):
    logits, labels = a_batch()
    assert torch.equal(
        task.loss({"logits": logits}, labels, torch.tensor(12)), torch.nn.functional.cross_entropy(logits, labels)
    )
    assert torch.equal(task.loss({"logits": logits}, labels), torch.nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("parts", [[4, 4, 4], [1, 11], [5, 5, 2]])
def test_the_losses_of_accumulated_parts_add_up_to_that_of_the_whole(task, parts):
    logits, labels = a_batch(ignored=1)
    whole = task.loss({"logits": logits}, labels, num_items_in_batch=11)
    (gradient,) = torch.autograd.grad(whole, logits)
    pieces = zip(logits.split(parts), labels.split(parts), strict=True)
    summed = sum(task.loss({"logits": piece}, of, num_items_in_batch=torch.tensor(11)) for piece, of in pieces)
    torch.testing.assert_close(summed, whole)
    torch.testing.assert_close(torch.autograd.grad(summed, logits)[0], gradient)


def test_label_smoothing_is_upstreams(tiny_tokenizer):
    from transformers.trainer_pt_utils import LabelSmoother

    logits, labels = a_batch(ignored=2)
    ours = SequenceClassification(tiny_tokenizer, NAMES, label_smoothing=0.2).loss({"logits": logits}, labels, 10)
    theirs = LabelSmoother(epsilon=0.2)({"logits": logits}, labels)
    torch.testing.assert_close(ours, theirs)


def test_the_loss_of_half_precision_logits_is_taken_in_full(task):
    logits, labels = a_batch()
    half = logits.detach().to(torch.bfloat16)
    found = task.loss({"logits": half}, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, torch.nn.functional.cross_entropy(half.float(), labels))


def test_ignored_rows_count_nowhere(task):
    logits, labels = a_batch(ignored=5)
    kept = slice(5, None)
    torch.testing.assert_close(
        task.loss({"logits": logits}, labels), torch.nn.functional.cross_entropy(logits[kept], labels[kept])
    )
    reduced = task.reduce(logits.detach(), labels).numpy()
    truth = labels.numpy()
    assert task.metrics(reduced, truth) == task.metrics(reduced[kept], truth[kept])
    assert task.details(reduced, truth) == task.details(reduced[kept], truth[kept])


def test_a_part_of_ignored_rows_alone_adds_nothing(task):
    logits, labels = a_batch(rows=3, ignored=3)
    loss = task.loss({"logits": logits}, labels, num_items_in_batch=13)
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


# --- metrics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 1000])
def test_an_evaluation_gathers_two_numbers_a_row(task, classes):
    logits, labels = a_batch(rows=7, classes=classes)
    reduced = task.reduce(logits.detach(), labels)
    assert reduced.shape == (7, 2)
    assert reduced[:, 0].tolist() == logits.argmax(-1).tolist()
    expected = torch.nn.functional.cross_entropy(logits.detach(), labels, reduction="none")
    torch.testing.assert_close(reduced[:, 1], expected)
    assert torch.equal(task.reduce((logits.detach(), torch.ones(1)), labels), reduced)


def test_metrics_are_scikit_learns(task):
    logits, labels = a_batch(rows=90, ignored=7)
    labels[labels == 2] = 1  # a class that no row has
    reduced = task.reduce(logits.detach(), labels).numpy()
    truth, predicted = labels[7:].numpy(), logits[7:].argmax(-1).numpy()
    expected = {"accuracy": sklearn_metrics.accuracy_score(truth, predicted)}
    for average in ("macro", "weighted"):
        for name in ("f1", "precision", "recall"):
            function = getattr(sklearn_metrics, f"{name}_score")
            expected[f"{name}_{average}"] = function(truth, predicted, average=average, zero_division=0)
    expected["matthews_correlation"] = sklearn_metrics.matthews_corrcoef(truth, predicted)
    expected["loss"] = torch.nn.functional.cross_entropy(logits[7:], labels[7:]).item()
    found = task.metrics(reduced, labels.numpy())
    assert found == pytest.approx(expected, rel=1e-6)
    assert found["recall_weighted"] == pytest.approx(found["accuracy"])
    assert all(type(value) is float for value in found.values())


def test_the_confusion_matrix_has_the_truth_in_rows_and_every_class(task):
    truth = np.array([0, 0, 1, 1, 1])
    reduced = np.array([[0, 0.1], [1, 0.1], [1, 0.1], [1, 0.1], [0, 0.1]], dtype=np.float32)
    found = task.details(reduced, truth)
    assert found["confusion"] == [[1, 1, 0], [1, 2, 0], [0, 0, 0]]
    assert found["per_class"]["a"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "rows": 2}
    assert found["per_class"]["b"]["recall"] == pytest.approx(2 / 3)
    assert found["per_class"]["c"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "rows": 0}


def test_of_many_classes_each_has_its_figures_and_no_matrix_is_made(tiny_tokenizer):
    draw = np.random.default_rng(0)
    many = SequenceClassification(tiny_tokenizer, [str(n) for n in range(tasks.MATRIX_CLASSES + 1)])
    truth, predicted = draw.integers(0, 90, 400), draw.integers(50, len(many.labels), 400)
    found = many.details(np.stack([predicted, np.ones(400)], axis=1).astype(np.float32), truth)
    assert list(found) == ["per_class"]
    expected = sklearn_metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(len(many.labels)), zero_division=0
    )
    table = [[of[name] for of in found["per_class"].values()] for name in ("precision", "recall", "f1", "rows")]
    assert np.allclose(table, expected, rtol=1e-12)


def test_every_task_of_the_recipe_language_is_there():
    import typing

    from scalepeft import upstream
    from scalepeft.recipe import Recipe

    assert set(upstream.TASK_ARGUMENTS) == set(typing.get_args(typing.get_type_hints(Recipe)["task"]))
