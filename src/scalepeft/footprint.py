"""One training step on tensors without storage: what it holds at each moment, and what it computes."""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from scalepeft import devices
from scalepeft.blueprint import Blueprint, parameters

ACTIVATIONS, LOSS, BACKWARD, GRADIENTS = "activations", "logits and loss", "temporaries", "gradients"
"""What a step makes, by the part of it that made it."""

_SHORT, _LONG = 4, 5
"""Layers of the two models that a deep one is calculated from: its first two and its last two are then four."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one micro-batch takes, beside the weights and what the optimizer keeps."""

    moments: Mapping[str, Counter[str]]
    """By the moments of the step, its bytes when they were most, by what they are."""
    flops: int
    """Of the forward and the backward pass, what is computed twice counted twice."""
    estimate: bool = False
    """Whether it was not traced, but is a rule of thumb's."""

    @property
    def peak(self) -> Counter[str]:
        """The bytes of the worst moment."""
        return max(self.moments.values(), key=lambda held: held.total())


UNTRACEABLE = (RuntimeError, NotImplementedError, AssertionError, TypeError, AttributeError, ValueError, ImportError)
"""What upstream's code raises where it looks at numbers, which are not there, or runs what has no form without them."""


def guess(blueprint: Blueprint, tokens: int, *, recomputed: bool) -> Step:
    """What a step may take that cannot be traced: good to a factor of two.

    Of each token a block keeps some 34 bytes for each of its hidden units at 2 bytes a number (Korthikanti et al. 2022, arXiv
    2205.05198, without what fused attention saves), or 2 where it is recomputed; a parameter computes 6 operations of a token.
    """
    config = blueprint.base.config.get_text_config()
    layers, hidden = (int(getattr(config, name, 1) or 1) for name in ("num_hidden_layers", "hidden_size"))
    wide = next(blueprint.model.parameters()).element_size() / 2
    kept = tokens * hidden * wide * (2 * layers + 34 if recomputed else 34 * layers)
    logits = tokens * int(getattr(config, "vocab_size", 0)) * 4
    counted = parameters(blueprint)["total"]
    moment = Counter({ACTIVATIONS: int(kept), LOSS: min(logits, 2**30)})
    return Step(moments={"loss": moment}, flops=6 * counted * tokens, estimate=True)


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are alive while tensors are computed, and the floating-point operations."""

    def __init__(self, known: Iterable[torch.Tensor], within: Callable[..., int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = {_key(tensor.untyped_storage()) for tensor in known}
        self.within, self.kind, self.moment = within, ACTIVATIONS, "before"
        self.now: Counter[str] = Counter()
        self.moments: dict[str, Counter[str]] = {}
        self.flops = self.total = 0
        self._most: Counter[str] = Counter()
        self._alive: dict[int, tuple[str, int, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        writes = func._schema.is_mutable  # noqa: SLF001  # what writes into its arguments returns these
        for leaf in () if writes else tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        if (count := flop_registry.get(func._overloadpacket)) is not None:  # noqa: SLF001
            self.flops += count(*args, **kwargs, out_val=found)
        self._measure(self.within(func, args, kwargs))
        return found

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = _key(storage)
        if key in self.known or key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (self.kind, size, weakref.ref(storage, partial(self._gone, key)))
        self.now[self.kind] += size
        self.total += size

    def _gone(self, key: int, _: object) -> None:
        kind, size, _ = self._alive.pop(key)
        self.now[kind] -= size
        self.total -= size

    def _measure(self, extra: int) -> None:
        if self.total + extra > self._most[self.moment]:
            self._most[self.moment] = self.total + extra
            held = Counter(self.now)
            held[self.kind] += extra
            self.moments[self.moment] = held

    def name(self, tensor: torch.Tensor, kind: str) -> None:
        """Say what a tensor that is held is."""
        key = _key(tensor.untyped_storage())
        if key in self._alive:
            was, size, reference = self._alive[key]
            self._alive[key] = (kind, size, reference)
            self.now[was] -= size
            self.now[kind] += size


def _key(storage: torch.UntypedStorage) -> int:
    return int(storage._cdata)  # noqa: SLF001  # the only name that a storage has


def trace(
    blueprint: Blueprint,
    batch: Mapping[str, torch.Tensor],
    loss: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor],
    *,
    precision: str,
    accelerator: bool,
    accumulates: bool = False,
    frees_gradients: bool = False,
    checkpointing: Mapping[str, Any] | None = None,
    evaluates: bool = False,
) -> Step:
    """One micro-batch, forward and backward (forward alone when it `evaluates`), of the model that `blueprint` describes.

    `loss` takes the model and the batch. `accumulates`: the gradients of earlier micro-batches are there already;
    `frees_gradients`: an engine takes each gradient away as soon as it is there. `checkpointing` holds the options of
    activation_checkpointing_kwargs, None when all activations are kept. With `accelerator` the operations are those of an
    accelerator (fused dropout and attention, its autocast), without those of a CPU.

    A model of many like layers is not run whole: what it holds at the moments of a step grows by the same bytes with each
    layer, so that two short ones tell it exactly.
    """
    if checkpointing is not None:
        blueprint.base.activation_checkpointing_enable(activation_checkpointing_kwargs=dict(checkpointing) or None)
    run = partial(
        _run,
        blueprint,
        batch,
        loss,
        precision,
        accelerator=accelerator,
        accumulates=accumulates,
        frees=frees_gradients,
        evaluates=evaluates,
    )
    layers = blueprint.layers
    if layers is None or len(layers) <= _LONG + 1:
        return run(layers or ())
    whole, config = list(layers), blueprint.base.config.get_text_config()
    steps = []
    try:
        for count in (_SHORT, _LONG):
            _only(layers, whole[:count], config)
            steps.append(run(layers))
    finally:
        _only(layers, whole, config)
    return _extended(*steps, times=len(whole) - _LONG)


def _only(layers: torch.nn.ModuleList, kept: Sequence[torch.nn.Module], config: Any) -> None:
    layers._modules.clear()  # noqa: SLF001
    layers.extend(kept)
    for name in ("num_hidden_layers", "n_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, len(kept))


def _extended(short: Step, long: Step, *, times: int) -> Step:
    """The step of a model with so many more layers than the longer of two that differ by one."""
    moments = {}
    for name, held in long.moments.items():
        before = short.moments.get(name, held)
        moments[name] = Counter({kind: held[kind] + times * (held[kind] - before[kind]) for kind in {*held, *before}})
    return Step(moments=moments, flops=long.flops + times * (long.flops - short.flops))


def _run(
    blueprint: Blueprint,
    batch: Mapping[str, torch.Tensor],
    loss: Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor],
    precision: str,
    layers: Iterable[torch.nn.Module],
    *,
    accelerator: bool,
    accumulates: bool,
    frees: bool,
    evaluates: bool,
) -> Step:
    model, dtype = blueprint.model, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    tensors = [*model.parameters(), *model.buffers()]
    with blueprint.mode:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if accumulates and parameter.requires_grad and not frees else None
        # masks and positions are real: the models look at them; what the loss makes of labels is large, and nobody looks
        targets = {name: batch[name].clone() for name in ("labels", "completion_mask") if name in batch}
    given = {**batch, **targets}
    held = [*tensors, *(p.grad for p in model.parameters() if p.grad is not None), *given.values()]
    memory = Memory(held, partial(devices.hidden, accelerator=accelerator))
    handles = list(_follow(memory, blueprint.base, list(layers)))
    handles += [
        p.register_post_accumulate_grad_hook(partial(_took, memory, frees)) for p in model.parameters() if p.requires_grad
    ]
    autocast = torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext()
    acting = devices.as_accelerator() if accelerator else contextlib.nullcontext()
    try:
        model.train(not evaluates)
        with memory, acting, devices.without_storage(blueprint.mode):
            with autocast, torch.set_grad_enabled(not evaluates):
                found = loss(model, given)
            if not evaluates:
                memory.moment = "loss"
                memory.kind = BACKWARD
                found.backward()  # type: ignore[no-untyped-call]
                memory.moment = "after"
    finally:
        for handle in handles:
            handle.remove()
        for parameter in model.parameters():
            parameter.grad = None
    return Step(moments=memory.moments, flops=memory.flops)


def _took(memory: Memory, frees: bool, parameter: torch.Tensor) -> None:
    if frees:
        parameter.grad = None
    elif parameter.grad is not None:
        memory.name(parameter.grad, GRADIENTS)


def _follow(memory: Memory, base: Any, layers: Sequence[torch.nn.Module]) -> Iterator[Any]:
    """Tell the memory where in the step it is: in which layer, forward or backward, or in the loss."""

    def at(kind: str, index: int) -> str:
        place = str(index) if index < 2 else str(index - len(layers)) if index >= len(layers) - 2 else "between"
        return f"{kind} {place}"

    def enters(index: int, *_: Any) -> None:
        if memory.kind != BACKWARD:  # not the second forward of a checkpointed layer
            memory.moment = at("forward", index)

    def returns(index: int, _: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if memory.kind != BACKWARD and hidden.requires_grad:
            hidden.register_hook(lambda _: setattr(memory, "moment", at("backward", index)))

    def leaves(*_: Any) -> None:
        if memory.kind != BACKWARD:
            memory.kind, memory.moment = LOSS, "loss"

    for index, layer in enumerate(layers):
        yield layer.register_forward_pre_hook(partial(enters, index))
        yield layer.register_forward_hook(partial(returns, index))
    backbone = getattr(base, base.base_model_prefix, base)
    yield backbone.register_forward_pre_hook(
        lambda *_: setattr(memory, "kind", memory.kind if memory.kind == BACKWARD else ACTIVATIONS)
    )
    yield backbone.register_forward_hook(leaves)
