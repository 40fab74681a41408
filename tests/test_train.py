"""Claims about training as a whole: a recipe goes in, a verified adapter comes out. In this process, on a tiny model."""

from __future__ import annotations

import csv
import json
import math
import pickletools
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from scalepeft import predict
from scalepeft import recipe as recipes
from scalepeft.console import quiet_upstream
from scalepeft.errors import UserError
from scalepeft.run import Run

LABELS = ["negative", "positive"]


def trajectory(run: Run) -> list[tuple[float, ...]]:
    """Loss, gradient norm and learning rate of every step."""
    return [(x["step"], x["loss"], x["grad_norm"], x["learning_rate"]) for x in run.lines() if "loss" in x]


def evaluations(run: Run, key: str = "eval_loss") -> dict[int, float]:
    return {line["step"]: line[key] for line in run.lines() if key in line}


def adapter(run: Run) -> bytes:
    return (run.path / "adapter/adapter_model.safetensors").read_bytes()


def same_training(a: Run, b: Run) -> bool:
    return trajectory(a) == trajectory(b) and adapter(a) == adapter(b)


def flat(found: dict) -> dict[str, float]:
    """An evaluation's figures, table and matrix as one mapping of numbers."""
    return {
        **{k: v for k, v in found.items() if isinstance(v, float)},
        **{f"{name} {k}": v for name, of in found["per_class"].items() for k, v in of.items()},
        **{f"{i} {j}": count for i, row in enumerate(found["confusion"]) for j, count in enumerate(row)},
    }


def stamps(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def refusal(train, recipe: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        train(recipe, *overrides)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def crash(monkeypatch):
    """Training breaks down in the middle of the micro-batch of a number."""
    from scalepeft.trainer import RecipeTraining

    def at(number: int) -> None:
        done, step = iter(range(1, number)), RecipeTraining.training_step

        def training_step(*arguments, **options):
            if next(done, None) is None:
                raise RuntimeError("the machine is on fire")
            return step(*arguments, **options)

        monkeypatch.setattr(RecipeTraining, "training_step", training_step)

    yield at
    monkeypatch.undo()


# --- what a run leaves ---------------------------------------------------------------------------------------------


def test_run_json_has_the_stable_names(complete):
    record = json.loads((complete.path / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["reason"] is None
    # 4 rows of A and 4 columns of B for each of 7 linear layers, the pooler's included, and a head of 32 x 2 + 2
    attention, wide, layers = 4 * (32 + 32), 4 * (32 + 64), 2
    trained = layers * (4 * attention + 2 * wide) + attention + 66
    backbone = sum(t.numel() for t in load_file(Path(complete.recipe().model.name_or_path) / "model.safetensors").values())
    assert record["parameters"] == {"trainable": trained, "total": backbone + trained + 66}  # peft keeps the new head as it was
    for when in ("before", "after"):
        found = record["metrics"][when]
        assert set(found) == {
            "loss", "accuracy", "f1_macro", "f1_weighted", "precision_macro", "precision_weighted", "recall_macro",
            "recall_weighted", "matthews_correlation",
        }  # fmt: skip
        assert {k: record["evaluation"]["test"][when][k] for k in found} == found
        assert sum(map(sum, record["evaluation"]["test"][when]["confusion"])) == 30
    assert (record["step"], record["max_steps"]) == (20, 20)
    assert record["seconds"] > 0
    assert record["samples_per_second"] == pytest.approx(4 * 70 / record["seconds"], rel=0.01)
    assert 2**26 < record["peak_memory_bytes"] < 2**36
    assert record["labels"] == LABELS
    assert record["layout"]["global_batch_size"] == 16
    assert record["data"]["rows"] == {"train": 70, "test": 30}


def test_every_parameter_that_peft_counts_is_counted(complete):
    from scalepeft import model

    quiet_upstream()
    built, new = model.build(complete.recipe(), LABELS, total_steps=20)
    counted = dict(zip(("trainable", "total"), built.get_nb_trainable_parameters(), strict=True))
    assert complete.record["parameters"] == counted == model.parameters(built)
    assert new == ["classifier.bias", "classifier.weight"]


def test_every_step_and_every_evaluation_is_a_line(complete):
    lines = complete.lines()
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 21))
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 5, 10, 15, 20]
    assert all(math.isfinite(v) for line in lines for v in line.values())
    assert [line["learning_rate"] for line in lines if "loss" in line] == pytest.approx(
        [1e-2 * (20 - s) / 20 for s in range(20)]
    )
    rows = [min(16 * (step % 5 or 5), 70) + 70 * ((step - 1) // 5) for step in range(1, 21)]
    assert [line["epoch"] for line in lines if "loss" in line] == pytest.approx([r / 70 for r in rows], abs=1e-6)
    final = {k.removeprefix("eval_"): v for k, v in lines[-1].items() if k.startswith("eval_")}
    assert {k: final[k] for k in complete.record["metrics"]["after"]} == complete.record["metrics"]["after"]


def test_the_recipe_is_kept_verbatim_and_resolved(toy, train):
    path = toy(training={"num_train_epochs": 1})
    path.write_text("# what this is for\n" + path.read_text())
    run = train(path, "adapter.r=2")
    assert (run.path / "recipe.yaml").read_bytes() == path.read_bytes()
    assert yaml.safe_load((run.path / "resolved.yaml").read_text())["adapter"]["r"] == 2
    assert run.recipe().adapter["r"] == 2


def test_no_pickle_and_no_secret_anywhere_and_nothing_half_written(toy, train, monkeypatch):
    secret = "hf_thisIsASecretThatMustNotLeak0123"  # noqa: S105  # one made up
    monkeypatch.setenv("HF_TOKEN", secret)
    run = train(toy())
    files = [p for p in run.path.parent.rglob("*") if p.is_file()]
    assert len(files) > 40
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content, path
        assert path.suffix not in {".bin", ".pt", ".pth", ".pkl", ".pickle", ".part"}, path
        assert b"PK\x03\x04" not in content[:4], path
        assert not is_pickle(content), path


def is_pickle(content: bytes) -> bool:
    try:
        return bool(content) and len(list(pickletools.genops(content))) > 0
    except (ValueError, UnicodeDecodeError, OverflowError):
        return False


def test_a_pickle_would_be_found():
    import pickle

    assert is_pickle(pickle.dumps({"a": [1]}))


def test_the_head_is_trained_and_saved_with_the_adapter_and_the_label_names(complete):
    saved = load_file(complete.path / "adapter/adapter_model.safetensors")
    heads = [name for name in saved if "classifier" in name]
    assert len(heads) == 2
    early = load_file(complete.path / "checkpoint-5/adapter_model.safetensors")
    assert all((early[name] != saved[name]).any() for name in heads)
    assert all((early[name] != saved[name]).any() for name in saved if "lora_B" in name)
    config = json.loads((complete.path / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}


def test_the_adapter_loads_with_upstreams_own_words(complete, tiny_model):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    quiet_upstream()
    config = AutoConfig.from_pretrained(complete.path)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, config=config)
    model = PeftModel.from_pretrained(base, complete.path / "adapter").eval()
    tokens = AutoTokenizer.from_pretrained(complete.path / "adapter")(["a good film"], return_tensors="pt")
    with torch.inference_mode():
        assert model.config.id2label[int(model(**tokens).logits.argmax())] == "positive"


def test_the_adapter_learns(complete):
    before, after = (complete.record["metrics"][when] for when in ("before", "after"))
    assert before["accuracy"] < 0.7
    assert after["accuracy"] >= 0.9
    assert after["loss"] < before["loss"] / 2


def test_the_metrics_after_are_those_of_the_saved_weights(complete):
    assert flat(predict.evaluate(complete)["test"]) == pytest.approx(flat(complete.record["evaluation"]["test"]["after"]))


def test_the_curves_have_the_numbers(complete):
    assert (complete.path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
    with (complete.path / "curves.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [{k: float(v) for k, v in row.items() if v} for row in rows] == complete.lines()


# --- the same recipe, the same numbers -----------------------------------------------------------------------------


def test_the_same_recipe_twice_is_the_same_to_the_bit(toy, train, complete):
    again = train(toy())
    assert same_training(again, complete)
    assert evaluations(again) == evaluations(complete)


def test_another_seed_is_another_run(toy, train, complete):
    assert not same_training(train(toy(training={"seed": 1})), complete)


@pytest.mark.parametrize(
    "observing",
    [
        {"eval_strategy": "steps", "eval_steps": 1},
        {"eval_strategy": "no", "eval_on_start": False},
        {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1},
        {"save_strategy": "no"},
        {"per_device_eval_batch_size": 3},
    ],
    ids=str,
)
def test_watching_a_run_does_not_change_it(toy, train, complete, observing):
    assert same_training(train(toy(training=observing)), complete)


def test_a_launch_files_precision_does_not_slip_in(toy, train, complete, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    run = train(toy())
    assert run.record["layout"]["precision"] == "float32"
    assert same_training(run, complete)


def test_grouping_by_length_pads_less_and_learns(toy, train, capsys):
    run = train(toy(training={"train_sampling_strategy": "group_by_length"}))
    assert run.record["metrics"]["after"]["accuracy"] > 0.7
    told = capsys.readouterr().out
    assert float(told.partition("padding")[2].partition("%")[0]) < 60


def test_a_loss_that_is_nan_is_logged_as_that(toy, train):
    changes = {"learning_rate": 1e30, "max_steps": 3, "eval_on_start": False, "eval_strategy": "no", "save_strategy": "no"}
    run = train(toy(data={"evaluation": None}, training=changes), verify=False)
    assert [math.isfinite(line["loss"]) for line in run.lines()] == [True, False, False]


def test_activation_checkpointing_gives_the_same_numbers(toy, train):
    run = train(toy(training={"activation_checkpointing": True, "num_train_epochs": 1, "lr_scheduler_type": "constant"}))
    plain = train(toy("plain", training={"num_train_epochs": 1, "lr_scheduler_type": "constant"}))
    assert [line[1:3] for line in trajectory(run)] == [pytest.approx(line[1:3], rel=1e-5) for line in trajectory(plain)]
    assert len(trajectory(run)) == 5


def test_label_smoothing_is_in_the_training_loss_only(toy, train, complete):
    run = train(toy(training={"label_smoothing_factor": 0.3}))
    assert trajectory(run)[0][1] != trajectory(complete)[0][1]
    assert evaluations(run)[0] == evaluations(complete)[0]


# --- what a recipe may ask for -------------------------------------------------------------------------------------


def test_ia3_trains_and_verifies(toy, train):
    run = train(toy(adapter={"peft_type": "IA3"}, training={"learning_rate": 0.05}))
    assert run.record["status"] == "complete"
    assert (
        run.record["parameters"]["trainable"] == 2 * (32 + 32 + 32 + 64) + 66
    )  # keys, values and the inputs of both dense layers
    assert trajectory(run)[-1][1] < trajectory(run)[0][1]


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_and_the_longest_rows_share_the_positions(toy, train, kind):
    long = train(toy(adapter={"peft_type": kind, "num_virtual_tokens": 4}, training={"max_steps": 2}))
    assert long.record["status"] == "complete"


def test_full_fine_tuning_saves_a_whole_model(toy, train):
    run = train(toy(adapter=None, training={"learning_rate": 1e-3}))
    record = run.record
    assert record["status"] == "complete"
    assert record["parameters"]["trainable"] == record["parameters"]["total"]
    assert run.weights == run.path / "model"
    assert not (run.path / "adapter").exists()
    config = json.loads((run.path / "model/config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert flat(predict.evaluate(run)["test"]) == pytest.approx(flat(record["evaluation"]["test"]["after"]))
    assert not [p for p in run.path.rglob("*") if p.suffix == ".bin"]


@pytest.mark.parametrize("where", ["", "adapter"])
def test_an_adapter_is_continued_from_its_weights(toy, train, complete, where):
    run = train(toy(adapter={"name_or_path": str(complete.path / where)}, training={"learning_rate": 1e-4}))
    assert run.record["metrics"]["before"] == pytest.approx(complete.record["metrics"]["after"])
    assert run.record["parameters"] == complete.record["parameters"]
    assert adapter(run) != adapter(complete)


def test_sets_are_evaluated_under_their_names(toy, train, tmp_path):
    sets = {"test": {"path": str(tmp_path / "test.csv")}, "seen": {"path": str(tmp_path / "train.csv")}}
    run = train(toy(data={"evaluation": sets}, training={"num_train_epochs": 1}))
    line = run.lines()[-2] | run.lines()[-1]
    assert line["eval_accuracy"] == run.record["evaluation"]["test"]["after"]["accuracy"]
    assert line["eval_seen_accuracy"] == run.record["evaluation"]["seen"]["after"]["accuracy"]
    assert not any(k.startswith("eval_test_") for k in line)
    assert run.record["metrics"]["after"]["loss"] == line["eval_loss"] != line["eval_seen_loss"]
    assert {n: sum(map(sum, e["after"]["confusion"])) for n, e in run.record["evaluation"].items()} == {"test": 30, "seen": 70}


def test_a_run_without_evaluation_is_verified_on_training_rows(toy, train):
    run = train(toy(data={"evaluation": None}, training={"eval_strategy": None, "eval_on_start": None, "num_train_epochs": 1}))
    assert run.record["status"] == "complete"
    assert run.record["verification"]["rows"] == 32
    assert run.record["evaluation"] == {}


def test_the_best_checkpoint_is_what_is_saved(toy, train):
    # a rate too high at the end of a warmup: the last evaluation is not the best
    rate = {"learning_rate": 0.1, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 15}
    run = train(toy(training={**rate, "load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}))
    losses = {step: loss for step, loss in evaluations(run).items() if step}
    best = min(losses, key=losses.__getitem__)
    assert best != 20, "this recipe must not end at its best"
    assert run.record["best"] == {"step": best, "metric": "loss", "value": pytest.approx(losses[best])}
    assert run.record["metrics"]["after"]["loss"] == losses[best]
    assert adapter(run) == (run.path / f"checkpoint-{best}/adapter_model.safetensors").read_bytes()
    assert predict.evaluate(run)["test"]["loss"] == pytest.approx(losses[best])


def test_early_stopping_stops(toy, train):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.0}
    run = train(toy(training=best, early_stopping={"early_stopping_patience": 2}))
    assert run.record["status"] == "complete"
    assert (run.record["step"], run.record["max_steps"]) == (15, 20)


def test_a_global_batch_is_accumulated(toy, train, complete):
    run = train(toy(global_batch_size=16, training={"per_device_train_batch_size": 4}))
    assert run.record["layout"]["gradient_accumulation_steps"] == 4
    assert run.record["layout"]["global_batch_size"] == 16
    assert len(trajectory(run)) == len(trajectory(complete))


def test_bf16_autocast_and_bf16_weights_run(toy, train):
    mixed = train(toy("mixed", training={"bf16": True}))
    assert mixed.record["layout"]["precision"] == "bf16 over float32"
    pure = train(toy("pure", model={"dtype": "bfloat16"}))
    assert "bfloat16" in pure.record["layout"]["precision"]
    for run in (mixed, pure):
        assert run.record["status"] == "complete"
        assert run.record["metrics"]["after"]["loss"] < run.record["metrics"]["before"]["loss"]
        assert predict.evaluate(run)["test"]["loss"] == pytest.approx(run.record["metrics"]["after"]["loss"], abs=5e-3)


def test_the_models_configuration_can_be_set(toy, train):
    run = train(toy(model={"config": {"hidden_dropout_prob": 0.0, "classifier_dropout": 0.5}}))
    config = json.loads((run.path / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["classifier_dropout"]) == (0.0, 0.5)


# --- what a recipe got wrong ---------------------------------------------------------------------------------------


def test_a_configuration_key_that_the_model_lacks_is_named_with_its_line(toy, train, tmp_path):
    path = toy(model={"config": {"hidden_dropout": 0.0}})
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "hidden_dropout" in text)
    told = refusal(train, path)
    assert told.startswith(f"{path}:{line}: model.config.hidden_dropout: BertConfig has no 'hidden_dropout'")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_its_backbone_is_refused(toy, train, tiny_model, tmp_path):
    weights = load_file(tiny_model / "model.safetensors")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    kept = {name: tensor for name, tensor in weights.items() if "layer.1." not in name}
    save_file(kept, broken / "model.safetensors", metadata={"format": "pt"})
    told = refusal(train, toy(model={"name_or_path": str(broken)}))
    assert "model.name_or_path" in told
    assert f"lacks {len(weights) - len(kept)} weights of the bert backbone" in told
    assert not (tmp_path / "run").exists()


def test_target_modules_that_match_nothing_are_named(toy, train, tmp_path):
    told = refusal(train, toy(adapter={"target_modules": ["q_proj"]}))
    assert "adapter" in told
    assert "q_proj" in told
    assert not (tmp_path / "run").exists()


# --- a second time -------------------------------------------------------------------------------------------------


def test_a_complete_run_is_left_as_it_is(toy, train, capsys):
    run = train(toy(training={"num_train_epochs": 1}))
    before = stamps(run.path)
    capsys.readouterr()
    train(toy(training={"num_train_epochs": 1}))
    assert "is complete already" in capsys.readouterr().out
    assert stamps(run.path) == before


def test_what_only_observes_may_change(toy, train):
    run = train(toy(training={"num_train_epochs": 1}))
    before = stamps(run.path)
    observing = {"logging_steps": 5, "eval_strategy": "no", "report_to": "none", "per_device_eval_batch_size": 8}
    train(toy(training={"num_train_epochs": 1, **observing, "dataloader_num_workers": 1}))
    assert stamps(run.path) == before


def test_a_run_of_another_recipe_is_refused_by_the_keys_that_differ(toy, train):
    run = train(toy(training={"num_train_epochs": 1}))
    before = stamps(run.path)
    changed = {"num_train_epochs": 1, "learning_rate": 0.5, "dataloader_drop_last": True}
    told = refusal(train, toy(training=changed, adapter={"r": 3}))
    assert "adapter.r: 4 -> 3" in told
    assert "training.dataloader_drop_last: None -> True" in told
    assert "training.learning_rate: 0.01 -> 0.5" in told
    assert "num_train_epochs" not in told
    assert "--fresh" in told
    assert stamps(run.path) == before


def test_a_shorter_run_is_another_recipe(toy, train):
    train(toy(training={"num_train_epochs": 2}))
    assert "num_train_epochs: 2 -> 1" in refusal(train, toy(training={"num_train_epochs": 1}))


def test_a_lengthened_run_goes_on(toy, train):
    short = train(toy(training={"num_train_epochs": 2, "lr_scheduler_type": "constant"}))
    first, evaluated = trajectory(short), evaluations(short)
    run = train(toy(training={"num_train_epochs": 4, "lr_scheduler_type": "constant"}))
    assert trajectory(run)[:10] == first
    assert {s: v for s, v in evaluations(run).items() if s <= 10} == evaluated
    assert (run.record["status"], run.record["step"], run.record["max_steps"]) == ("complete", 20, 20)
    assert run.record["metrics"]["before"]["loss"] == evaluated[0]
    straight = train(toy("straight", training={"num_train_epochs": 4, "lr_scheduler_type": "constant"}))
    assert same_training(run, straight)


def test_fresh_moves_the_old_run_aside(toy, train):
    run = train(toy(training={"num_train_epochs": 1}))
    before = {p.relative_to(run.path): content for p, content in stamps(run.path).items()}
    again = train(toy(training={"num_train_epochs": 1, "seed": 4}), fresh=True)
    aside = run.path.with_name("run.1")
    assert {p.relative_to(aside): content for p, content in stamps(aside).items()} == before
    assert again.record["status"] == "complete"
    assert trajectory(again) != trajectory(Run(aside))


def test_fresh_moves_a_damaged_run_aside(toy, train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.json").write_text('{"status": "comp')
    assert train(toy(training={"num_train_epochs": 1}), fresh=True).record["status"] == "complete"
    assert (tmp_path / "run.1/run.json").read_text() == '{"status": "comp'


def test_a_directory_that_is_no_run_is_not_touched(toy, train, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.tex").write_text("years of work")
    told = refusal(train, toy())
    assert "training.output_dir" in told
    assert "is not a run" in told
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("at", [3, 6, 8, 19])
def test_a_run_that_broke_down_says_why_and_goes_on_as_if_it_had_not(  # noqa: PLR0917  # fixtures
    toy, train, complete, crash, monkeypatch, at
):
    crash(at)
    with pytest.raises(RuntimeError, match="on fire"):
        train(toy())
    monkeypatch.undo()
    run = Run(recipes.load(toy()).output_dir)
    assert run.record["status"] == "failed"
    assert "the machine is on fire" in run.record["reason"]
    train(toy())
    assert run.record["status"] == "complete"
    assert run.record["reason"] is None
    assert same_training(run, complete)
    assert evaluations(run) == evaluations(complete)
    assert run.record["evaluation"] == complete.record["evaluation"]
    assert run.record["metrics"] == complete.record["metrics"]


@pytest.mark.parametrize("at", [7, pytest.param(10, marks=pytest.mark.long), pytest.param(27, marks=pytest.mark.long)])
def test_going_on_in_the_middle_of_an_epoch_changes_nothing_under_accumulation(toy, train, crash, monkeypatch, at):
    several = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "save_strategy": "steps", "save_steps": 2}
    straight = train(toy("straight", training=several))
    crash(at)
    with pytest.raises(RuntimeError, match="on fire"):
        train(toy(training=several))
    monkeypatch.undo()
    assert same_training(train(toy(training=several)), straight)


def test_rows_that_changed_meanwhile_are_refused(toy, train, crash, monkeypatch, tmp_path):
    crash(8)
    with pytest.raises(RuntimeError):
        train(toy())
    monkeypatch.undo()
    content = (tmp_path / "test.csv").read_bytes()
    (tmp_path / "test.csv").write_bytes(content.replace(b"good", b"bad", 1))
    told = refusal(train, toy())
    assert "the rows of test are no longer those" in told
    (tmp_path / "test.csv").write_bytes(content)
    assert train(toy()).record["status"] == "complete"


def test_what_a_crash_left_of_a_checkpoint_is_not_resumed_from(toy, train, complete, crash, monkeypatch):
    crash(12)
    with pytest.raises(RuntimeError):
        train(toy())
    monkeypatch.undo()
    run = Run(recipes.load(toy()).output_dir)
    torn = run.path / "checkpoint-11"
    torn.mkdir()
    (torn / "trainer_state.json").write_text('{"global_')
    with (run.path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 12, "lo')
    train(toy())
    assert not torn.exists()
    assert same_training(run, complete)


# --- through the command line --------------------------------------------------------------------------------------


def test_the_command_trains_verifies_and_says_nothing_that_is_not_its_own(toy, command, complete, tmp_path):
    found = command("train", toy())
    assert found.returncode == 0, found.stderr
    run = Run(tmp_path / "run")
    assert run.record["status"] == "complete"
    assert same_training(run, complete)
    assert [line for line in found.stderr.splitlines() if not line.startswith("step ")] == []
    for word in ("LORA: 3,906 of", "70 rows", "20 of 16 rows", "accuracy", "verified", str(run.path / "adapter")):
        assert word in found.stdout
    again = command("train", toy())
    assert (again.returncode, again.stderr) == (0, "")
    assert "is complete already" in again.stdout
