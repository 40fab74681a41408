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
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")  # train says it in a line of its own
    # TRL means to drop the option; until then it does what it says
    warnings.filterwarnings("ignore", message=r"`use_liger_kernel=True` is deprecated", category=FutureWarning)
    # transformers 5.23 renames it; TRL's configurations still set it by the old name
    warnings.filterwarnings("ignore", message=r"`gradient_checkpointing\w*` is deprecated", category=FutureWarning)
    # peft 0.21 reads a name that transformers 5.23 renamed, DeepSpeed 0.19 calls functions that torch 2.13 renamed
    warnings.filterwarnings("ignore", message=r"`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # peft takes AdaLoRA's own rank pattern, by its tensors' names, for LoRA's, by modules' names
    warnings.filterwarnings("ignore", message=r"The following rank_pattern keys .*\.lora_E'", category=RuntimeWarning)
    # of initialisations: that EVA could be made with less memory, and that peft would not convert what adapters.save does
    warnings.filterwarnings("ignore", message="lora with eva initialization used with low_cpu_mem_usage=False")
    warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern")
    warnings.filterwarnings("ignore", message=r"Adapter .* have invalid shape: .*lora_B\.bias")  # a bias has one dimension
    # of peft's types: BOFT's kernel for GPUs, LN_TUNING's layers, which are the ones it is for, a bias that BEFT adds
    warnings.filterwarnings("ignore", message="Failed to load the CUDA extension")
    warnings.filterwarnings("ignore", message="Setting boft_n_butterfly_factor to 1")
    warnings.filterwarnings("ignore", message="Unsupported layer type .* encountered, proceed at your own risk")
    warnings.filterwarnings("ignore", message="Detected that the base layer has no bias term")
    warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
