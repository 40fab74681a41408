"""Publishing: the result of a run, or a folder of weights, as a repository of the Hub, private unless said otherwise."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import importlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from scalepeft import card
from scalepeft import recipe as recipes
from scalepeft import run as runs
from scalepeft.console import note, quiet_upstream, say, table
from scalepeft.errors import UserError, one_line, program
from scalepeft.recipe import Recipe
from scalepeft.run import Run

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PUBLISHED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".py", ".spm", ".tiktoken")
"""Endings of the files of weights, configurations and tokenizers that are published. No pickles: they can run code."""
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
_PICTURES = ("curves.png", "confusion.png")
_REPLACED = ("*.safetensors", "*.safetensors.index.json", "adapter_config.json", "config.json", "merge.json")
"""What a push takes away of an earlier one: left beside other weights, a loader would take it for a part of them."""
_SECRET = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_MERGED = "merge.json"
"""What `scalepeft merge` leaves beside a merged model."""


@dataclass(frozen=True, kw_only=True)
class File:
    """A file to publish."""

    path: str
    """In the repository."""
    content: Path | bytes
    """Where it lies, or what is written for the repository alone."""

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where to publish."""

    repo_id: str
    private: bool = True
    revision: str | None = None
    """The branch; main when absent."""


def main(arguments: Sequence[str]) -> int:
    """`scalepeft push RUN|DIR --repo-id USER/NAME [--merge] [--dry-run]`."""
    parser = argparse.ArgumentParser(
        prog="scalepeft push",
        description="Publish a complete run, or a folder with a model or adapter, as a repository of the Hub with a model card."
        " The token is taken from HF_TOKEN or from `hf auth login`.",
    )
    parser.add_argument("folder", metavar="RUN|DIR", type=Path, help="a run directory, a merged model or an adapter folder")
    parser.add_argument("--repo-id", metavar="USER/NAME", help="the repository; the recipe's training.hub_model_id when absent")
    parser.add_argument("--merge", action="store_true", help="of a run: merge the adapter into its base and publish that model")
    parser.add_argument("--with-adapter", action="store_true", help="with --merge: publish the adapter, too, in adapter/")
    parser.add_argument("--base", metavar="USER/NAME", help="the Hub id of a base that was trained from a folder")
    parser.add_argument("--public", action="store_true", help="for everybody to see; a new repository is private otherwise")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to push to, made when it is not there (main)")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and send nothing")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: there is no such folder")
    run = _run(options.folder)
    if options.with_adapter and not options.merge:
        raise UserError("command line: --with-adapter goes with --merge; without it the adapter is what is pushed")
    if options.merge and (run is None or run.recipe().adapter is None):
        raise UserError(f"{options.folder}: --merge takes a run with an adapter; this has none to merge")
    if options.base:
        _check_repo_id("--base", options.base, namespace=False)
    target = _target(options, run)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its warnings of retries quote links that are signed
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_upstream()
    if not options.dry_run:
        target = _asked(target)
    merged = _merge(run) if options.merge and run else None
    files = (
        pack_run(run, target.repo_id, base=options.base, merged=merged, with_adapter=options.with_adapter)
        if run
        else pack_folder(options.folder, target.repo_id, base=options.base)
    )
    _refuse_secrets(files)
    say(_listing(files, target) if options.dry_run else publish(files, target))
    if run and run.recipe().adapter is not None and merged is None and card.base_of(run, options.base).hub_id is None:
        hint = "the card says so; --base USER/NAME names it on the Hub"
        note(f"{run.path}: the base {run.recipe().model.name_or_path} is not on the Hub by that name; {hint}")
    return 0


def _listing(files: Sequence[File], target: Target) -> str:
    total = sum(file.size for file in files)
    listed = table([*((file.path, f"{file.size:,}") for file in files), (f"{len(files)} files", f"{total:,} bytes")])
    return f"{listed}\n{target.repo_id}: {'private' if target.private else 'public'}; nothing was sent"


def target_of(recipe: Recipe) -> Target:
    """Where a recipe says that its run is to be published: training.hub_model_id, or the name of the run directory."""
    told = recipe.training
    return Target(
        repo_id=str(told.get("hub_model_id") or recipe.output_dir.absolute().name),
        private=told.get("hub_private_repo") is not False,
        revision=told.get("hub_revision"),
    )


def check(recipe: Recipe) -> None:
    """Whether a recipe's run could be published: asked before it is trained. Nothing is sent but the question.

    Raises UserError when the name is malformed, the token missing or refused, or the repository open to everybody.
    """
    target = target_of(recipe)
    _check_repo_id("training.hub_model_id", target.repo_id, namespace=False)
    _asked(target)


def in_place_of_this(run: Run) -> NoReturn:
    """Become the push that a run's recipe asks for; what this process holds in memory is gone."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "scalepeft.push", str(run.path)])  # noqa: S606  # our own program


def _run(folder: Path) -> Run | None:
    """The complete run of a folder; None when it holds none."""
    if not (folder / runs.RECORD).is_file():
        return None
    run = Run(folder)
    if (status := run.record.get("status")) != "complete":
        reason = f" ({run.record['reason']})" if run.record.get("reason") else ""
        raise UserError(f"{folder}: the run is {status}{reason}; train it to the end first")
    return run


def _target(options: argparse.Namespace, run: Run | None) -> Target:
    told = target_of(run.recipe()) if run else Target(repo_id="")
    named = options.repo_id or (run and run.recipe().training.get("hub_model_id"))
    if not named and not (run and run.recipe().training.get("push_to_hub")):
        raise UserError("command line: --repo-id USER/NAME is missing")
    _check_repo_id("--repo-id", named or told.repo_id, namespace=bool(options.repo_id))
    return Target(
        repo_id=named or told.repo_id, private=told.private and not options.public, revision=options.revision or told.revision
    )


def _check_repo_id(key: str, repo_id: str, *, namespace: bool) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    problem = "it is USER/NAME, with letters, digits, '-', '_' and '.'"
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise UserError(f"{key}: {repo_id!r} is no repository id; {problem}") from None
    if namespace and "/" not in repo_id:
        raise UserError(f"{key}: {repo_id!r} is no repository id; {problem}")


# --- what is published -----------------------------------------------------------------------------------------------


def pack_run(run: Run, repo_id: str, *, base: str | None, merged: Path | None, with_adapter: bool) -> list[File]:
    """The files of a run's result: weights, card, pictures, recipe and record. Of a merged model, the folder `merged`."""
    origin = card.base_of(run, base)
    adapted = run.recipe().adapter is not None
    files = _weights(merged or run.weights, base=origin.hub_id)
    adapter_in = None if not adapted else "adapter" if with_adapter else "" if merged is None else None
    if adapter_in:
        files += _weights(run.weights, base=origin.hub_id, under=f"{adapter_in}/")
    pictures = [name for name in _PICTURES if (run.path / name).is_file()]
    merge = _without_names(_read_json(merged / _MERGED)) if merged else None
    text = card.card(run, repo_id, origin, merge=merge, adapter_in=adapter_in, pictures=pictures)
    kept = {key: value for key, value in run.record.items() if key in ("labels", "evaluation", "sample")}  # names and texts
    record = card.without_places(run.record) | kept
    files += [
        File(path="README.md", content=text.encode()),
        *(File(path=name, content=run.path / name) for name in pictures),
        File(path=runs.RECIPE, content=card.places_cut((run.path / runs.RECIPE).read_text(encoding="utf-8")).encode()),
        File(path=runs.RESOLVED, content=recipes.dump(card.without_places(run.recipe().resolved())).encode()),
        File(path=runs.RECORD, content=_json(record)),
    ]
    return sorted(files, key=lambda file: file.path)


def pack_folder(folder: Path, repo_id: str, *, base: str | None) -> list[File]:
    """The files of a folder with a model or an adapter, with its own card, or one that says how it is loaded."""
    told = _read_json(folder / _MERGED)
    merged_from = [Path(path).parent for path in told.get("adapters", ())]
    if len(merged_from) == 1 and (trained := _run(merged_from[0])):  # its card is that of the run
        return pack_run(trained, repo_id, base=base, merged=folder, with_adapter=False)
    adapter = (folder / "adapter_config.json").is_file()
    if not adapter and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: is neither a run (no {runs.RECORD}) nor a model (no config.json, no adapter_config.json)")
    config = _read_json(folder / ("adapter_config.json" if adapter else "config.json"))
    named = base or config.get("base_model_name_or_path") or told.get("base")
    origin = card.origin(str(named), "model", None) if named else None
    files = _weights(folder, base=origin.hub_id if origin else None)
    own = folder / "README.md"
    if own.is_file() and "# Model Card for Model ID" not in own.read_text(encoding="utf-8"):  # not peft's blank form
        text = own.read_bytes()
    else:
        kinds = [config.get("task_type") or "", *config.get("architectures", [])]
        classifies = any("SEQ_CLS" in kind or "SequenceClassification" in kind for kind in kinds)
        auto = "AutoModelForSequenceClassification" if classifies else "AutoModelForCausalLM"
        about = card.without_places(told)
        text = card.plain_card(repo_id, origin, adapter=adapter, auto=auto, told=about).encode()
    return sorted([*files, File(path="README.md", content=text)], key=lambda file: file.path)


def _weights(folder: Path, *, base: str | None, under: str = "") -> list[File]:
    """The weights, configurations and tokenizer of a folder, under `base`, the Hub id of what an adapter is for."""
    files = []
    for path in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
        if path.suffix in _PICKLES:
            note(f"{path}: left out: a pickle can run code when it is loaded")
        if not path.is_file() or path.suffix not in _PUBLISHED:
            continue
        content: Path | bytes = path
        if path.name == "adapter_config.json":
            content = _json(card.without_places(_read_json(path)) | {"base_model_name_or_path": base})
        elif path.name in ("config.json", "tokenizer_config.json", _MERGED):
            content = _json(_without_names(_read_json(path)))
        files.append(File(path=under + path.relative_to(folder).as_posix(), content=content))
    if not any(file.path.endswith(".safetensors") for file in files):
        raise UserError(f"{folder}: holds no weights (no .safetensors file)")
    for file in files:
        if file.path.endswith(".safetensors") and isinstance(file.content, Path):
            _check_weights(file.content)
    return files


def _check_weights(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is damaged ({one_line(error)}); nothing was sent") from None


def _without_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without the places from which it was loaded and, of a tokenizer, without how."""
    cut = ("name_or_path", "is_local", "local_files_only")
    return {key: card.without_places(value) for key, value in values.items() if not key.endswith(cut)}


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: is damaged: it is no JSON") from None
    return found if isinstance(found, dict) else {}


def _refuse_secrets(files: Sequence[File]) -> None:
    """No token leaves in a recipe's comment or in a command line that was written down."""
    from huggingface_hub import get_token

    own = (get_token() or "").encode()
    for file in files:
        if file.path.endswith((".safetensors", ".png")):
            continue
        content = file.content if isinstance(file.content, bytes) else file.content.read_bytes()
        if (own and own in content) or _SECRET.search(content):
            raise UserError(f"{file.path}: holds a token of the Hub; take it out, and revoke it if others have seen it")


def _merge(run: Run) -> Path:
    """The folder of the run's model, merged and proved; one that is there already is taken by `scalepeft merge` as it is."""
    folder = run.path / "merged"
    importlib.import_module("scalepeft.merge").main([str(run.path), "--output", str(folder)])
    return folder


# --- the Hub ---------------------------------------------------------------------------------------------------------


def publish(files: Sequence[File], target: Target) -> str:
    """Publish the files as one commit, and return what was done. Files that the repository has already are not sent.

    Raises UserError when the Hub refuses or cannot be reached. What has arrived until then is not sent again.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, repo_id = _api(), target.repo_id
    with _explained(repo_id):
        if _find(api, target) is None:
            api.create_repo(repo_id, private=target.private)
        if target.revision:
            api.create_branch(repo_id, branch=target.revision, exist_ok=True)
        before = api.model_info(repo_id, revision=target.revision)
        ours = {file.path for file in files}
        there = [sibling.rfilename for sibling in before.siblings or ()]
        gone = [path for path in there if path not in ours and _replaced(path)]
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(file.path, file.content) for file in files),
                *(CommitOperationDelete(path) for path in gone),
            ],
            commit_message="Pushed by scalepeft",
            revision=target.revision,
            parent_commit=before.sha,
            num_threads=1,  # of several, one that waits for a lost Hub closes the client of the others, which then give up
        )
        seen = "private" if before.private else "public"
    if commit.oid == before.sha:
        return f"nothing to push: {repo_id} has all of it ({seen})"
    away = f", {len(gone)} of an earlier push taken away" if gone else ""
    return f"{commit.commit_url}\n{repo_id}: {len(files)} files, {sum(f.size for f in files):,} bytes{away}; {seen}"


def _replaced(path: str) -> bool:
    folder, _, name = path.rpartition("/")
    return folder in ("", "adapter") and any(fnmatch.fnmatch(name, pattern) for pattern in _REPLACED)


def _api() -> HfApi:
    import scalepeft

    quiet_upstream()
    from huggingface_hub import HfApi

    return HfApi(library_name="scalepeft", library_version=scalepeft.__version__)


def _asked(target: Target) -> Target:
    """The target, in the account's own namespace where it names none. The Hub knows the token, and nothing is in the way."""
    from huggingface_hub import get_token

    if not get_token():
        raise UserError(f"{target.repo_id}: there is no token to push with; set HF_TOKEN, or log in: hf auth login")
    with _explained(target.repo_id):
        account = _api().whoami()
        if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
            raise UserError(f"{target.repo_id}: {_ANSWERS[403]}")
        full = target.repo_id if "/" in target.repo_id else f"{account['name']}/{target.repo_id}"
        target = Target(repo_id=full, private=target.private, revision=target.revision)
        _find(_api(), target)
    return target


def _find(api: HfApi, target: Target) -> Any:
    """The repository; None when there is none, or none that this token may see. One that is public is not taken for private."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(target.repo_id)
    except RepositoryNotFoundError:
        return None
    if target.private and not found.private:
        told = "is public, and the push is to be private; make it private on the Hub, or push with --public"
        raise UserError(f"{target.repo_id}: {told}")
    return found


_AGAIN = "give the same command again: what has arrived is not sent again"
_ANSWERS = {
    401: "the Hub refuses the token; see that HF_TOKEN is right, or log in anew: hf auth login",
    403: "this token may not write there; it takes a token with the role write, for a user or organisation of yours",
    404: "there is no such repository, or this token may not see it",
    409: f"it was changed by somebody else meanwhile; {_AGAIN}",
    412: f"it was changed by somebody else meanwhile; {_AGAIN}",
    429: f"the Hub asks to wait (too many requests); later {_AGAIN}",
}


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """What the Hub and the network answer, as one line. No token is in it: the client keeps it in a header."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # huggingface_hub raises its own errors, httpx's, hf_xet's and the system's
        raise UserError(f"{repo_id}: {_explanation(error)}") from error


def _explanation(error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    cause: BaseException = error
    while type(cause) is RuntimeError and cause.__cause__:  # "Error while uploading", around the reason
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, or was, because nothing answered at {constants.ENDPOINT}; without it {_AGAIN}"
    if status in _ANSWERS:
        return _ANSWERS[status]
    if status is not None and status >= 500:
        return f"the Hub fails ({status}); later {_AGAIN}"
    if status is None and isinstance(cause, HTTPError | OSError):
        return f"the connection to {constants.ENDPOINT} cannot be made or was lost ({one_line(cause)}); {_AGAIN}"
    return re.sub(r"\S+[?&](?:key|X-Amz-\w+|Signature)=\S+", "(a signed link)", one_line(error))


if __name__ == "__main__":
    sys.exit(program(main))
