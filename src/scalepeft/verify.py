"""Proof after every run: a fresh process reloads what was saved and must get the trained model's answers."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import push
from scalepeft.console import quiet_upstream, say
from scalepeft.errors import Interrupted, RunFailed, UserError, one_line, program
from scalepeft.fetch import offline_if_unreachable
from scalepeft.run import VERIFICATION, Run
from scalepeft.stops import Stop

if TYPE_CHECKING:
    import torch

    from scalepeft.model import Trained
    from scalepeft.trainer import RecipeTraining

_TOLERANCE = {"torch.float32": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}
"""Largest difference of logits by the base's dtype, relative to the largest logit (at least 1). On the device that trained,
the same weights give the same bits; what is left is for kernels that choose other orders of summation."""


SAMPLE_TOKENS = 48
"""Tokens of the sample answer of a language model: enough to see its manner, and seconds on a CPU."""


def main(arguments: Sequence[str]) -> int:
    """`python -m scalepeft.verify RUN`: what training becomes when it is done."""
    if len(arguments) != 1:
        raise UserError("usage: python -m scalepeft.verify RUN")
    run = Run(Path(arguments[0]))
    with Stop() as stop:
        try:
            stop.interrupt()
            verify(run)
            say(_closing(run))
        except KeyboardInterrupt:
            told = f"{run.path}: trained and saved, not verified; the same command does that"
            if run.record["status"] != "complete":
                run.interrupt(told)
            raise Interrupted(told) from None
    if run.recipe().training.get("push_to_hub"):
        push.in_place_of_this(run)
    return 0


def write_reference(
    run: Run, reference: dict[str, torch.Tensor], trainer: RecipeTraining, sample: tuple[list[int], list[int]]
) -> None:
    """Keep the inputs and logits of a few rows, and the digest of each trained tensor as it was in memory when saved.

    `sample` is a prompt and its answer in tokens, for the question that the verification asks a language model.
    """
    from safetensors.torch import save_file

    digests = {name: _digest(tensor) for name, tensor in trainer.saved.items()}
    beside = run.path / f"{VERIFICATION}.part"
    metadata = {"digests": json.dumps(digests), "sample": json.dumps(sample)}
    save_file({k: v.contiguous() for k, v in reference.items()}, beside, metadata=metadata)
    beside.replace(run.path / VERIFICATION)


def verify(run: Run) -> None:
    """Complete a trained run, or fail it.

    Reloads base and weights from disk and compares logits with those of the trained model; where the base does not fit
    into memory, the saved tensors are compared with those that were trained. Raises RunFailed when they differ.
    """
    offline_if_unreachable(run.recipe())
    quiet_upstream()
    trained = None
    try:
        if _fits(run):
            trained = _load(run)
            found = _compare_logits(run, trained)
        else:
            found = _compare_tensors(run)
    except RunFailed as error:
        run.end("failed", str(error))
        raise RunFailed(f"{run.path}: failed: {error}") from error
    if not found.pop("passed"):
        reason = f"the saved weights do not answer as the trained model did ({_shown(found)})"
        run.end("failed", reason, verification=found)
        raise RunFailed(f"{run.path}: failed: {reason}")
    run.end("complete", verification=found)
    if trained is not None and (sample := _sample(run, trained)):
        run.update(sample=sample)


def _load(run: Run) -> Trained:
    from scalepeft import model

    return model.load(run)


def _compare_logits(run: Run, trained: Trained) -> dict[str, Any]:
    from safetensors.torch import load_file

    from scalepeft import model

    reference = load_file(run.path / VERIFICATION)
    expected = reference.pop("logits")
    device = next(trained.parameters()).device
    inputs = {k: v.to(device) for k, v in reference.items()}
    logits = model.answers(run.recipe(), trained, inputs)
    # of the reloaded weights, or of those that were trained where an engine had them in another
    reloaded = str(trained.config.dtype)
    dtype = max(reloaded, f"torch.{run.record['layout'].get('dtype', 'float32')}", key=_TOLERANCE.__getitem__)
    tolerance = _TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    difference = (logits - expected).abs().max().item()
    return {
        "method": "logits",
        "rows": len(expected),
        "max_difference": difference,
        "tolerance": tolerance,
        "dtype": dtype.removeprefix("torch."),
        "passed": difference <= tolerance,  # false for NaN, too
    }


def _sample(run: Run, trained: Trained) -> dict[str, str] | None:
    """A question of the evaluation rows, answered by the base without the adapter and by the trained model."""
    from peft import PeftModel
    from safetensors import safe_open

    from scalepeft import model
    from scalepeft.generate import answer, precision

    with safe_open(run.path / VERIFICATION, framework="pt") as file:
        prompt, expected = json.loads(file.metadata()["sample"])
    recipe, tokenizer = run.recipe(), model.tokenizer_of(run)
    room = min(SAMPLE_TOKENS, model.longest_input(recipe, tokenizer) - len(prompt))
    if not prompt or room < 1:
        return None
    found = {"prompt": tokenizer.decode(prompt), "expected": tokenizer.decode(expected, skip_special_tokens=True)}
    with precision(recipe, trained):
        if isinstance(trained, PeftModel):
            with trained.disable_adapter():
                found["base"] = answer(trained, tokenizer, prompt, max_new_tokens=room)
        return found | {"trained": answer(trained, tokenizer, prompt, max_new_tokens=room)}


def _compare_tensors(run: Run) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    with safe_open(run.path / VERIFICATION, framework="pt") as file:
        expected = json.loads(file.metadata()["digests"])
    saved: dict[str, str] = {}
    for path in sorted(run.weights.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                saved |= {name: _digest(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # not a dict
        except SafetensorError as error:
            raise RunFailed(f"{path} cannot be loaded: {one_line(error)}") from error
    differing = [name for name in {**expected, **saved} if expected.get(name) != saved.get(name)]
    return {
        "method": "tensors",
        "reason": "the base does not fit into memory",
        "tensors": len(saved),
        "differing": differing,
        "passed": bool(saved) and not differing,
    }


def _fits(run: Run) -> bool:
    """Whether the base can be loaded: its weight files, with a tenth to spare, against the memory that is free."""
    import psutil
    import torch

    from scalepeft.fetch import asset_path

    name = run.recipe().model.name_or_path
    folder = asset_path(name) if name.startswith("fetched:") else Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, revision=run.recipe().model.revision, local_files_only=True))
    needed = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available
    if torch.cuda.is_available() and run.record["layout"]["device"] == "cuda":
        free = torch.cuda.mem_get_info()[0]
    return bool(needed * 1.1 <= free)


def _digest(tensor: torch.Tensor) -> str:
    import torch

    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _shown(found: dict[str, Any]) -> str:
    if found["method"] == "tensors":
        return f"{len(found['differing'])} of {found['tensors']} tensors differ; {found['reason']}"
    return f"largest difference of {found['rows']} rows' logits {found['max_difference']:.2g}, allowed {found['tolerance']:.2g}"


def _closing(run: Run) -> str:
    from scalepeft.console import table
    from scalepeft.report import closing, sample

    record = run.record
    lines = [
        ("trained", f"{record['step']:,} steps in {record['seconds']:.0f} s, {record['samples_per_second']:.1f} rows/s"),
        ("memory", f"{record['peak_memory_bytes'] / 2**30:.2f} GiB at the peak"),
        ("verified", f"reloaded in a fresh process: {_shown(record['verification'])}"),
        ("saved", str(run.weights)),
    ]
    if record.get("ranks"):
        before, after = (sum(found[when] for found in record["ranks"].values()) for when in ("initial", "final"))
        lines.insert(1, ("ranks", f"{before} -> {after} over {len(record['ranks'])} modules; run.json has each"))
    return "\n\n".join(part for part in (closing(record), sample(record), table(lines, right=False)) if part)


if __name__ == "__main__":
    sys.exit(program(main))
