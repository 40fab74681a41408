"""Regression by transformers' own word for it: model.config.problem_type."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from scalepeft import predict, recipe, tasks
from scalepeft.errors import UserError

REGRESSION = {"config": {"problem_type": "regression"}}


@pytest.fixture
def rows(tmp_path):
    """Texts whose score is how often `good` stands in them, beside `bad`."""
    for name, count in (("train", 70), ("test", 30)):
        with (tmp_path / f"{name}.csv").open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["text", "label"])
            writer.writerows([" ".join(["good"] * (i % 5) + ["bad"] * (4 - i % 5)), i % 5 / 2] for i in range(count))
    return tmp_path


@pytest.fixture
def scored(toy, rows):
    return toy(
        "scored",
        model=REGRESSION,
        data={"train": {"path": str(rows / "train.csv")}, "label_names": None, "holdout": {"size": 10}},
        training={"load_best_model_at_end": True, "metric_for_best_model": "pearson", "num_train_epochs": 8},
    )


def test_a_regression_learns_and_its_saved_weights_predict_the_same(train, scored, rows):
    run = train(scored)
    assert run.record["status"] == "complete"
    assert run.record["labels"] == ["score"]
    after = run.record["metrics"]["after"]
    assert set(after) == {"pearson", "spearman", "loss"}
    assert after["pearson"] > 0.9 > run.record["metrics"]["before"]["pearson"]
    again, figures = predict.evaluate(run)["test"], run.record["evaluation"]["test"]["after"]
    # the file says some texts more than once, and what rounding makes of their scores is ranked, too
    assert again.pop("spearman") == pytest.approx(figures.pop("spearman"), abs=5e-3)
    assert again == pytest.approx(figures, abs=1e-5)
    predict.predict(run, rows / "test.csv", rows / "scores.csv")
    with (rows / "scores.csv").open(encoding="utf-8") as stream:
        predicted = [float(line["score"]) for line in csv.DictReader(stream)]
    truth = [i % 5 / 2 for i in range(30)]
    assert pearsonr(predicted, truth)[0] == pytest.approx(again["pearson"], abs=1e-4)


def test_the_loss_is_the_mean_squared_error_however_the_batch_is_divided(tiny_tokenizer):
    task = tasks.SequenceRegression(tiny_tokenizer, ["score"])
    logits, labels = torch.randn(6, 1), torch.tensor([0.5, 1.0, -2.0, 0.0, 3.5, tasks.IGNORED])
    whole = task.loss({"logits": logits}, labels, 5)
    torch.testing.assert_close(whole, torch.nn.functional.mse_loss(logits[:5, 0], labels[:5]))
    parts = [task.loss({"logits": logits[i : i + 2]}, labels[i : i + 2], 5) for i in (0, 2, 4)]
    torch.testing.assert_close(sum(parts), whole)


def test_the_metrics_are_scipys_and_constant_predictions_have_none(tiny_tokenizer):
    task = tasks.SequenceRegression(tiny_tokenizer, ["score"])
    draw = np.random.default_rng(0)
    predicted, truth = draw.normal(size=20), draw.normal(size=20)
    found = task.metrics(np.stack([predicted, (predicted - truth) ** 2], axis=-1), truth)
    assert found["pearson"] == pytest.approx(pearsonr(predicted, truth)[0])
    assert found["spearman"] == pytest.approx(spearmanr(predicted, truth)[0])
    assert found["loss"] == pytest.approx(((predicted - truth) ** 2).mean())
    assert task.metrics(np.zeros((20, 2)), truth)["pearson"] == 0.0


def test_a_label_that_is_no_number_is_named(train, scored, rows):
    with (rows / "train.csv").open("a", encoding="utf-8") as stream:
        stream.write("good film,high\ngood,nan\n")
    with pytest.raises(UserError) as caught:
        train(scored)
    assert "row 71: label is not a number ('high')" in str(caught.value)
    assert "row 72: label is not a number" in str(caught.value)


def test_other_problem_types_are_refused(toy):
    with pytest.raises(UserError, match="'multi_label_classification' is not supported"):
        recipe.load(toy(model={"config": {"problem_type": "multi_label_classification"}}))
