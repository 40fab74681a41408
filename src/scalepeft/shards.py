"""Safetensors files as they lie on disk: a base's, checked before anything is read, and those that a merge writes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from scalepeft.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""What safetensors calls torch's dtypes."""

_LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself reads no longer one."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one tensor in what is written."""

    name: str
    """Its name in the file."""
    key: str
    """Its name in the model; equal to `name` where the model does not rename."""
    dtype: torch.dtype
    """The dtype it is written in."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Checkpoint:
    """The tensors of a folder of safetensors, mapped into memory when asked for: mapped pages are the system's to drop."""

    def __init__(self, folder: Path) -> None:
        """Check that every shard is there and whole. Raises UserError with a line for each that is not."""
        self.folder = folder
        self._files = _files(folder)
        self._open: dict[str, Any] = {}

    @property
    def names(self) -> Sequence[str]:
        """The names of all tensors, file by file."""
        return list(self._files)

    def get(self, name: str) -> torch.Tensor:
        """A tensor whose storage is the mapped file: it costs memory only where it is written to."""
        file = self._files[name]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, framework="pt")
        found: torch.Tensor = self._open[file].get_tensor(name)
        return found

    def widest(self) -> str:
        """The name of the widest dtype of its weights."""
        kinds = {tensor.dtype for tensor in map(self.get, self.names) if tensor.is_floating_point()}
        return str(max(kinds, key=lambda kind: (kind.itemsize, str(kind)))).removeprefix("torch.")

    def fingerprint(self) -> list[list[Any]]:
        """What a file that is replaced does not keep: name, size and time of change."""
        stats = [(file, (self.folder / file).stat()) for file in sorted(set(self._files.values()))]
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def _files(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            told = f"{folder}: holds neither {SINGLE} nor {INDEX}; a base is merged from safetensors"
            raise UserError(f"{told}, as save_pretrained writes them")
        return dict.fromkeys(header(folder / SINGLE), SINGLE)
    try:
        mapped = json.loads(index.read_bytes())["weight_map"]
        files = {str(name): str(file) for name, file in mapped.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: is damaged: it is no JSON with a weight_map; fetch the base anew") from None
    if foreign := [file for file in files.values() if Path(file).name != file]:
        raise UserError(f"{index}: names {foreign[0]}, which lies outside its folder; fetch the base anew")
    problems: list[str] = []
    held: dict[tuple[str, str], None] = {}
    for file in dict.fromkeys(files.values()):
        try:
            held |= {(file, name): None for name in header(folder / file)}
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    if lies := [(name, file) for name, file in files.items() if (file, name) not in held]:
        name, file = lies[0]
        raise UserError(f"{index}: says that {name} is in {file}, which does not hold it; fetch the base anew")
    if silent := [(file, name) for file, name in held if name not in files]:
        file, name = silent[0]
        raise UserError(f"{index}: does not name {name}, which {file} holds; fetch the base anew")
    return files


def header(file: Path) -> dict[str, Any]:
    """The description of each tensor of a safetensors file that is there and whole; UserError for another."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if length <= _LONGEST_HEADER else b""
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; fetch the base anew") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    try:
        found: dict[str, Any] = json.loads(text)
        found.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in found.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{file}: is damaged: its header cannot be read; fetch the base anew") from None
    if size != 8 + length + end:
        told = f"is {size:,} bytes long, and its header says {8 + length + end:,}"
        raise UserError(f"{file}: is {'truncated' if size < 8 + length + end else 'damaged'}: it {told}; fetch the base anew")
    return found


def planned(slots: Iterable[Sequence[Slot]], limit: int) -> list[list[Slot]]:
    """Groups of tensors that belong together, in shards of at most `limit` bytes each unless one group is larger."""
    shards: list[list[Slot]] = [[]]
    filled = 0
    for group in slots:
        size = sum(slot.bytes for slot in group)
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1] += group
        filled += size
    # wide dtypes first, so that every tensor begins at a multiple of its item: readers map it in place
    return [sorted(shard, key=lambda slot: -slot.dtype.itemsize) for shard in shards if shard]


def shard_name(number: int, of: int) -> str:
    """The name of shard `number`, counted from 0, as transformers looks for it."""
    return SINGLE if of == 1 else f"model-{number + 1:05}-of-{of:05}.safetensors"


def write(file: Path, slots: Sequence[Slot], parts: Callable[[Slot], Iterable[torch.Tensor]]) -> str:
    """Write a shard beside and rename it when it is whole and on the disk; returns its sha256.

    `parts` gives a tensor's values in their order, in as many tensors as it likes: no more than two of them are held, the one
    that is hashed meanwhile among them.
    """
    beside = file.with_name(f"{file.name}.part")
    digest = hashlib.sha256()
    with beside.open("wb", buffering=0) as stream, ThreadPoolExecutor(1) as hashing:
        hashed: Future[None] | None = None
        for content in _contents(slots, parts):
            if hashed is not None:
                hashed.result()
            hashed = hashing.submit(digest.update, content)
            while content:
                content = content[stream.write(content) :]  # noqa: PLW2901  # the rest of a short write
        os.fsync(stream.fileno())
    beside.replace(file)
    return digest.hexdigest()


def _contents(slots: Sequence[Slot], parts: Callable[[Slot], Iterable[torch.Tensor]]) -> Iterator[memoryview]:
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for slot in slots:
        offsets = [start, start := start + slot.bytes]
        described[slot.name] = {"dtype": _CODES[slot.dtype], "shape": list(slot.shape), "data_offsets": offsets}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for slot in slots:
        written = 0
        for tensor in parts(slot):
            assert tensor.dtype == slot.dtype, slot  # noqa: S101  # our own plan
            written += tensor.numel()
            yield raw(tensor)
        assert written == torch.Size(slot.shape).numel(), slot  # noqa: S101


def raw(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, not copied where they lie in order."""
    values: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def index(shards: Sequence[Sequence[Slot]]) -> dict[str, Any]:
    """The index of several shards, with the size of all tensors in bytes."""
    of = len(shards)
    files: Mapping[str, str] = {slot.name: shard_name(number, of) for number, shard in enumerate(shards) for slot in shard}
    size = sum(slot.bytes for shard in shards for slot in shard)
    return {"metadata": {"total_size": size}, "weight_map": dict(sorted(files.items()))}
