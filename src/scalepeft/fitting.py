"""What would make a recipe fit: the nearest changes with what each takes, and every recipe against common devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from scalepeft import hardware, sharding
from scalepeft import recipe as recipes
from scalepeft.console import table
from scalepeft.errors import UserError
from scalepeft.forecast import Plan, plan, plans
from scalepeft.hardware import GIB, Device
from scalepeft.recipe import Recipe
from scalepeft.sharding import Layout

COMMON = (24, 48, 80, 141)
"""GiB of the devices that recipes are held against."""
COUNTS = (1, 2, 8, 16)
_ENOUGH = 24
"""Changes that are tried at most: each takes a trace."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A way to take less."""

    told: str
    overrides: tuple[str, ...] = ()
    layout: Layout | None = None


def told(found: Plan, path: str, overrides: Sequence[str]) -> str:
    """The changes that are nearest to the recipe, with what each takes, up to the first that fits."""
    rows = [("what would make it fit", "takes", "")]
    fitting = 0
    for change in list(_changes(found))[:_ENOUGH]:
        try:
            recipe = recipes.load(path, [*overrides, *change.overrides])
            new = plan(recipe, change.layout or found.layout, found.device)
        except UserError:  # a change that this recipe or its model does not allow is no change to offer
            continue
        rows.append((f"  {change.told}", hardware.shown(new.needed[1]), "fits" if new.fits else "does not"))
        fitting += bool(new.fits)
        if fitting == 2 or (fitting and "; " in change.told):
            break
    if not fitting:
        rows.append(("  none of these: a larger device, more of them, or a smaller model", "", ""))
    return table(rows)


def _changes(found: Plan) -> Iterator[Change]:
    """From the nearest to the farthest: what trains the same first, then what does not."""
    same = list(_same_training(found))
    yield from same
    other = list(_other_training(found))
    strongest = [change for change in (same[-1] if same else None, *other) if change is not None]
    yield from other
    for number in range(2, len(strongest) + 1):
        several = strongest[:number]
        yield Change(
            told="; ".join(change.told for change in several),
            overrides=tuple(text for change in several for text in change.overrides),
            layout=next((change.layout for change in reversed(several) if change.layout), None),
        )


def _same_training(found: Plan) -> Iterator[Change]:
    """Smaller micro-batches of the same steps, recomputed activations, and weights that are divided."""
    from scalepeft import engines, prediction

    recipe, layout = found.recipe, found.layout
    recomputed = prediction.checkpointing(recipe) is not None
    batch, accumulated = len(found.rows.longest), found.accumulation
    on = "training.activation_checkpointing=true"
    smaller = [size for size in (batch // 2, batch // 4, 1) if 0 < size < batch]
    smaller = [size for size in dict.fromkeys(smaller) if batch % size == 0]

    def of(size: int) -> tuple[tuple[str, ...], str]:
        times = batch // size * accumulated
        keep = () if recipe.global_batch_size else (f"training.gradient_accumulation_steps={times}",)
        told = f"training.per_device_train_batch_size={size} x {times} accumulated"
        return (f"training.per_device_train_batch_size={size}", *keep), told

    for size in smaller:
        given, told = of(size)
        yield Change(told=told, overrides=given)
    if not recomputed:
        yield Change(told=on, overrides=(on,))
        for size in smaller[-1:]:
            given, told = of(size)
            yield Change(told=f"{on}, {told}", overrides=(on, *given))
    given, told = of(smaller[-1]) if smaller else ((), "")
    given = (*given, *(() if recomputed else (on,)))
    told = ", ".join(filter(None, (told, "" if recomputed else on)))
    if layout.processes > 1:
        for name in ("zero2", "zero3", "zero3_offload"):
            new = sharding.read(name, layout.processes, cpu=layout.on_cpus)
            if (new.stage, new.parameters_on_host) > (layout.stage, layout.parameters_on_host) and layout.engine != "FSDP":
                on_host = new.optimizer_on_host and prediction.optim(recipe) not in engines.OF_TORCH
                stepped = ("training.optim=adamw_torch_fused",) if on_host else ()
                launched = ", ".join((f"--launch {name}{' --cpu' if layout.on_cpus else ''}", *stepped))
                yield Change(told=launched, overrides=stepped, layout=new)
                yield Change(told=", ".join(filter(None, (launched, told))), overrides=(*stepped, *given), layout=new)


def _other_training(found: Plan) -> Iterator[Change]:
    """4-bit weights, and shorter rows."""
    recipe, longest = found.recipe, max(map(sum, found.rows.longest))
    if recipe.quantization is None and recipe.adapter is not None:
        given = ("load_in_4bit: true, bnb_4bit_quant_type: nf4", "bnb_4bit_use_double_quant: true")
        yield Change(told="a 4-bit base (QLoRA)", overrides=(f"quantization={{{', '.join(given)}}}",))
    name = "training.max_length" if recipe.generative else "data.max_length"
    if longest >= 256:
        yield Change(told=f"{name}={longest // 2}", overrides=(f"{name}={longest // 2}",))


# --- all recipes against common devices ----------------------------------------------------------------------------------


def overview(folder: str, configs: Path | None = None) -> str:
    """A table of the recipes of a folder against common devices. Raises UserError when there are none.

    `configs` holds configurations of bases that cannot be reached, each in a folder called by the Hub id with `--` for `/`.
    """
    for option, given in (("--all", folder), ("--configs", configs)):
        if given is not None and not (str(given) and Path(given).is_dir()):
            raise UserError(f"command line: {option} {str(given)!r}: is no folder")
    files = sorted(Path(folder).rglob("*.yaml"))
    if not files:
        raise UserError(f"command line: --all {folder}: holds no recipe")
    named = [(file.relative_to(folder).with_suffix("").as_posix(), file) for file in files]
    return table([HEADS, *((name, *cells(file, configs)) for name, file in named)])


HEADS = ("recipe", "one device takes", *(f"{size} GiB" for size in COMMON))
"""What `cells` gives of a recipe, after its name."""


def cells(file: Path, configs: Path | None = None) -> Sequence[str]:
    """What one device takes, and for each size of device the least number and the layout that fit; or why that is not known."""
    try:
        recipe = recipes.load(file)
        base = recipe.model.name_or_path
        if configs and (configs / base.replace("/", "--")).is_dir():
            recipe = recipes.load(file, [f"model.name_or_path={configs / base.replace('/', '--')}"])
        return _cells(recipe)
    except UserError as error:
        return (error.problems[0].rpartition(": ")[2],)


def _cells(recipe: Recipe) -> Sequence[str]:
    devices = [Device(name=f"{size} GiB", memory=size * GIB, flops=None) for size in COMMON]
    layouts = list(_layouts(recipe))
    least: dict[str, str] = {}
    alone = ""
    for found in plans(recipe, layouts, devices):
        assert found.device is not None  # noqa: S101  # all are named
        alone = alone or hardware.shown(found.needed[1])
        if found.fits and found.device.name not in least:
            least[found.device.name] = f"{found.layout.processes}" + (
                f" ({found.layout.name})" if found.layout.processes > 1 else ""
            )
    return (alone, *(least.get(device.name, "no") for device in devices))


def _layouts(recipe: Recipe) -> Iterator[Layout]:
    """From one device on, those that serve the recipe."""
    from scalepeft import prediction

    for count in COUNTS:
        for name in ("single_gpu",) if count == 1 else ("multi_gpu", "zero3"):
            layout = sharding.read(name, count)
            if count > 1:
                try:
                    prediction.refuse(recipe, layout)
                except UserError:
                    continue
            yield layout
