"""What a recipe will take on a layout: bytes on each device at the worst moment, on the host, and the arithmetic of a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from scalepeft import blueprint, engines, footprint, kinds, sharding, workload
from scalepeft.blueprint import Blueprint, Quantised
from scalepeft.errors import UserError, one_line
from scalepeft.recipe import Recipe
from scalepeft.sharding import Held, Layout, Tensor


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one process takes, and what one micro-batch computes."""

    moment: str
    """The worst moment: loading, forward, loss, backward, optimizer step or evaluation."""
    items: Mapping[str, int]
    """Bytes on the device at that moment, by what they are."""
    standing: Mapping[str, int]
    """Bytes on the device that are held throughout training."""
    host: Mapping[str, int]
    """Bytes of the process on the host."""
    parameters: Mapping[str, int]
    """trainable and total."""
    flops: int
    """Of one micro-batch."""
    unquantised: int
    """Bytes of all weights, the adapter's among them, in the dtype they have, or had before they were quantised."""
    largest: int
    """Bytes of the largest weight, likewise."""
    saved: int
    """Bytes of what is trained, as it is saved."""
    uncertain: tuple[int, int]
    """Bytes by which the peak may be less, and more, for what is an estimate."""
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """The most bytes that the device's allocator gives out."""
        return sum(self.items.values())


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A recipe's model and the step of one micro-batch: all that does not depend on the layout."""

    recipe: Recipe
    tensors: Sequence[Tensor]
    steps: Mapping[tuple[bool, bool], footprint.Step]
    """By whether gradients are there from earlier micro-batches, and whether an engine takes them away at once."""
    evaluation: footprint.Step | None
    """Forward alone, of a batch of the evaluation sets; None where it holds less than a training step."""
    parameters: Mapping[str, int]
    unquantised: int
    largest: int
    notes: tuple[str, ...]


def checkpointing(recipe: Recipe) -> Mapping[str, Any] | None:
    """The options of activation checkpointing, None when it is off: as the trainers read the recipe."""
    on = next(
        (
            given
            for name in ("activation_checkpointing", "gradient_checkpointing")
            if (given := kinds.option(recipe, name)) is not None
        ),
        False,
    )
    options = kinds.option(recipe, "activation_checkpointing_kwargs") or kinds.option(recipe, "gradient_checkpointing_kwargs")
    return dict(options or {}) if on else None


def sketch(recipe: Recipe, rows: workload.Rows, layouts: Sequence[Layout]) -> Sketch:
    """Trace the steps that these layouts need, all on CPUs or all not. Raises UserError as `refuse` and `model.build` do."""
    for layout in layouts:
        refuse(recipe, layout)
    accelerator = not layouts[0].on_cpus
    options = checkpointing(recipe)
    drawn, lengths = blueprint.build(recipe, labels=rows.labels, checkpointing=options is not None), rows.longest
    meant, notes = workload.without_mask(recipe, lengths), list[str]()
    batch, loss = workload.batch(recipe, meant), workload.loss(recipe, drawn.base, meant, accelerator=accelerator)
    tensors = list(_tensors(recipe, drawn))
    trace = partial(footprint.trace, drawn, precision=recipe.precision, accelerator=accelerator)
    steps = {}
    for layout in layouts:
        key = _key(recipe, layout, tensors)
        if key in steps:
            continue
        try:
            steps[key] = trace(batch, loss, accumulates=key[0], frees_gradients=key[1], checkpointing=options)
        except footprint.UNTRACEABLE as error:
            steps[key] = footprint.guess(drawn, max(map(sum, lengths)) * len(lengths), recomputed=options is not None)
            notes.append(f"the step cannot be traced ({one_line(error)[:120]}): activations and operations are estimates")
    evaluation = None
    if _padded(rows.evaluated) > _padded(lengths) and not any(step.estimate for step in steps.values()):
        try:
            shown = workload.without_mask(recipe, rows.evaluated)
            measured = workload.loss(recipe, drawn.base, shown, accelerator=accelerator)
            evaluation = trace(workload.batch(recipe, shown), measured, evaluates=True)
        except (UserError, *footprint.UNTRACEABLE) as error:
            notes.append(f"the evaluation is not counted, for it cannot be traced: {one_line(error)[:120]}")
    large = workload.mask(recipe, lengths)
    if meant is not lengths and not str(recipe.model.attn_implementation).startswith("flash"):
        notes.append(f"attention without its mask, which here would be one of {large:,} elements: flash attention needs none")
    if recipe.cache_frozen_layers is not None:
        notes.append("planned with all layers in each step: with cache_frozen_layers memory, work and time are less")
    plain = [t.numel() * t.element_size() for t in drawn.model.parameters()]
    plain += [m.count * m.dtype.itemsize for m in drawn.model.modules() if isinstance(m, Quantised)]
    return Sketch(
        recipe=recipe,
        tensors=tensors,
        steps=steps,
        evaluation=evaluation,
        parameters=blueprint.parameters(drawn),
        unquantised=sum(plain),
        largest=max(plain),
        notes=(*drawn.notes, *dict.fromkeys(notes)),
    )


def _padded(lengths: Sequence[Sequence[int]]) -> int:
    return len(lengths) * max(map(sum, lengths), default=0)


def refuse(recipe: Recipe, layout: Layout) -> None:
    """Raise UserError for what training would refuse on a layout."""
    accumulation(recipe, layout)
    on = {"engine": engines.called(layout.engine, layout.stage, layout.processes), "offloads": layout.optimizer_on_host}
    engines.refuse(recipe, on, optim=optim(recipe), cpu=layout.on_cpus)


def predict(drawn: Sketch, layout: Layout) -> Prediction:
    """What each process of a layout takes."""
    recipe = drawn.recipe
    held, optimizer = _held(recipe, layout, drawn.tensors), _optimizer(recipe)
    if optim(recipe) in _FOREACH and not (layout.on_cpus or layout.optimizer_on_host):
        divided = layout.engine == "FSDP" or layout.stage > 0
        trained = sum(t.elements * (4 if layout.engine == "DEEPSPEED" else t.itemsize) for t in drawn.tensors if t.trained)
        held.in_step += trained // (layout.processes if divided else 1)
    step = drawn.steps[_key(recipe, layout, drawn.tensors)]
    gradients = sum(t.size for t in drawn.tensors if t.trained)
    if recipe.quantization is not None and layout.on_cpus and layout.stage < 3:
        # the tensors that stay as they are lie in the mapped file of the checkpoint, and keep all of it
        held.device.pop("weights, not quantised", None)
        held.device["checkpoint, mapped"] = drawn.unquantised - gradients
    standing = Counter(held.device)
    if accumulation(recipe, layout) > 1 and not held.frees_gradients:
        standing[footprint.GRADIENTS] += gradients
    moments = {name: standing + _at(name, found, held) for name, found in step.moments.items()}
    moments["optimizer step"] = Counter(held.device) + Counter(
        {footprint.GRADIENTS: 0 if held.frees_gradients else gradients, "optimizer step": held.in_step}
    )
    if layout.engine == "FSDP" and recipe.quantization is not None and not layout.parameters_on_host:
        # 4-bit weights are loaded whole onto each device, and divided there; with offload, on the host
        moments["loading"] = Counter[str]()
        for tensor in drawn.tensors:
            moments["loading"][tensor.kind] += tensor.size
    if drawn.evaluation is not None:
        moments |= {
            f"evaluation {name}": Counter(held.device) + found + Counter({"gathered weights": held.gathered})
            for name, found in drawn.evaluation.moments.items()
        }
    worst = max(moments, key=lambda name: moments[name].total())
    notes, states = list(drawn.notes), 0
    if not optimizer.known:
        states = held.device.get("optimizer states", 0)
        notes.append(
            f"training.optim {optim(recipe)}: its states are an estimate, as large as AdamW's in 32 bits: perhaps far less"
        )
    if optimizer.paged and not layout.on_cpus:
        notes.append(
            "the optimizer's states are paged: when memory runs short, the driver moves them to the host, and it is slower"
        )
    unsure = step.peak.total() if step.estimate else 0
    return Prediction(
        moment=_MOMENTS.get(worst.split()[0], worst.split()[0]),
        items={name: size for name, size in moments[worst].items() if size},
        standing=held.device,
        host=held.host,
        parameters=drawn.parameters,
        flops=step.flops,
        unquantised=drawn.unquantised,
        largest=drawn.largest,
        saved=gradients,
        uncertain=(states + unsure // 2, unsure),
        notes=tuple(notes),
    )


_MOMENTS = {"before": "forward", "after": "backward", "optimizer": "optimizer step"}
"""What a moment is called whose first word does not say it."""


def _at(moment: str, step: Counter[str], held: Held) -> Counter[str]:
    found = Counter(step)
    found["gathered weights"] += held.gathered
    if moment.startswith(("backward", "after")):  # the first gradient is there when the head's own temporaries are gone
        found["communication buckets"] += held.in_backward
    return found


_FOREACH = ("adamw_torch", "adagrad", "rmsprop")
"""Optimizers of torch 2.13 that compute the roots of all parameters' means at once, where these are on an accelerator."""


def _optimizer(recipe: Recipe) -> sharding.Optimizer:
    return sharding.OPTIMIZERS.get(optim(recipe), sharding.UNKNOWN)


def optim(recipe: Recipe) -> str:
    """The optimizer's name; upstream's default is computed: torch's AdamW, fused."""
    return str(kinds.option(recipe, "optim") or "adamw_torch_fused")


def _held(recipe: Recipe, layout: Layout, tensors: Sequence[Tensor]) -> Held:
    return sharding.held(tensors, layout, _optimizer(recipe), half=recipe.precision != "no")


def _key(recipe: Recipe, layout: Layout, tensors: Sequence[Tensor]) -> tuple[bool, bool]:
    return accumulation(recipe, layout) > 1, _held(recipe, layout, tensors).frees_gradients


def accumulation(recipe: Recipe, layout: Layout) -> int:
    """Micro-batches of an optimizer step."""
    return engines.accumulation(recipe, layout.processes)


def _tensors(recipe: Recipe, drawn: Blueprint) -> Any:
    """Each parameter and buffer once, with what it is called."""
    numbers = {
        id(tensor): number
        for number, layer in enumerate(drawn.layers or ())
        for tensor in (*layer.parameters(), *layer.buffers())
    }
    trained = "adapter" if blueprint.is_adapted(drawn) else "weights"
    frozen = "weights" if recipe.quantization is None else "weights, not quantised"
    seen: set[int] = set()
    # DPO's reference is a second model, or a copy of the adapter: TRL makes one of an adapter that it did not make itself
    reference = "reference model" if recipe.adapter is None else "reference adapter"
    for module in drawn.model.modules():
        own = module.named_buffers(recurse=False)
        quantised = isinstance(module, Quantised)
        named = [(name, tensor, _kind(module, name) if quantised else sharding.BUFFERS) for name, tensor in own]
        named += [(name, p, trained if p.requires_grad else frozen) for name, p in module.named_parameters(recurse=False)]
        for _, tensor, kind in named:
            if id(tensor) in seen or not tensor.numel():
                continue
            seen.add(id(tensor))
            found = {"kind": kind, "elements": tensor.numel(), "itemsize": tensor.element_size()}
            yield Tensor(**found, trained=tensor.requires_grad, layer=numbers.get(id(tensor)), shape=tuple(tensor.shape))
            if recipe.task == "preference" and (recipe.adapter is None or tensor.requires_grad):
                yield Tensor(**found | {"kind": reference}, layer=numbers.get(id(tensor)))


def _kind(module: Quantised, name: str) -> str:
    if name == "packed":
        return "weights, 8-bit" if module.eight else "weights, 4-bit"
    return sharding.CONSTANTS
