"""What is exported: a run, an adapter with its base, or a whole model, as it was found in a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scalepeft import merge
from scalepeft.errors import UserError, did_you_mean, one_line
from scalepeft.run import RECORD, Run

if TYPE_CHECKING:
    from scalepeft.orders import Asked


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported."""

    path: Path
    """As it was given."""
    kind: str
    """The class of transformers that makes the model."""
    config: Any
    """The model's configuration; that of an adapter's base where it is not merged yet."""
    asked: Asked | None = None
    """The merge that makes the model, where it is not whole yet."""
    run: str | None = None
    """The run directory, where it is one."""
    model: Path | None = None
    """The folder of the whole model, once there is one."""
    tokenizer: Path | None = None
    """The folder of its tokenizer."""

    @property
    def folders(self) -> tuple[Path, Path]:
        """Those of the whole model and of its tokenizer, which are there when it is written."""
        assert self.model  # noqa: S101  # made whole before
        assert self.tokenizer  # noqa: S101  # every format's check asks for it
        return self.model, self.tokenizer


def source_of(path: Path) -> Source:
    """A run, an adapter folder or a model folder. Raises UserError for anything else."""
    if not path.is_dir():
        near = did_you_mean(str(path), map(str, path.parent.glob("*"))) if path.parent.is_dir() else ""
        raise UserError(f"{path}: there is no such run or folder{near}")
    if (path / RECORD).is_file() and Run(path).recipe().adapter is None:
        run = Run(path)
        if run.record["status"] != "complete":
            raise UserError(f"{path}: the run is {run.record['status']}; train it to the end first")
        return replace(_of_folder(run.weights), path=path, run=str(path))
    if (path / RECORD).is_file() or (path / "adapter_config.json").is_file():
        asked = merge.asked_for(path)
        return Source(
            path=path,
            kind=asked.order.kind,
            config=configuration(Path(asked.order.config), asked.order.trust_remote_code),
            asked=asked,
            run=asked.run,
            tokenizer=Path(asked.order.tokenizer) if asked.order.tokenizer else None,
        )
    if (path / "config.json").is_file():
        return _of_folder(path)
    raise UserError(f"{path}: is neither a run ({RECORD}), nor an adapter (adapter_config.json), nor a model (config.json)")


def _of_folder(folder: Path) -> Source:
    import transformers

    config = configuration(folder)
    if packed := getattr(config, "quantization_config", None):
        how = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
        told = f"holds weights quantised by {getattr(how, 'value', how)}"
        raise UserError(f"{folder}: {told}; export the unquantised model, or merge an adapter into what they stand for")
    kind = next(iter(config.architectures or ()), "")
    if not hasattr(transformers, kind):
        raise UserError(f"{folder / 'config.json'}: architectures is {config.architectures}; it names a class of transformers")
    tokenizer = folder if (folder / "tokenizer_config.json").is_file() else None
    return Source(path=folder, kind=kind, config=config, model=folder, tokenizer=tokenizer)


def configuration(folder: Path, trust_remote_code: bool = False) -> Any:
    """The configuration of a model's folder. Raises UserError for one that it does not know, or that needs code."""
    from transformers import AutoConfig

    if trust_remote_code:
        raise UserError(f"{folder}: needs Python code that comes with the model, which an export does not carry")
    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder / 'config.json'}: is not of a model that transformers knows: {one_line(error)}") from error
