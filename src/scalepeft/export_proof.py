"""Proof of an export, in a process of its own that has no peft: the written files alone answer as the model did."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scalepeft import proof
from scalepeft.console import quiet_upstream
from scalepeft.errors import UserError, program
from scalepeft.export import ANSWERS, FORMATS, PLAN
from scalepeft.proof import INPUTS


def main(arguments: Sequence[str]) -> int:
    """`python -m scalepeft.export_proof FOLDER`: prints what was found as JSON, on one line."""
    if len(arguments) != 1:
        raise UserError("usage: python -m scalepeft.export_proof FOLDER")
    sys.modules["peft"] = None  # type: ignore[assignment]  # importing it fails, and transformers does without
    quiet_upstream()
    part = Path(arguments[0])
    print(f"\n{json.dumps(prove(part, json.loads((part / PLAN).read_bytes())))}", flush=True)
    return 0


def prove(part: Path, plan: Mapping[str, Any]) -> dict[str, Any]:
    """Look at the files, then compare their answers with those that are written beside, or their tensors with the model's."""
    from safetensors.torch import load_file

    form: Any = importlib.import_module(FORMATS[plan["format"]])
    folder = part / "export"
    form.inspect(folder, plan)
    if plan["by"] == "tensors":
        return dict(form.same_tensors(folder, plan))
    expected = load_file(part / ANSWERS)
    found = form.answers(folder, plan, load_file(part / INPUTS))
    return proof.compared([expected[str(n)] for n in range(len(expected))], list(found), *plan["dtypes"])


if __name__ == "__main__":
    sys.exit(program(main))
