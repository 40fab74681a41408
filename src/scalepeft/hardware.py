"""Devices by name: the memory that their drivers commonly report and the speed that their makers publish.

No figure of the table is measured here. Train's own verdict is about the device that it finds.
"""

from __future__ import annotations

import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from scalepeft.errors import UserError, did_you_mean

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Device:
    """A kind of accelerator."""

    name: str
    memory: int
    """Bytes: the driver's total, which is mostly less than the size in the name."""
    flops: float | None
    """The most dense operations a second in bfloat16 (float16 where there is none), as published; None when not known."""


# Memory in MiB: for NVIDIA's what nvidia-smi commonly reports as the total, which is less than the name says where ECC or the
# driver keeps a part. A process is given up to some hundred MiB less; none of them is measured here. Of AMD's the nominal size.
# Dense bf16 TFLOP/s of the tensor cores with fp32 accumulation, without sparsity: from NVIDIA's and AMD's data sheets and
# architecture white papers. Of V100 and T4, which have no bf16, those of fp16.
_PUBLISHED = {
    "t4-16gb": (15360, 65.0),
    "v100-16gb": (16160, 125.0),
    "v100-32gb": (32510, 125.0),
    "rtx-3090-24gb": (24576, 71.0),
    "rtx-4090-24gb": (24564, 165.2),
    "rtx-5090-32gb": (32607, 209.5),
    "rtx-a6000-48gb": (49140, 154.8),
    "rtx-6000-ada-48gb": (49140, 364.2),
    "a10-24gb": (23028, 125.0),
    "a10g-24gb": (23028, 70.0),
    "l4-24gb": (23034, 121.0),
    "l40s-48gb": (46068, 362.0),
    "a100-40gb": (40960, 312.0),
    "a100-80gb": (81920, 312.0),
    "h100-80gb": (81559, 989.0),
    "h100-pcie-80gb": (81559, 756.0),
    "h100-nvl-94gb": (95830, 835.0),
    "h200-141gb": (143771, 989.0),
    "b200-180gb": (183359, 2250.0),
    "mi300x-192gb": (192 * 1024, 1307.4),
    "mi325x-256gb": (256 * 1024, 1307.4),
}
DEVICES = {
    name: Device(name=name, memory=memory * 2**20, flops=teraflops * 1e12) for name, (memory, teraflops) in _PUBLISHED.items()
}

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": GIB, "tib": 2**40}


def device(name: str) -> Device:
    """A device by its name. Raises UserError, with suggestions, when the name is not in the table."""
    wanted = name.lower().replace("_", "-").replace(" ", "-")
    if wanted in DEVICES:
        return DEVICES[wanted]
    beginning = [known for known in DEVICES if wanted and known.startswith(wanted)]
    if len(beginning) == 1:
        return DEVICES[beginning[0]]
    several = f"; did you mean {', '.join(map(repr, beginning[:-1]))} or {beginning[-1]!r}?" if beginning else ""
    known = several or did_you_mean(wanted, DEVICES) or f"; there are {', '.join(DEVICES)}"
    raise UserError(f"command line: --gpu {name!r}: no such device{known} (--memory takes any size)")


def of_memory(text: str) -> Device:
    """A device of which only the memory is known. Raises UserError for what is no size."""
    return Device(name=text, memory=size(text), flops=None)


def size(text: str, *, where: str = "command line: --memory") -> int:
    """The bytes of `80GiB`, `24 GB` and the like. Raises UserError for what is no size above 0, with where it stands."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b)\s*", text, re.IGNORECASE)
    number = float(found[1]) * _UNITS[found[2].lower()] if found else 0.0
    if not 1 <= number < math.inf:
        raise UserError(f"{where} {text!r}: is no size; it takes one like 80GiB or 24GB")
    return int(number)


def shown(size: float) -> str:
    """Bytes in the unit that suits them."""
    for unit, name in ((2**40, "TiB"), (GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if abs(size) >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size:.0f} B"


_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def host_memory(told: Path = Path("/proc/self/cgroup")) -> int:
    """Bytes of memory of this host, or fewer where a container or a job allows this process no more."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError):
        own = _CONTROL_GROUPS / told.read_text(encoding="utf-8").rpartition("::")[2].strip().lstrip("/")
        for folder in (own, *own.parents):
            with suppress(OSError, ValueError):  # none there, or `max`
                found.append(int((folder / "memory.max").read_text(encoding="utf-8")))
    return min(found)
