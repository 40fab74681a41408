"""Claims about publishing: unmodified clients push to a Hub of this machine and load from it what was trained."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub import Hub, metadata, problems_of

from scalepeft import card, push
from scalepeft import run as runs
from scalepeft.console import quiet_upstream
from scalepeft.errors import UserError
from scalepeft.run import Run

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def repo(request) -> str:
    """A repository of this test."""
    return f"alice/{re.sub(r'[^a-z0-9]+', '-', request.node.name.lower()).strip('-')[:90].strip('-')}"


@pytest.fixture
def pushed(hub, tmp_path, command):
    """`scalepeft push ...` against the Hub; returns status, what was printed, and what was said of errors."""

    def run(*arguments: object, token: str | None = None, **environment: str) -> tuple[int, str, str]:
        done = command("push", *arguments, **hub.environment(tmp_path / "home", token) | environment)
        assert "Traceback" not in done.stderr, done.stderr
        assert not re.search(r"hf_\w{30}", done.stdout + done.stderr)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def client(hub, tmp_path):
    """Run Python in a process of its own that talks to the Hub with empty caches; returns what it prints, as JSON."""

    def run(code: str, token: str | None = None) -> Any:
        environment = os.environ | hub.environment(tmp_path / "another" / "home", token)
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return run


def upload(client, repo: str, folder: Path, kind: str = "model") -> None:
    client(
        "from huggingface_hub import HfApi; api = HfApi()\n"
        f"api.create_repo({repo!r}, private=True, repo_type={kind!r}, exist_ok=True)\n"
        f"api.upload_folder(repo_id={repo!r}, folder_path={str(folder)!r}, repo_type={kind!r}); print(1)"
    )


def everything(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


def published(hub: Hub, repo: str) -> dict[str, bytes]:
    return {path: hub.read(repo, path) for path in hub.files(repo) if path != ".gitattributes"}


# --- what is published -----------------------------------------------------------------------------------------------


def test_an_adapter_is_pushed_pulled_and_answers_as_trained(complete, hub, pushed, client, repo, tmp_path, tiny_model):  # noqa: PLR0917  # fixtures
    base = f"{repo}-base"
    readme = "---\nlicense: apache-2.0\n---\n# tiny\n"
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text(readme)
    upload(client, base, tmp_path / "base")
    status, said, warned = pushed(complete.path, "--repo-id", repo, "--base", base)
    assert (status, warned) == (0, "")
    assert f"{repo}: 10 files" in said
    assert said.rstrip().endswith("private")
    assert hub.repository(repo).private
    # the lines of the card, run as they are by somebody else
    code = re.search(r"```python\n(.*?)```", hub.read(repo, "README.md").decode(), re.DOTALL)[1]
    rows = complete.path / runs.VERIFICATION
    answered = client(
        f"{code}\n"
        # the base is named, so that the shortest line works, too
        f"from peft import AutoPeftModelForSequenceClassification as Auto; Auto.from_pretrained({repo!r}, num_labels=2)\n"
        "import json; from safetensors.torch import load_file\n"
        f"found = load_file({str(rows)!r}); expected = found.pop('logits')\n"
        "print(json.dumps([(model.eval()(**found).logits - expected).abs().max().item(), tokenizer('a good film').input_ids,"
        " model.config.id2label['0'] if '0' in model.config.id2label else model.config.id2label[0]]))"
    )
    assert answered[0] < 1e-5
    assert answered[1:] == [[2, 6, 47, 46, 3], "negative"]
    config = json.loads(hub.read(repo, "adapter_config.json"))
    assert config["base_model_name_or_path"] == base
    data = metadata(hub.read(repo, "README.md").decode())
    assert (data["license"], data["base_model"], data["base_model_relation"]) == ("apache-2.0", base, "adapter")


@pytest.mark.long
def test_a_whole_model_is_pushed_and_pulled(toy, train, hub, pushed, client, repo, tmp_path):  # noqa: PLR0917  # fixtures
    run = train(toy(adapter=None, training={"save_strategy": "no", "eval_strategy": "no", "num_train_epochs": 1}))
    assert pushed(run.path, "--repo-id", repo)[0] == 0
    code = re.search(r"```python\n(.*?)```", hub.read(repo, "README.md").decode(), re.DOTALL)[1]
    rows = tmp_path / "run" / runs.VERIFICATION
    difference = client(
        f"{code}\nfrom safetensors.torch import load_file\nfound = load_file({str(rows)!r}); expected = found.pop('logits')\n"
        "print((model.eval()(**found).logits - expected).abs().max().item())"
    )
    assert difference < 1e-5
    data = metadata(hub.read(repo, "README.md").decode())
    assert data["library_name"] == "transformers"
    assert "base_model" not in data  # a folder of this machine


@pytest.mark.long
def test_a_language_model_is_pushed_and_talks(chat, train, hub, pushed, client, repo, tiny_lm):  # noqa: PLR0917  # fixtures
    base = f"{repo}-base"
    upload(client, base, tiny_lm)
    run = train(chat())
    assert pushed(run.path, "--repo-id", repo, "--base", base)[0] == 0
    text = hub.read(repo, "README.md").decode()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    asked = "tokenizer.apply_chat_template([{'role': 'user', 'content': 'hello'}], add_generation_prompt=True, tokenize=False)"
    assert "<|im_start|>assistant" in client(f"{code}\nimport json; print(json.dumps({asked}))")
    assert "## A sample" in text
    assert {m["type"] for m in metadata(text)["model-index"][0]["results"][0]["metrics"]} == {"perplexity", "accuracy", "loss"}


def test_nothing_private_is_published(complete, hub, pushed, repo, tmp_path):
    assert pushed(complete.path, "--repo-id", repo)[0] == 0
    files = published(hub, repo)
    assert sorted(files) == [
        "README.md", "adapter_config.json", ADAPTER, "confusion.png", "curves.png", "recipe.yaml", "resolved.yaml", "run.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    for place in (complete.path, complete.path.parent, tmp_path, Path.home()):
        assert not [name for name, content in files.items() if str(place).encode() in content], place
    record, known = json.loads(files["run.json"]), complete.record
    assert {k: record[k] for k in ("evaluation", "metrics", "labels", "versions")} == {
        k: known[k] for k in ("evaluation", "metrics", "labels", "versions")
    }
    assert list(record["revisions"]) == ["train.csv", "test.csv"]
    assert yaml.safe_load(files["resolved.yaml"])["data"]["train"]["path"] == "train.csv"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] is None
    assert files[ADAPTER] == (complete.path / "adapter" / ADAPTER).read_bytes()


def test_the_token_is_nowhere(complete, hub, pushed, repo, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(complete.path, run)
    assert pushed(run, "--repo-id", repo)[0] == 0
    token = hub.token.encode()
    assert token not in everything(run)
    assert token not in everything(tmp_path)  # the caches, too
    assert not any(token in content for content in published(hub, repo).values())
    assert token not in everything(hub.repository(repo).path)


def test_the_token_of_the_hubs_own_login_is_taken(complete, hub, pushed, repo, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text(hub.token)
    assert pushed(complete.path, "--repo-id", repo, token="")[0] == 0


def test_a_dry_run_lists_what_a_push_sends(complete, hub, pushed, repo):
    status, listed, _ = pushed(complete.path, "--repo-id", repo, "--dry-run", token="")
    assert status == 0
    assert "nothing was sent" in listed
    assert not hub.requests("", repo)
    pushed(complete.path, "--repo-id", repo)
    sizes = {path: f"{len(content):,}" for path, content in published(hub, repo).items()}
    assert sizes.items() <= dict(line.split() for line in listed.splitlines()[: len(sizes)]).items()


def test_the_card_tells_the_run(complete, hub, pushed, repo):
    pushed(complete.path, "--repo-id", repo)
    text = hub.read(repo, "README.md").decode()
    data, record = metadata(text), complete.record
    assert not list(problems_of(data))
    (result,) = data["model-index"][0]["results"]
    after = record["evaluation"]["test"]["after"]
    figures = {(m["type"], m["name"]): m["value"] for m in result["metrics"]}
    assert figures["accuracy", "accuracy"] == pytest.approx(after["accuracy"], abs=1e-6)
    assert figures["f1", "macro F1"] == round(after["f1_macro"], 6)
    assert result["dataset"] == {"name": "test", "type": "test.csv"}
    assert data["tags"] == ["scalepeft", "lora"]
    assert "license" not in data
    for told in ("| test | accuracy | ", "![curves](curves.png)", "learning_rate: 0.01", "licence", "unknown", "| torch | "):
        assert told in text


def test_the_licences_of_base_and_data_are_told(complete, tmp_path):
    shutil.copytree(complete.path, tmp_path / "run")
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: own\nlicense_link: https://example.org/own\n---\n")
    found = card.origin(str(base), "model", None)
    assert found.licence_shown == "[own](https://example.org/own)"
    assert card.origin("fetched:SmolLM2-135M-Instruct", "model", None).licence == {"license": "apache-2.0"}
    assert card.origin(str(tmp_path / "run"), "model", None).licence_shown == "unknown"
    run = Run(tmp_path / "run")
    recipe = run.path / runs.RESOLVED
    recipe.write_text(recipe.read_text().replace(run.recipe().model.name_or_path, str(base)))
    assert card.base_of(run, "alice/base").licence == found.licence  # of the folder, where the Hub names none
    (base / "README.md").write_text("---\nlicense: [a: b\n---\n")  # no YAML
    assert card.origin(str(base), "model", None).licence_shown == "unknown"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("/home/me/data/train.csv", "train.csv"),
        ("~/data/train.csv", "train.csv"),
        ("/home/me/My Data/train.csv", "train.csv"),
        ("output_dir=/scratch/me/runs/a", "output_dir=a"),
        ("saved in /a/b/checkpoint-3; the same command resumes", "saved in checkpoint-3; the same command resumes"),
        ("file:///home/me/x.csv", "x.csv"),
        ("https://huggingface.co/a/b/c", "https://huggingface.co/a/b/c"),
        ("nyu-mll/multi_nli", "nyu-mll/multi_nli"),
        ("runs/quickstart", "runs/quickstart"),
        ("1/2/3 and and/or", "1/2/3 and and/or"),
    ],
)
def test_paths_lose_their_folders(text, left):
    assert card.without_places([{"a": text}]) == [{"a": left}]


# --- twice, half, and beside others ----------------------------------------------------------------------------------


def test_pushing_twice_changes_nothing(complete, hub, pushed, repo):
    pushed(complete.path, "--repo-id", repo)
    sent = len(hub.requests("PUT", repo))
    assert pushed(complete.path, "--repo-id", repo)[:2] == (0, f"nothing to push: {repo} has all of it (private)\n")
    assert hub.commits(repo) == ["Pushed by scalepeft", "initial commit"]
    assert len(hub.requests("PUT", repo)) == sent == 3  # the adapter and two pictures


@pytest.mark.long
def test_a_changed_run_is_one_more_commit_and_leaves_what_is_not_ours(complete, hub, pushed, client, repo, toy, train):  # noqa: PLR0917  # fixtures
    pushed(complete.path, "--repo-id", repo)
    code = f"HfApi().upload_file(repo_id={repo!r}, path_in_repo='notes.txt', path_or_fileobj=b'mine')"
    client(f"from huggingface_hub import HfApi; {code}; print(1)")
    run = train(toy(adapter=None, training={"save_strategy": "no", "eval_strategy": "no", "max_steps": 1}))
    status, said, _ = pushed(run.path, "--repo-id", repo)
    assert status == 0
    assert "2 of an earlier push taken away" in said
    assert {"model.safetensors", "config.json", "notes.txt"} <= set(hub.files(repo))
    assert not {ADAPTER, "adapter_config.json"} & set(hub.files(repo))
    assert len(hub.commits(repo)) == 4


@pytest.mark.long
def test_a_branch_is_made_and_main_stays(complete, hub, pushed, repo):
    pushed(complete.path, "--repo-id", repo, "--revision", "v1")
    assert list(hub.files(repo)) == [".gitattributes"]
    assert ADAPTER in hub.files(repo, "v1")


@pytest.mark.long
def test_a_push_that_was_killed_goes_on(complete, hub, repo, tmp_path, pushed):
    hub.fail({"method": "PUT", "path": f"{repo}/objects", "do": "stall", "skip": 1})
    environment = os.environ | hub.environment(tmp_path / "home")
    process = subprocess.Popen([sys.executable, "-m", "scalepeft", "push", complete.path, "--repo-id", repo], env=environment)
    until = time.monotonic() + 60
    while not hub.requests("POST", f"{repo}/verify") and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    arrived = {line["path"] for line in hub.requests("PUT", repo) if line["status"] == 200}
    assert len(arrived) == 1
    assert hub.commits(repo) == ["initial commit"]
    before = len(hub.requests())
    assert pushed(complete.path, "--repo-id", repo)[0] == 0
    again = {line["path"] for line in hub.requests()[before:] if line["method"] == "PUT"}
    assert len(again) == 2
    assert not again & arrived
    assert hub.commits(repo) == ["Pushed by scalepeft", "initial commit"]


@pytest.mark.long
def test_a_connection_that_is_cut_is_taken_up_again(complete, hub, pushed, repo):
    hub.fail({"method": "PUT", "path": f"{repo}/objects", "do": "cut", "after": 10_000})
    assert pushed(complete.path, "--repo-id", repo)[0] == 0
    assert hub.read(repo, ADAPTER) == (complete.path / "adapter" / ADAPTER).read_bytes()


@pytest.mark.long
def test_a_commit_whose_answer_is_lost_is_found_done(complete, hub, pushed, repo):
    hub.fail({"method": "POST", "path": f"{repo}/commit", "do": "mute"})
    status, _, told = pushed(complete.path, "--repo-id", repo)
    assert status == 2
    assert re.fullmatch(rf"{repo}: the connection to {hub.url} cannot be made or was lost \(.*\); give the same .*\n", told)
    assert pushed(complete.path, "--repo-id", repo)[1].startswith("nothing to push")
    assert len(hub.commits(repo)) == 2


@pytest.mark.long
def test_a_hub_that_is_lost_is_an_error_and_what_arrived_stays(complete, tmp_path, command):
    hub = Hub(tmp_path / "hub")
    hub.start()
    try:
        hub.fail({"method": "PUT", "path": "objects", "do": "die", "after": 5_000})
        done = command("push", complete.path, "--repo-id", "alice/a", **hub.environment(tmp_path / "home"))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"alice/a: the connection to {hub.url} cannot be made or was lost")
        hub.start()
        done = command("push", complete.path, "--repo-id", "alice/a", **hub.environment(tmp_path / "home"))
        assert done.returncode == 0
        assert hub.commits("alice/a") == ["Pushed by scalepeft", "initial commit"]
    finally:
        hub.stop()


@pytest.mark.long
def test_a_hub_that_restarts_is_waited_for(complete, tmp_path):
    hub = Hub(tmp_path / "hub")
    hub.start()
    try:
        hub.fail({"method": "PUT", "path": "objects", "do": "die", "after": 10_000})
        environment = os.environ | hub.environment(tmp_path / "home")
        process = subprocess.Popen(
            [sys.executable, "-m", "scalepeft", "push", complete.path, "--repo-id", "alice/a"], env=environment
        )
        assert hub.process is not None
        hub.process.wait(60)
        hub.start()
        assert process.wait(60) == 0
        assert hub.read("alice/a", ADAPTER) == (complete.path / "adapter" / ADAPTER).read_bytes()
    finally:
        hub.stop()


@pytest.mark.long
def test_a_commit_of_somebody_else_meanwhile_is_not_covered(complete, hub, client, repo, tmp_path, pushed):  # noqa: PLR0917
    """The parent is stale: the Hub answers 412."""
    hub.fail({"method": "PUT", "path": f"{repo}/objects", "do": "stall", "skip": 1})
    environment = os.environ | hub.environment(tmp_path / "home")
    command = [sys.executable, "-m", "scalepeft", "push", complete.path, "--repo-id", repo]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not hub.requests("POST", f"{repo}/verify") and time.monotonic() < until:
        time.sleep(0.1)
    code = f"HfApi().upload_file(repo_id={repo!r}, path_in_repo='notes.txt', path_or_fileobj=b'mine', commit_message='mine')"
    client(f"from huggingface_hub import HfApi; {code}; print(1)")
    hub.fail()
    told = process.communicate(timeout=60)[1]
    assert (process.returncode, told) == (
        2,
        f"{repo}: it was changed by somebody else meanwhile; give the same command again: what has arrived is not sent again\n",
    )
    assert hub.commits(repo) == ["mine", "initial commit"]
    sent = len(hub.requests("PUT", repo))
    assert pushed(complete.path, "--repo-id", repo)[0] == 0
    assert len(hub.requests("PUT", repo)) == sent
    assert {"notes.txt", ADAPTER} <= set(hub.files(repo))


@pytest.mark.long
@pytest.mark.parametrize(
    ("status", "told"),
    [
        (401, "the Hub refuses the token"),
        (403, "this token may not write there"),
        (404, "there is no such repository, or this token may not see it"),
        (500, "the Hub fails (500); later give the same command again"),
    ],
)
def test_what_the_hub_answers_is_told_in_a_line(complete, hub, pushed, repo, status, told):  # noqa: PLR0917  # fixtures
    hub.fail({"method": "POST", "path": f"{repo}/commit", "do": status})
    ended, _, error = pushed(complete.path, "--repo-id", repo)
    assert (ended, error.count("\n")) == (2, 1)
    assert error.startswith(f"{repo}: {told}")
    assert hub.commits(repo) == ["initial commit"]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--repo-id", "alice//x"], "--repo-id: 'alice//x' is no repository id"),
        (["--repo-id", "x"], "--repo-id: 'x' is no repository id; it is USER/NAME"),
        (["--repo-id", "alice/../x"], "is no repository id"),
        ([], "command line: --repo-id USER/NAME is missing"),
        (["--repo-id", "alice/x", "--base", "./base"], "--base: './base' is no repository id"),
        (["--repo-id", "alice/x", "--with-adapter"], "--with-adapter goes with --merge"),
    ],
)
def test_a_malformed_command_is_refused(complete, given, told):
    with pytest.raises(UserError) as refused:
        push.main([str(complete.path), *given])
    assert len(refused.value.problems) == 1
    assert told in str(refused.value)


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("", "there is no token to push with; set HF_TOKEN, or log in: hf auth login"),
        ("hf_wrong", "the Hub refuses the token"),
        ("reads", "this token may not write there"),  # seen before it is tried
        ("bobs", "this token may not write there"),
    ],
)
def test_tokens_that_cannot_push(complete, hub, pushed, repo, token, told):  # noqa: PLR0917  # fixtures
    status, said, error = pushed(complete.path, "--repo-id", repo, token=getattr(hub, token, token))
    assert (status, said, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"{repo}: {told}")
    assert not hub.repository(repo).path.exists()


def test_a_token_that_only_reads_changes_no_repository(complete, hub, pushed, repo):
    pushed(complete.path, "--repo-id", repo)
    for token in (hub.reads, hub.bobs):
        status, _, error = pushed(complete.path, "--repo-id", repo, "--base", "other/base", token=token)
        assert (status, error.count("\n")) == (2, 1)
    assert len(hub.commits(repo)) == 2


def test_a_public_repository_is_not_taken_for_private(complete, hub, pushed, client, repo):
    client(f"from huggingface_hub import HfApi; HfApi().create_repo({repo!r}, private=False); print(1)")
    status, _, error = pushed(complete.path, "--repo-id", repo)
    assert (status, error.count("\n")) == (2, 1)
    assert "is public, and the push is to be private; make it private on the Hub, or push with --public" in error
    assert hub.commits(repo) == ["initial commit"]
    assert pushed(complete.path, "--repo-id", repo, "--public")[1].endswith("public\n")


def test_public_has_to_be_said(complete, hub, pushed, repo):
    pushed(complete.path, "--repo-id", repo, "--public")
    assert not hub.repository(repo).private


def test_a_hub_that_is_not_there(complete, pushed, repo):
    status, _, error = pushed(complete.path, "--repo-id", repo, HF_ENDPOINT="http://127.0.0.1:9")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"{repo}: the connection to http://127.0.0.1:9 cannot be made")
    status, _, error = pushed(complete.path, "--repo-id", repo, HF_HUB_OFFLINE="1")
    assert (status, error.count("\n")) == (2, 1)
    assert error.startswith(f"{repo}: HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda run: run.update(status="running"), "the run is running; train it to the end first"),
        (lambda run: run.update(status="failed", reason="odd"), "the run is failed (odd); train it to the end first"),
        (lambda run: (run.path / "run.json").unlink(), "is neither a run (no run.json) nor a model"),
        (lambda run: shutil.rmtree(run.path), "there is no such folder"),
        (lambda run: (run.path / "adapter" / ADAPTER).unlink(), "holds no weights"),
        (lambda run: (run.path / "adapter" / ADAPTER).write_bytes(b"torn"), "is damaged"),
        (lambda run: (run.path / "adapter" / "adapter_config.json").write_text("{"), "is damaged: it is no JSON"),
        (
            lambda run: (run.path / "recipe.yaml").write_text("# hf_" + "a" * 34),
            "recipe.yaml: holds a token of the Hub; take it out",
        ),
    ],
)
def test_what_is_no_complete_run_is_refused(complete, tmp_path, change, told):
    run = Run(tmp_path / "run")
    shutil.copytree(complete.path, run.path)
    (run.path / "config.json").unlink()
    change(run)
    with pytest.raises(UserError) as refused:
        push.main([str(run.path), "--repo-id", "alice/x", "--dry-run"])
    assert len(refused.value.problems) == 1
    assert told in str(refused.value)


def test_of_what_is_refused_nothing_is_sent(complete, hub, pushed, repo, tmp_path):
    shutil.copytree(complete.path, tmp_path / "run")
    (tmp_path / "run" / "adapter" / ADAPTER).write_bytes(b"torn")
    status, said, error = pushed(tmp_path / "run", "--repo-id", repo)
    assert (status, said, error.count("\n")) == (2, "", 1)
    assert "is damaged" in error
    assert not hub.repository(repo).path.exists()


# --- folders and merged models ---------------------------------------------------------------------------------------


def test_a_folder_with_an_adapter_is_pushed_without_a_run(complete, hub, pushed, repo, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(complete.path / "adapter", folder)
    (folder / "training_args.bin").write_bytes(b"pickle")
    status, _, told = pushed(folder, "--repo-id", repo, "--base", "alice/base")
    assert status == 0
    assert told == f"{folder / 'training_args.bin'}: left out: a pickle can run code when it is loaded\n"
    assert sorted(published(hub, repo)) == [
        "README.md", "adapter_config.json", ADAPTER, "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    text = hub.read(repo, "README.md").decode()
    assert metadata(text)["base_model"] == "alice/base"
    assert "Model Card for Model ID" not in text
    assert "PeftModel.from_pretrained" in text


def test_a_folder_keeps_its_own_card(complete, hub, pushed, repo, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(complete.path / "adapter", folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    pushed(folder, "--repo-id", repo)
    assert hub.read(repo, "README.md") == b"---\nlicense: mit\n---\n# Mine\n"


@pytest.fixture
def merged(complete, tmp_path, tiny_model) -> Path:
    """The run with a merged model in it, as `scalepeft merge` leaves one."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    quiet_upstream()
    run, folder = tmp_path / "run", tmp_path / "run" / "merged"
    shutil.copytree(complete.path, run)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, **labels)
    PeftModel.from_pretrained(base, run / "adapter").merge_and_unload().save_pretrained(folder)
    AutoTokenizer.from_pretrained(run / "adapter").save_pretrained(folder)
    told = {"base": str(tiny_model), "adapters": {str(run / "adapter"): 1.0}}
    (folder / "merge.json").write_text(json.dumps(told))
    return folder


def answers(client, code: str, run: Path) -> float:
    """The largest difference of a loaded model's logits from those of the trained one."""
    return client(
        f"{code}\nfrom safetensors.torch import load_file\n"
        f"found = load_file({str(run / runs.VERIFICATION)!r}); expected = found.pop('logits')\n"
        "print((model.eval()(**found).logits - expected).abs().max().item())"
    )


@pytest.mark.long
def test_a_merged_model_is_pushed_with_the_card_of_its_run(merged, hub, pushed, client, repo, tmp_path):  # noqa: PLR0917
    status, _, warned = pushed(merged, "--repo-id", repo, "--base", "alice/base")
    assert (status, warned) == (0, "")
    assert {"model.safetensors", "config.json", "merge.json", "run.json"} <= set(hub.files(repo))
    assert not any(str(tmp_path).encode() in content for content in published(hub, repo).values())
    text = hub.read(repo, "README.md").decode()
    data = metadata(text)
    assert (data["library_name"], data["base_model_relation"], data["base_model"]) == ("transformers", "finetune", "alice/base")
    assert answers(client, re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], merged.parent) < 1e-4


def test_the_card_of_a_merged_model_tells_the_merge(merged):
    told = json.loads((merged / "merge.json").read_text())
    told |= {"merged_on": "dequantized", "reason": "nearer to what was trained"}
    told["proof"] = {"method": "logits", "rows": 32, "max_difference": 3e-5, "bound": 1e-4}
    told["verify"] = {
        "rows": 32,
        "loss_rows": 70,
        "adapter_on_base": {"loss": 0.51},
        "merged_on_dequantized": {"loss": 0.5125, "mean_difference": 0.001, "max_difference": 0.02},
    }
    (merged / "merge.json").write_text(json.dumps(told))
    files = push.pack_run(Run(merged.parent), "alice/x", base="a/b", merged=merged, with_adapter=False)
    (text,) = (file.content.decode() for file in files if file.path == "README.md")
    _, _, section = text.partition("## The merge\n\n")
    assert section.startswith("Merged into the dequantized weights of the base: nearer to what was trained.")
    assert "the logits of 32 rows differ by at most 3e-05 (allowed: 0.0001)" in section
    assert "the loss over 70" in section
    assert "| merged on dequantized | 0.5125 | 0.001 | 0.02 |" in section


def test_a_merged_model_and_its_adapter_in_one_repository(merged):
    files = {
        file.path: file for file in push.pack_run(Run(merged.parent), "alice/x", base="a/b", merged=merged, with_adapter=True)
    }
    assert {"model.safetensors", "adapter/adapter_model.safetensors", "adapter/adapter_config.json"} <= set(files)
    assert "adapter_config.json" not in files  # beside config.json a loader would lay it over the merged model
    text = files["README.md"].content.decode()
    assert 'PeftModel.from_pretrained(base, "alice/x", subfolder="adapter")' in text
    assert 'AutoModelForSequenceClassification.from_pretrained("alice/x")' in text


@pytest.mark.long
def test_a_run_is_merged_proved_and_pushed(complete, hub, pushed, client, repo, tmp_path):  # noqa: PLR0917  # fixtures
    pytest.importorskip("scalepeft.merge")
    shutil.copytree(complete.path, tmp_path / "run")
    given = (tmp_path / "run", "--repo-id", repo, "--merge", "--with-adapter", "--base", "alice/base")
    assert pushed(*given)[0] == 0
    text = hub.read(repo, "README.md").decode()
    assert "A fresh process compared what was written with base and adapter: the logits of" in text
    code = re.search(r"```python\n(.*?)# or the adapter", text, re.DOTALL)[1]
    assert answers(client, code, complete.path) < 1e-4
    assert {"model.safetensors", f"adapter/{ADAPTER}"} <= set(hub.files(repo))
    assert pushed(*given)[1].endswith(f"nothing to push: {repo} has all of it (private)\n")


# --- from a recipe ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_recipe_trains_from_the_hub_and_pushes_to_it(hub, client, repo, toy, command, tmp_path, tiny_model):  # noqa: PLR0917  # fixtures
    """Base and rows by Hub id, pushed by training.push_to_hub once the run is verified; private, though nobody says so."""
    base, rows = f"{repo}-base", f"{repo}-rows"
    shutil.copytree(tiny_model, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    upload(client, base, tmp_path / "base")
    recipe = toy()
    (tmp_path / "rows").mkdir()
    for name in ("train.csv", "test.csv"):
        shutil.move(tmp_path / name, tmp_path / "rows" / name)
    (tmp_path / "rows" / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    upload(client, rows, tmp_path / "rows", "dataset")
    given = yaml.safe_load(recipe.read_text())
    given["model"]["name_or_path"] = base
    given["data"]["train"] = {"path": rows, "split": "train"}
    given["data"]["evaluation"]["test"] = {"path": rows, "split": "test"}
    given["training"] |= {"push_to_hub": True, "hub_model_id": repo.partition("/")[2], "num_train_epochs": 2}
    recipe.write_text(yaml.safe_dump(given))
    environment = hub.environment(tmp_path / "home")
    done = command("train", recipe, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("private")
    assert hub.repository(repo).private
    assert hub.commits(repo) == ["Pushed by scalepeft", "initial commit"]
    commit = hub.repository(base).branches()["main"]
    data = metadata(hub.read(repo, "README.md").decode())
    assert (data["base_model"], data["license"], data["datasets"]) == (base, "mit", [rows])
    assert data["model-index"][0]["results"][0]["dataset"] == {
        "name": "test", "type": rows, "split": "test", "revision": hub.repository(rows, "datasets").branches()["main"],
    }  # fmt: skip
    text = hub.read(repo, "README.md").decode()
    assert f'from_pretrained("{base}", revision="{commit}"' in text
    assert "cc-by-4.0" in text
    assert not list((tmp_path / "run").rglob("training_args.bin"))
    assert hub.token.encode() not in everything(tmp_path)
    # the same command pushes what is missing, which is nothing
    again = command("train", recipe, **environment)
    assert "is complete already" in again.stdout
    assert again.stdout.endswith(f"nothing to push: {repo} has all of it (private)\n")
    # the rows of a data set of the Hub can also be read while training
    streamed = ["data.train.streaming=true", "training.max_steps=6"]
    streamed += ["training.push_to_hub=false", f"training.output_dir={tmp_path}/streamed"]
    done = command("train", recipe, *streamed, **environment)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "streamed/run.json").read_text())
    assert record["data"]["rows"]["train"] == 96
    assert record["revisions"][rows] == hub.repository(rows, "datasets").branches()["main"]
    # and the run is found by its recipe's own words
    assert command("push", tmp_path / "run", **environment).stdout.startswith("nothing to push")


@pytest.mark.long
@pytest.mark.parametrize(
    ("changes", "token", "told"),
    [
        ({"hub_model_id": "a//b"}, None, "training.hub_model_id: 'a//b' is no repository id"),
        ({"hub_model_id": "alice/early"}, "", "there is no token to push with"),
        ({"hub_model_id": "alice/early"}, "hf_wrong", "the Hub refuses the token"),
        ({"hub_model_id": "alice/early"}, "reads", "this token may not write there"),
    ],
)
def test_a_push_that_cannot_be_is_told_before_training(hub, toy, command, tmp_path, changes, token, told):  # noqa: PLR0917  # fixtures
    recipe = toy(training={"push_to_hub": True, **changes})
    done = command("train", recipe, **hub.environment(tmp_path / "home", getattr(hub, token or "", token)))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert told in done.stderr
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_says_of_the_repository(toy):
    from scalepeft import recipe as recipes

    assert push.target_of(recipes.load(toy())) == push.Target(repo_id="run", private=True)
    told = {"hub_model_id": "a/b", "hub_private_repo": False, "hub_revision": "v1"}
    assert push.target_of(recipes.load(toy(training=told))) == push.Target(repo_id="a/b", private=False, revision="v1")
    with pytest.raises(UserError, match="hub_strategy is not needed: a run is pushed once"):
        recipes.load(toy(training={"hub_strategy": "every_save"}))
