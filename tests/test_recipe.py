"""The recipe language: what a file means, and what is told of one that means nothing."""

from __future__ import annotations

import math

import pytest
import yaml

from scalepeft import check, document, recipe
from scalepeft.errors import UserError

GOOD = """\
task: sequence-classification
model: {name_or_path: some/model}
adapter: {peft_type: LORA, r: 8}
data:
  train: {path: train.csv}
  evaluation:
    test: {path: test.csv}
training:
  learning_rate: 2e-4
"""

LAUGHS = "a0: &a0 [0]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(9))
"""Ten lines that stand for a thousand million values."""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a recipe and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(text, name="r.yaml"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return name

    return write


@pytest.fixture
def problems(written):
    """All that is told of a recipe's text."""

    def told(text, *overrides):
        with pytest.raises(UserError) as refused:
            recipe.load(written(text), overrides)
        return list(refused.value.problems)

    return told


# --- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4), ("1e3", 1000.0), ("1E+3", 1000.0), (".5", 0.5), ("1.", 1.0), ("-.inf", -math.inf), (".Inf", math.inf),
        ("0x10", 16), ("0o17", 15), ("010", 10), ("-3", -3), ("+3", 3), ("true", True), ("FALSE", False),
        ("~", None), ("null", None), ("", None), ("no", "no"), ("yes", "yes"), ("on", "on"), ("1_000", "1_000"),
        ("12:30", "12:30"), ("2024-01-01", "2024-01-01"), ("'2e-4'", "2e-4"), ('"true"', "true"), ("tRue", "tRue"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text, value, written):
    read = document.read(recipe.find(written(f"key: {text}\n"))).values["key"]
    assert (read, type(read)) == (value, type(value))


def test_nan_is_a_number(written):
    assert math.isnan(document.read(recipe.find(written("key: .nan\n"))).values["key"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "r.yaml: is empty; a recipe has at least task, model and data"),
        ("# only a comment\n", "r.yaml: is empty; a recipe has at least task, model and data"),
        ("- a\n- b\n", "r.yaml:1: a recipe is a mapping of sections, this is a list"),
        ("hello\n", "r.yaml:1: a recipe is a mapping of sections, this is a single value"),
        ("a:\n  b: 1\n\tc: 2\n", "r.yaml:3: not YAML: a tab where YAML wants spaces; indent with spaces"),
        ("a: [1, 2\n", "r.yaml:2: not YAML: "),
        ("a: 'open\n", "r.yaml:2: not YAML: "),
        (b"\x89PNG\r\n\x1a\n\xff", "r.yaml: not a text file in UTF-8 (invalid start byte at byte 0)"),
        (b"a: \x00", "r.yaml: not YAML: "),
        ("a: 1\nb: {c: 1,\n c: 2}\n", "r.yaml:3: duplicate key 'c'; it stands already at r.yaml:2"),
        ("a: 1\na: 1\n", "r.yaml:2: duplicate key 'a'; it stands already at r.yaml:1"),
        ("? [a, b]\n: 1\n", "r.yaml:1: a key must be a plain word"),
        ("a: 1\nb: !!int 5\n", "r.yaml:2: the tag 'tag:yaml.org,2002:int' has no meaning in a recipe"),
        ("b: !!python/object/apply:os.system [ls]\n", "r.yaml:1: the tag 'tag:yaml.org,2002:python/"),
        ("a: !mine {b: 1}\n", "r.yaml:1: the tag '!mine' has no meaning in a recipe"),
        ("a: &x\n  b: *x\n", "r.yaml:2: a.b is an alias of what it stands in"),
        ("a: &x [1, *x]\n", "r.yaml:1: a.1 is an alias of what it stands in"),
        ("a: *x\n", "r.yaml:1: found undefined alias 'x'"),
        ("a: &x {b: 1}\nc: {<<: *x}\n", "r.yaml:2: merge keys (<<) are not part of YAML 1.2; write the keys out"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: but found another document"),
        ("a: " + "[" * 3000 + "\n", "r.yaml: is nested too deeply"),
        ("a: " + "9" * 5000 + "\n", "r.yaml:1: Exceeds the limit"),
        (LAUGHS, "r.yaml:1: more than 20000 values; are aliases nested in aliases?"),
    ],
)  # fmt: skip
def test_what_is_no_recipe_is_told_in_one_line(text, told, problems):
    (problem,) = problems(text)
    assert problem.startswith(told)
    assert "\n" not in problem


def test_byte_order_mark_and_windows_lines_are_read(written):
    assert recipe.load(written("\ufeff" + GOOD.replace("\n", "\r\n"))).training == {"learning_rate": 2e-4}


def test_an_alias_is_its_anchors_value(written):
    text = GOOD.replace("train: {path", "train: &rows {path").replace("test: {path: test.csv}", "test: *rows")
    read = recipe.load(written(text))
    assert read.data.evaluation["test"] == read.data.train


def test_a_missing_file_is_told_with_the_nearest(written, tmp_path):
    written(GOOD, "mine.yaml")
    with pytest.raises(UserError, match=r"^mien.yaml: no such recipe; did you mean 'mine.yaml'\?$"):
        recipe.load("mien.yaml")
    with pytest.raises(UserError, match=r"^quikstart: no such recipe; did you mean 'quickstart'\?$"):
        recipe.load("quikstart")
    with pytest.raises(UserError, match=r"no such recipe$"):
        recipe.load("x" * 5000)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        recipe.load(tmp_path)


def test_a_shipped_recipe_is_found_by_name_unless_a_file_is_called_so(written, tmp_path):
    assert recipe.load("quickstart").name == "quickstart"
    (tmp_path / "quickstart").mkdir()
    assert recipe.load("quickstart").name == "quickstart"
    (tmp_path / "quickstart").rmdir()
    assert recipe.load(written(GOOD, "quickstart")).model.name_or_path == "some/model"


# --- keys and values -----------------------------------------------------------------------------------------------


def test_a_good_recipe_is_a_value(written):
    read = recipe.load(written(GOOD))
    assert read.model.name_or_path == "some/model"
    assert read.adapter == {"peft_type": "LORA", "r": 8}
    assert read.data.train == recipe.Source(path="train.csv")
    assert read.data.evaluation == {"test": recipe.Source(path="test.csv")}
    assert read.resolved() == yaml.safe_load(GOOD.replace("2e-4", "0.0002"))
    assert str(read.output_dir) == "runs/r"
    assert str(read.error("data.train.path", "is missing")) == "r.yaml:5: data.train.path: is missing"
    assert str(read.error("data.train.split", "is missing")) == "r.yaml:5: data.train.split: is missing"


def test_several_sources_are_values_too(written):
    read = recipe.load(written(GOOD.replace("train: {path: train.csv}", "train: [{path: a}, {path: b, first_rows: 3}]")))
    assert read.data.train == [recipe.Source(path="a"), recipe.Source(path="b", first_rows=3)]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("adapter.r=true", "adapter.r is True (bool); it takes int"),
        ('adapter.r="8"', "adapter.r is '8' (str); it takes int"),
        ("adapter.r=1.5", "adapter.r is 1.5 (float); it takes int"),
        ("adapter.r=[8]", "adapter.r is list; it takes int"),
        ("adapter.r=", "adapter.r is null; it takes int"),
        ('training.learning_rate="2e-4"', "training.learning_rate is '2e-4' (str); it takes float"),
        ("training.bf16=1", "training.bf16 is 1 (int); it takes bool"),
        ("training.bf16=yes", "training.bf16 is 'yes' (str); it takes bool"),
        ("training.eval_strategy=true", "training.eval_strategy is True (bool); it takes str"),
        ("training.eval_strategy=epochs", "training.eval_strategy has no value 'epochs'; did you mean 'epoch'?"),
        ("training.optim=adam", "training.optim has no value 'adam'; it is one of adamw_torch, "),
        ("training=3", "training is 3 (int); it takes mapping"),
        ("model=some/model", "model is 'some/model' (str); it takes mapping"),
        ("model.dtype=fp16", "model.dtype has no value 'fp16'; it is one of auto, float32, bfloat16, float16"),
        ("data.train=a.csv", "data.train is 'a.csv' (str); it takes mapping or list"),
        ("data.train.path=3", "data.train.path is 3 (int); it takes str"),
        ("data.label_names=[a, 1.5]", "data.label_names.1 is 1.5 (float); it takes int or str"),
        ("data.evaluation=[a]", "data.evaluation is list; it takes mapping"),
        ("data.evaluation.test=a.csv", "data.evaluation.test is 'a.csv' (str); it takes mapping"),
        ("task=classify", "task has no value 'classify'; it is one of sequence-classification"),
        ("adapter.peft_type=lora", "adapter: peft has no type 'lora'; did you mean 'LORA'"),
        ("adapter.peft_type=PREFIX", "adapter: peft has no type 'PREFIX'; it is one of ADALORA, "),
        ("adapter={r: 8}", "adapter: needs peft_type (LORA, IA3, ...), or name_or_path to continue from one"),
        (
            "adapter={peft_type: PROMPT_TUNING, num_virtual_tokens: 4, prompt_tuning_init: text}",
            "adapter.prompt_tuning_init has no value 'text'",
        ),
    ],
)
def test_a_wrong_value_is_told_with_what_fits(override, told, problems):
    (problem,) = problems(GOOD, override)
    assert problem.startswith("command line (")
    assert told in problem


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=1", "training.report_to=none", "training.report_to=[wandb]", "training.save_total_limit=null",
        "adapter.target_modules=all-linear", "adapter.target_modules=[query]", "adapter.init_lora_weights=pissa_niter_4",
        "quantization={load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}", "model.config={dropout: 0.1, anything: {a: 1}}",
        "adapter={name_or_path: runs/first}", "adapter.rank_pattern={layer.1: 4}",
    ],
)  # fmt: skip
def test_a_fitting_value_is_accepted(override, written):
    recipe.load(written(GOOD), [override])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("learning_rate=1", "a recipe has no 'learning_rate'; it belongs to training"),
        ("name_or_path=x", "a recipe has no 'name_or_path'; it belongs to model"),
        ("r=8", "a recipe has no 'r'; it belongs to adapter"),
        ("path=x", "a recipe has no 'path'; it belongs to data.train"),
        ("training.r=8", "training (TrainingArguments) has no 'r'; it belongs to adapter"),
        ("training.global_batch_size=8", "(TrainingArguments) has no 'global_batch_size'; it belongs to the top level"),
        ("training.load_in_4bit=true", "training (TrainingArguments) has no 'load_in_4bit'; it belongs to quantization"),
        ("adapter.learning_rate=1", "adapter (LoraConfig) has no 'learning_rate'; it belongs to training"),
        ("model.max_length=1", "model (Model) has no 'max_length'; it belongs to data"),
        ("data.path=x", "data (Data) has no 'path'; it belongs to data.train"),
        ("data.train.max_length=1", "data.train (Source) has no 'max_length'; it belongs to data"),
        ("data.learning_rate=1", "data (Data) has no 'learning_rate'; it belongs to training"),
        ("training.evaluation_strategy=epoch", "has no 'evaluation_strategy'; it is now eval_strategy"),
        ("training.no_cuda=true", "has no 'no_cuda'; it is now use_cpu"),
        ("training.warmup_ratio=0.1", "has no 'warmup_ratio'; it is now warmup_steps (a value below 1 is a share"),
        ("model.torch_dtype=auto", "has no 'torch_dtype'; it is now dtype"),
        ("adapter.lora_alhpa=1", "adapter (LoraConfig) has no 'lora_alhpa'; did you mean 'lora_alpha'?"),
        ("training.qqqqqq=1", "training (TrainingArguments) has no 'qqqqqq'"),
        ("adapter={name_or_path: x, r: 8}", "adapter (ExistingAdapter) has no 'r'"),
        ("adapter={name_or_path: x, peft_type: LORA}", "adapter (ExistingAdapter) has no 'peft_type'"),
        ("adapter={peft_typ: LORA, r: 8}", "adapter has no 'peft_typ'; did you mean 'peft_type'?"),
    ],
)
def test_an_unknown_key_is_told_with_its_place(override, told, problems):
    (problem,) = problems(GOOD, override)
    assert told in problem


def test_missing_keys_are_told_where_they_are_missed(problems):
    model, source = problems("model: {dtype: auto}\ntask: sequence-classification\ndata:\n  train:\n    split: train\n")
    assert model.startswith("r.yaml:1: model (Model) needs 'name_or_path': A Hub id, a folder, ")
    assert source.startswith("r.yaml:4: data.train (Source) needs 'path': A Hub id, ")
    assert [line.partition(": ")[2][:20] for line in problems("adapter:\n")] == [
        "a recipe needs 'task", "a recipe needs 'mode", "a recipe needs 'data",
    ]  # fmt: skip


def test_all_problems_are_told_at_once_in_the_order_of_the_file(problems):
    told = problems(GOOD.replace("r: 8", "rr: 8").replace("learning_rate", "learning_rat").replace("model:", "modl:"))
    assert [line.partition(": ")[0] for line in told] == ["r.yaml:2", "r.yaml:3", "r.yaml:9"]


# --- between keys --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["global_batch_size=12"], "global_batch_size 12 is not a multiple of training.per_device_train_batch_size 8"),
        (["global_batch_size=0"], "global_batch_size and training.per_device_train_batch_size must be at least 1"),
        (["global_batch_size=16", "training.gradient_accumulation_steps=2"], "give only one of them"),
        (["data.evaluation="], "data.evaluation is null; it takes mapping"),
        (["data={train: {path: a}}", "training.eval_strategy=epoch"], "training.eval_strategy needs data.evaluation or "),
        (["data={train: {path: a}}", "training.eval_on_start=true"], "training.eval_on_start needs data.evaluation or "),
        (["training.load_best_model_at_end=true"], "needs the same eval_strategy (no) and save_strategy (steps)"),
        (["early_stopping={early_stopping_patience: 3}"], "early_stopping needs training.load_best_model_at_end: true"),
        (["data.train.first_rows=3", "data.train.sample_rows=3"], "data.train: give first_rows or sample_rows, not both"),
        (["data.evaluation.test.first_rows=0"], "data.evaluation.test.first_rows must be above 0"),
        (["data.train.weight=-1"], "data.train.weight must be above 0"),
        (["data.train=[{path: a, weight: 1}, {path: b}]"], "data.train: give every source a weight, or none"),
        (["data.train=[]"], "data.train is an empty list"),
        (["data.text_columns=[a, b, c]"], "data.text_columns takes one column or a pair, not 3"),
        (["data.holdout={size: 0}"], "data.holdout.size must be above 0"),
        (["data.holdout={size: 10}", "data.evaluation.holdout={path: a}"], "the name 'holdout' is taken by data.holdout"),
        (["data.evaluation={a b: {path: x}}"], "data.evaluation: the name 'a b' may only hold letters, digits, - and _"),
        (["data.train.weight=.inf"], "data.train.weight is inf; it takes a finite number"),
        (["data.train.text_columns=[a, b, c]"], "data.train.text_columns takes one column or a pair, not 3"),
        (["data.train.text_columns=[]"], "data.train.text_columns takes one column or a pair, not 0"),
        (["data.train.sample_seed=-1"], "data.train.sample_seed must be from 0 to 2^32 - 1"),
        (["data.holdout={size: 10, seed: -1}"], "data.holdout.seed must be from 0 to 2^32 - 1"),
        (["data.label_names=[1, 2, '1']"], "data.label_names names a label twice"),
        (["training.seed=-1"], "training.seed must not be negative"),
        (["training.data_seed=-1"], "training.data_seed must not be negative"),
        (["training.dataloader_num_workers=-1"], "training.dataloader_num_workers must not be negative"),
        (["training.label_smoothing_factor=2.0"], "training.label_smoothing_factor must be from 0 to 1"),
        (
            [
                "early_stopping={early_stopping_patience: 0}",
                "training={load_best_model_at_end: true, eval_strategy: epoch, save_strategy: epoch}",
            ],
            "early_stopping.early_stopping_patience must be at least 1",
        ),
        (["training.hub_token=hf_x"], "training.hub_token is a secret"),
        (["training.resume_from_checkpoint=x"], "training.resume_from_checkpoint is not needed"),
        (["training.average_tokens_across_devices=false"], "false would make the loss depend on the number of processes"),
        (["training.train_sampling_strategy=batch_rebalance"], "would make the order of rows depend on the number of "),
    ],
)
def test_contradictions_are_told(overrides, told, problems):
    (problem,) = problems(GOOD, *overrides)
    assert told in problem


def test_what_hangs_on_a_mistyped_key_is_not_told_too(problems):
    (problem,) = problems(GOOD.replace("evaluation:", "evalution:"), "training.eval_strategy=epoch")
    assert "did you mean 'evaluation'?" in problem


# --- overrides -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("training.learning_rate=1e-5", "training.learning_rate", 1e-5),
        ("training.run_name=a=b", "training.run_name", "a=b"),
        ("training.save_total_limit=", "training.save_total_limit", None),
        ("data.evaluation.more.path=x.csv", "data.evaluation.more.path", "x.csv"),
        ("data.evaluation.1.path=x.csv", "data.evaluation.1.path", "x.csv"),
        ("data.label_names=[a, b]", "data.label_names.1", "b"),
        ("quantization.load_in_4bit=true", "quantization.load_in_4bit", True),
        ("model.config.1=x", "model.config.1", "x"),
        ("data.train={path: b.csv}", "data.train.path", "b.csv"),
        ("adapter=", "adapter", None),
    ],
)
def test_an_override_sets_a_value(override, key, value, written):
    read = recipe.load(written(GOOD), [override])
    assert recipe.flatten(read.resolved())[key] == value
    assert read.document.where(key.split(".")) == f"command line ({override})"
    assert read.document.where(["task"]) == "r.yaml:1"
    assert read.document.text == GOOD


def test_null_removes_a_section(written):
    assert recipe.load(written(GOOD), ["adapter="]).adapter is None
    assert recipe.load(written(GOOD), ["training=null"]).training == {}


def test_later_overrides_win_and_reach_into_lists(written):
    text = GOOD.replace("train: {path: train.csv}", "train: [{path: a}, {path: b}]")
    read = recipe.load(written(text), ["data.train.1.path=c", "data.train.1.path=d", "data.train.0={path: e}"])
    assert [source.path for source in read.data.train] == ["e", "d"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.bf16", "command line: 'training.bf16' is not an override; its form is section.key=value"),
        ("=3", "command line: '=3' is not an override; its form is section.key=value"),
        ("a..b=3", "command line: 'a..b=3' is not an override; its form is section.key=value"),
        ("data.train.2.path=x", "command line (data.train.2.path=x): data.train is a list of 2; its items are counted from 0"),
        ("data.train.x=1", "command line (data.train.x=1): data.train is a list of 2; its items are counted from 0"),
        ("data.train.2=x", "command line (data.train.2=x): data.train is a list of 2; its items are counted from 0"),
        ("task.name=x", "command line (task.name=x): task is 'sequence-classification', which holds no keys"),
        ("task.name.x=x", "command line (task.name.x=x): task is 'sequence-classification', which holds no keys"),
        ("adapter={r: 8", "command line (adapter={r: 8): not YAML: "),
        ("adapter.r=!!int 8", "command line (adapter.r=!!int 8): the tag "),
        ("adapter={r: 8, r: 9}", "command line (adapter={r: 8, r: 9}): duplicate key 'r'; it stands already at command line ("),
    ],
)
def test_a_bad_override_is_told(override, told, problems):
    (problem,) = problems(GOOD.replace("train: {path: train.csv}", "train: [{path: a}, {path: b}]"), override)
    assert problem.startswith(told)


# --- writing and shipped recipes -----------------------------------------------------------------------------------


def test_what_is_dumped_reads_back_the_same(written):
    values = {
        "floats": [2e-4, 1e-5, 1e300, 3.0, math.inf, -math.inf], "ints": [0, -3, 10**20], "none": None, "bools": [True, False],
        "strings": ["no", "2e-4", "1e3", "0x10", "010", "true", "null", "~", "", " x ", "a: b", "# x", "- x", "naïve 模型",
                    "a\nb\n", "tab\t", "'", '"', "<<", "=", ".inf", "1_000", "2024-01-01", "!x", "&x", "*x", "x" * 300],
        "empty": [{}, []], "no": {"1": "2", "a.b": {"deep": [[1], {"x": 1}]}},
    }  # fmt: skip
    assert document.read(recipe.find(written(recipe.dump(values)))).values == values


@pytest.mark.parametrize("name", recipe.shipped_recipes())
def test_a_shipped_recipe_is_clean_and_survives_writing(name, written):
    read = recipe.load(name)
    again = recipe.load(written(recipe.dump(read.resolved())))
    assert again.resolved() == read.resolved()
    assert check.problems(read.document) == []
    assert read.document.path == recipe.shipped_recipes()[name]


def test_flat_keys_are_dotted():
    assert recipe.flatten({"a": {"b": [1, {"c": 2}]}, "d": {}, "e": []}) == {"a.b.0": 1, "a.b.1.c": 2, "d": {}, "e": []}


# --- families ------------------------------------------------------------------------------------------------------


def family(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
    return tmp_path


BASE = """task: sequence-classification
model: {name_or_path: m}
data: {train: {path: a.csv}}
adapter: {peft_type: LORA, r: 8}
"""


def test_a_recipe_extends_another_and_each_value_knows_its_place(tmp_path):
    family(tmp_path, base=BASE, child="extends: base.yaml\nadapter:\n  r: 4\ntraining: {seed: 1}\n")
    found = recipe.load(tmp_path / "child.yaml")
    assert found.name == "child"
    assert found.adapter == {"peft_type": "LORA", "r": 4}
    assert "extends" not in found.resolved()
    assert str(found.error("adapter.r", "x")).startswith(f"{tmp_path / 'child.yaml'}:3: ")
    assert str(found.error("adapter.peft_type", "x")).startswith(f"{tmp_path / 'base.yaml'}:4: ")


def test_null_in_an_extending_recipe_removes_a_key_and_lists_are_replaced(tmp_path):
    base = BASE + "training: {report_to: [wandb, tensorboard], seed: 3}\n"
    family(tmp_path, base=base, child="extends: base.yaml\nadapter: null\ntraining: {report_to: [wandb], seed: null}\n")
    found = recipe.load(tmp_path / "child.yaml")
    assert found.adapter is None
    assert found.training == {"report_to": ["wandb"]}


@pytest.mark.parametrize(
    ("child", "told"),
    [
        ("extends: bas.yaml\n", "child.yaml:1: extends: {0}/bas.yaml does not exist; did you mean '{0}/base.yaml'?"),
        ("extends: [base.yaml]\n", "child.yaml:1: extends names one recipe"),
        ("extends: child.yaml\n", "child.yaml:1: extends: {0}/child.yaml extends this recipe in turn"),
        ("extends: other.yaml\n", "other.yaml:1: extends: {0}/child.yaml extends this recipe in turn"),
        ("extends: base.yaml\nadapter: {rr: 4}\n", "child.yaml:2: adapter (LoraConfig) has no 'rr'; did you mean 'r'?"),
    ],
)
def test_what_is_wrong_in_a_family_is_told_with_its_place(tmp_path, child, told):
    family(tmp_path, base=BASE, child=child, other="extends: child.yaml\n")
    with pytest.raises(UserError) as caught:
        recipe.load(tmp_path / "child.yaml")
    assert told.format(tmp_path) in str(caught.value)


def test_check_resolved_prints_a_recipe_that_gives_the_same_values(tmp_path, capsys):
    family(tmp_path, base=BASE, child="extends: base.yaml\ntraining: {seed: 1}\n")
    assert recipe.main([str(tmp_path / "child.yaml"), "--resolved", "training.seed=2"]) == 0
    printed = capsys.readouterr().out
    assert f"# {tmp_path / 'base.yaml'}:2" in printed
    assert "# command line (training.seed=2)" in printed
    (tmp_path / "whole.yaml").write_text(printed, encoding="utf-8")
    whole, child = recipe.load(tmp_path / "whole.yaml"), recipe.load(tmp_path / "child.yaml", ["training.seed=2"])
    assert whole.resolved() == child.resolved()
