"""One voice: what a command says, on rank 0 only, with upstream's chatter kept out of it."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterable, Sequence


def speaks() -> bool:
    """Whether this process is the one that talks: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str = "") -> None:
    """Print a line on stdout, on rank 0 only."""
    if speaks():
        print(text, flush=True)


def note(text: str) -> None:
    """Print a line on stderr, on rank 0 only: for what is not the command's result."""
    if speaks():
        print(text, file=sys.stderr, flush=True)


def table(rows: Iterable[Sequence[str]], *, right: bool = True) -> str:
    """Rows of cells as aligned columns: the first to the left, the others to the right (or left)."""
    cells = [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(max(map(len, cells), default=0))]
    lines = []
    for row in cells:
        aligned = [c.ljust(w) if i == 0 or not right else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def quiet_upstream() -> None:
    """Silence what upstream says at import and while loading that a user can do nothing about. Call before importing it."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("DATASETS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers tell the Hub what is trained
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # set at all, it also stops a warning at each fork of a loader
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # "Failed to load CPU gemm_4bit_forward": a slower kernel serves
    # DDP's remark that no parameter was unused: upstream lets it look for some, since an adapter may leave some
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # peft 0.21 reads a name that transformers 5.23 renamed, DeepSpeed 0.19 calls functions that torch 2.13 renamed
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # peft takes AdaLoRA's own rank pattern, by its tensors' names, for LoRA's, by modules' names
    warnings.filterwarnings("ignore", message=r"The following rank_pattern keys .*\.lora_E'", category=RuntimeWarning)
