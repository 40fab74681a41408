"""Claims about answers of language models: to the rows of a file, and in a conversation."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from scalepeft import cli, generate, model
from scalepeft.console import quiet_upstream
from scalepeft.conversations import prompt_ids
from scalepeft.errors import UserError
from scalepeft.generate import Chat, Draws, Sampling
from scalepeft.run import Run

QUESTIONS = [
    "which word is first: stone cloud",
    "lamp",
    " ".join(["river apple"] * 20),
    "which word is first: silver",
    "window!",
]


@pytest.fixture(scope="module")
def talker(tmp_path_factory, tiny_lm) -> Run:
    """A complete run of the tiny language model that tests may read and copy, not change."""
    from conftest import train_here, write_chat

    quiet_upstream()
    return train_here(write_chat(tmp_path_factory.mktemp("talker"), tiny_lm))


@pytest.fixture(scope="module")
def loaded(talker):
    """Its model and tokenizer."""
    return model.load(talker), model.tokenizer(talker.recipe())


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def copied(talker, tmp_path) -> Run:
    return Run(shutil.copytree(talker.path, tmp_path / "copied"))


def written(rows: list[dict], name: str = "in.jsonl") -> Path:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Path(name)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def call(*arguments: object) -> int:
    return cli.main([str(a) for a in arguments])


def completed(run: Run, *options: object, data: Path | None = None) -> bytes:
    data, output = data or written([{"prompt": text} for text in QUESTIONS]), Path("out.jsonl")
    output.unlink(missing_ok=True)
    assert call("predict", run.path, "--data", data, "--output", output, "--max-new-tokens", 12, *options) == 0
    return output.read_bytes()


# --- a file --------------------------------------------------------------------------------------------------------


def test_each_row_has_the_completion_that_it_has_alone(talker, loaded, capsys):
    completed(talker, "--batch-size", 3)
    assert capsys.readouterr().out == "out.jsonl: 5 rows\n"
    found = lines(Path("out.jsonl"))
    assert [(line["row"], line["prompt"]) for line in found] == list(enumerate(QUESTIONS))
    for line, text in zip(found, QUESTIONS, strict=True):
        ids = prompt_ids(loaded[1], {"prompt": text})
        assert line["completion"] == generate.answer(*loaded, ids, max_new_tokens=12)
        assert line["tokens"] <= 12
        assert line["finished"] or line["tokens"] == 12
    assert [p.name for p in Path().glob("*.part")] == []


@pytest.mark.parametrize("options", [(), ("--temperature", 1.5), ("--temperature", 1, "--top-p", 0.8, "--seed", 7)], ids=str)
def test_batches_change_no_answer(talker, options):
    alone = completed(talker, "--batch-size", 1, *options)
    assert completed(talker, "--batch-size", 4, *options) == completed(talker, *options) == alone


def test_a_seed_decides_over_the_draws(talker):
    drawn = [completed(talker, "--temperature", 2, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    same = written([{"prompt": "lamp"}, {"prompt": "lamp"}], "same.jsonl")
    completed(talker, "--temperature", 2, data=same)
    first, second = lines(Path("out.jsonl"))
    assert first["completion"] != second["completion"]


def test_draws_follow_the_probabilities():
    """0.7 of the first token, 0.2 and 0.1: within 4 standard deviations of 4,000 draws."""
    scores = torch.log(torch.tensor([[0.7, 0.2, 0.1]])).repeat(4_000, 1)
    for sampling, expected in (
        (Sampling(temperature=1.0, max_new_tokens=1), (0.7, 0.2, 0.1)),
        (Sampling(temperature=0.5, max_new_tokens=1), (49 / 54, 4 / 54, 1 / 54)),
        (Sampling(temperature=1.0, top_p=0.8, max_new_tokens=1), (7 / 9, 2 / 9, 0)),
        (Sampling(temperature=1.0, top_p=0.7, max_new_tokens=1), (1, 0, 0)),
        (Sampling(temperature=1e-300, max_new_tokens=1), (1, 0, 0)),
    ):
        left = Draws(sampling, range(4_000))(torch.empty(0), scores)
        assert torch.equal(left.isfinite().sum(-1), torch.ones(4_000, dtype=torch.long))
        counts = Counter(left.argmax(-1).tolist())
        for token, share in enumerate(expected):
            assert abs(counts[token] - 4_000 * share) <= 4 * (4_000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "lamp"}]},
        {"messages": [{"role": "user", "content": "lamp"}, {"role": "assistant", "content": "an answer that is not read"}]},
        {"conversations": [{"from": "human", "value": "lamp"}]},
        {"instruction": "lamp", "output": "not read"},
    ],
    ids=str,
)
def test_every_format_asks_the_same(talker, row):
    name = next(iter(row))
    data = written([row])
    completed(talker, data=data)
    asked = lines(Path("out.jsonl"))[0]
    assert asked.pop("prompt") == row[name]
    completed(talker, data=written([{"messages": [{"role": "user", "content": "lamp"}]}], "same.jsonl"))
    assert asked.items() <= lines(Path("out.jsonl"))[0].items()


def test_a_prompt_of_several_columns_is_told_as_an_object(talker):
    completed(talker, data=written([{"instruction": "lamp", "input": "x", "output": "y"}, {"instruction": "lamp"}]))
    prompts = [line["prompt"] for line in lines(Path("out.jsonl"))]
    assert prompts == [{"instruction": "lamp", "input": "x"}, {"instruction": "lamp", "input": None}]


def test_the_recipes_own_column_names_hold(copied):
    resolved = copied.path / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("data:\n", "data:\n  columns: {messages: talk}\n"))
    data = written([{"talk": [{"role": "user", "content": "lamp"}]}])
    assert b"lamp" in completed(copied, data=data)


def test_a_row_near_the_end_of_the_window_writes_what_has_room(talker, loaded):
    """In one file with short prompts, which must not go on less far, nor the long one further."""
    text = "a" * 300
    while len(ids := prompt_ids(loaded[1], {"prompt": text})) > 250:
        text = text[1:]
    completed(talker, data=written([{"prompt": text}, {"prompt": "lamp"}]))
    found = lines(Path("out.jsonl"))
    assert found[0]["tokens"] <= 256 - len(ids) < 12
    assert found[1]["completion"] == generate.answer(*loaded, prompt_ids(loaded[1], {"prompt": "lamp"}), max_new_tokens=12)


def test_a_prompt_that_fills_the_window_is_a_bad_row(talker, copied, capsys):
    data = written([{"prompt": "lamp"}, {"prompt": "river " * 300}, {"prompt": "stone"}])
    assert call("predict", talker.path, "--data", data, "--output", "out.jsonl") == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].startswith("in.jsonl:2: row 2: prompt leaves no room for an answer (")
    assert len(told) == 2
    assert "data.on_bad_rows" in told[1]
    assert not Path("out.jsonl").exists()
    resolved = copied.path / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace("data:\n", "data:\n  on_bad_rows: drop\n"))
    completed(copied, data=data)
    assert [line["row"] for line in lines(Path("out.jsonl"))] == [0, 2]


def test_preference_runs_complete_as_well(chat, train):
    run = train(chat(task="preference", training={"max_steps": 1}))
    completed(run)
    assert [line["row"] for line in lines(Path("out.jsonl"))] == list(range(5))


@pytest.mark.parametrize("adapter", [None, {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}], ids=["full", "prompt"])
def test_other_ways_of_training_complete_as_well(chat, train, adapter):
    run = train(chat(adapter=adapter, training={"max_steps": 1, "eval_on_start": False}))
    assert completed(run, "--batch-size", 1) == completed(run, "--batch-size", 4)


# --- where an answer ends ------------------------------------------------------------------------------------------


def test_an_answer_ends_at_any_end_token(loaded):
    trained, tokenizer = loaded
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generate.end_tokens(trained, tokenizer) == [end]
    before = trained.generation_config.eos_token_id
    try:
        trained.generation_config.eos_token_id = [other]
        assert generate.end_tokens(trained, tokenizer) == sorted([end, other])
        trained.generation_config.eos_token_id = None
        assert generate.end_tokens(trained, tokenizer) == [end]
    finally:
        trained.generation_config.eos_token_id = before


def test_the_token_that_closes_a_turn_ends_an_answer_though_it_is_not_eos(talker, loaded):
    tokenizer = model.tokenizer(talker.recipe())
    tokenizer.eos_token = "<|endoftext|>"  # noqa: S105  # no password
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in generate.end_tokens(loaded[0], tokenizer)
    tokenizer.chat_template = None
    loaded[0].generation_config.eos_token_id, before = None, loaded[0].generation_config.eos_token_id
    assert generate.end_tokens(loaded[0], tokenizer) == [tokenizer.eos_token_id]
    loaded[0].generation_config.eos_token_id = before


def test_what_ends_an_answer_is_no_part_of_it(loaded):
    trained, tokenizer = loaded
    ids = tokenizer("one", add_special_tokens=False)["input_ids"]
    found = generate._completion(tokenizer, [*ids, tokenizer.eos_token_id, *ids], [tokenizer.eos_token_id])
    assert (found.completion, found.tokens, found.finished) == ("one", len(ids) + 1, True)
    assert not generate._completion(tokenizer, ids, [tokenizer.eos_token_id]).finished
    assert trained.training is False


def test_answering_leaves_a_model_in_training_mode(loaded):
    trained, tokenizer = loaded
    ids = prompt_ids(tokenizer, {"prompt": "lamp"})
    told = generate.answer(trained, tokenizer, ids, max_new_tokens=5)
    trained.train()
    try:
        assert generate.answer(trained, tokenizer, ids, max_new_tokens=5) == told
        assert trained.training
    finally:
        trained.eval()


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--max-new-tokens", 0), "command line: --max-new-tokens is 0; it is at least 1"),
        (("--temperature", -1), "command line: --temperature is -1.0; it is 0 (the likeliest token) or more"),
        (("--temperature", "nan"), "command line: --temperature is nan; it is 0 (the likeliest token) or more"),
        (("--top-p", 0.5), "command line: --top-p has no effect without a --temperature above 0"),
        (("--temperature", 1, "--top-p", 0), "command line: --top-p is 0.0; it is above 0 and at most 1"),
        (("--seed", -1), "command line: --seed is -1; it is 0 or more"),
        (("--batch-size", 0), "command line: --batch-size is 0; it is at least 1"),
    ],
)
def test_impossible_options_are_told_in_one_line(talker, capsys, options, told):
    data = written([{"prompt": "lamp"}])
    assert call("predict", talker.path, "--data", data, "--output", "out.jsonl", *options) == 2
    assert capsys.readouterr().err == f"{told}\n"


def test_the_suffix_of_the_output_must_fit(talker, complete, capsys):
    data = written([{"prompt": "lamp"}])
    assert call("predict", talker.path, "--data", data, "--output", "out.csv") == 2
    assert call("predict", complete.path, "--data", data, "--output", "out.jsonl") == 2
    assert capsys.readouterr().err.splitlines() == [
        "out.csv: completions are JSON lines; give an --output that ends in .jsonl",
        "out.jsonl: labels are csv; give an --output that ends in .csv",
    ]


def test_classification_knows_no_sampling(complete, capsys):
    data = written([{"text": "good"}])
    assert call("predict", complete.path, "--data", data, "--output", "out.csv", "--top-p", 0.5) == 2
    assert capsys.readouterr().err == f"command line: --top-p is for language models; {complete.path} classifies\n"
    assert call("chat", complete.path) == 2
    told = f"{complete.path}: its model classifies and does not write; `scalepeft predict` labels rows with it\n"
    assert capsys.readouterr().err == told


def test_no_output_is_overwritten(talker, capsys):
    Path("out.jsonl").write_text("mine")
    assert call("predict", talker.path, "--data", written([{"prompt": "lamp"}]), "--output", "out.jsonl") == 2
    assert capsys.readouterr().err == "out.jsonl: exists already; give another --output\n"
    assert Path("out.jsonl").read_text() == "mine"


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"frage": "lamp"}], "in.jsonl: no column holds conversations by its name"),
        ([{"output": "an answer only"}], "in.jsonl:1: row 1: field is missing"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], "in.jsonl:1: row 1: role is unknown"),
    ],
)
def test_files_without_prompts_are_named(talker, capsys, rows, told):
    assert call("predict", talker.path, "--data", written(rows), "--output", "out.jsonl") == 2
    assert capsys.readouterr().err.startswith(told)


# --- a conversation ------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(monkeypatch):
    """Put lines on standard input."""
    return lambda *said: monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in said)))


def test_piped_turns_are_answered_one_by_one(talker, loaded, typed, capsys):
    typed("lamp", "", "window", "/reset", "/frobnicate", "lamp", "/quit", "never asked")
    assert call("chat", talker.path, "--max-new-tokens", 6) == 0
    out, err = capsys.readouterr()

    def told(*said: str) -> str:
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(said)]
        return generate.answer(*loaded, prompt_ids(loaded[1], messages), max_new_tokens=6)

    first = told("lamp")
    assert out == f"{first}\n{told('lamp', first, 'window')}\n{first}\n"
    assert "there is no /frobnicate; there are /reset and /quit\n" in err


def test_the_system_prompt_opens_the_conversation(talker, loaded, typed, capsys):
    typed("lamp")
    assert call("chat", talker.path, "--max-new-tokens", 6, "--system-prompt", "Be brief.") == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "lamp"}]
    assert capsys.readouterr().out == f"{generate.answer(*loaded, prompt_ids(loaded[1], messages), max_new_tokens=6)}\n"


def test_what_has_no_room_in_the_window_is_forgotten_with_a_note(talker, capsys):
    chat = Chat(talker, Sampling(max_new_tokens=20, temperature=2))
    for _ in range(8):
        chat.say("river apple " * 4)
    assert "forgotten: the model's window has 256 tokens" in capsys.readouterr().err
    assert len(prompt_ids(chat.tokenizer, chat.messages)) <= 256
    said = list(chat.messages)
    assert chat.say("river " * 300) == ""
    assert "prompt leaves no room for an answer (" in capsys.readouterr().err
    assert chat.messages in (said, [])


def test_ctrl_c_stops_the_answer_and_not_the_chat(talker, monkeypatch, capsys):
    chat = Chat(talker, Sampling(max_new_tokens=20, temperature=2))
    whole = chat.say("lamp")
    chat.reset()
    draw, drawn = Draws.__call__, []

    def interrupted(self, *given):
        drawn.append(1)
        if len(drawn) == 8:
            raise KeyboardInterrupt
        return draw(self, *given)

    monkeypatch.setattr(Draws, "__call__", interrupted)
    said = chat.say("lamp")
    assert whole.startswith(said)
    assert said != whole
    assert chat.messages[1:] == ([{"role": "assistant", "content": said}] if said.strip() else [])
    assert capsys.readouterr().out == f"{whole}\n{said}\n"
    chat.reset()
    assert chat.say("lamp") == whole


def test_a_chat_needs_a_template(talker, monkeypatch):
    monkeypatch.setattr(model, "tokenizer_of", lambda run, found=model.tokenizer_of: _without_template(found(run)))
    with pytest.raises(UserError, match="no chat template"):
        Chat(talker, Sampling())


def _without_template(tokenizer):
    tokenizer.chat_template = None
    return tokenizer


@pytest.mark.long
def test_a_real_model_answers(smollm2, tmp_path, train, typed, capsys):  # noqa: ARG001  # it must be there
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in REAL]
    written(rows, "train.jsonl")
    recipe = Path("real.yaml")
    recipe.write_text(
        "task: causal-lm\nmodel: {name_or_path: 'fetched:SmolLM2-135M-Instruct'}\n"
        "adapter: {peft_type: LORA, r: 4, target_modules: all-linear}\ndata: {train: {path: train.jsonl}}\n"
        f"training: {{output_dir: {tmp_path / 'real'}, max_steps: 1, save_strategy: 'no', use_cpu: true}}\n"
    )
    run = train(recipe)
    completed(run, data=written([{"prompt": [{"role": "user", "content": q}]} for q, _ in REAL]))
    assert "Paris" in lines(Path("out.jsonl"))[0]["completion"]
    typed("What is the capital of France?")
    assert call("chat", run.path, "--max-new-tokens", 12) == 0
    assert "Paris" in capsys.readouterr().out


REAL = [("What is the capital of France?", "Paris."), ("What is the capital of Italy?", "Rome.")]
