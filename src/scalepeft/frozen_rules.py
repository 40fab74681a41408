"""What cannot be trained on kept states of frozen layers: rules of the key cache_frozen_layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from scalepeft import hardware, upstream
from scalepeft.document import Document, Key, mapping
from scalepeft.errors import UserError

_NOT_KEPT: Mapping[Key, str] = {
    ("data", "train", "streaming"): "rows of a stream are met once; prepare them",
    ("training", "neftune_noise_alpha"): "adds noise to embeddings, which are not computed in training",
}
"""Options that change what enters the frozen layers from step to step, or that know no rows before training."""


def problems(document: Document, values: Mapping[str, Any]) -> Iterator[str]:
    """Each as one line with its place."""
    given, name = values.get("cache_frozen_layers"), "cache_frozen_layers"
    if not isinstance(given, str):
        return
    where = f"{document.where((name,))}: {name}"
    try:
        hardware.size(given, where=where)
    except UserError as error:
        yield str(error)
    if (task := values.get("task")) in upstream.LANGUAGE_TASKS:
        yield f"{where} serves encoders: the task is {task}, not sequence-classification"
        return
    for place, told in _NOT_KEPT.items():
        found: Any = values
        for part in place:
            found = mapping(found).get(part)
        if found:
            yield f"{document.where(place)}: {'.'.join(place)}: {told} ({name})"
    training, adapter = mapping(values.get("training")), mapping(values.get("adapter"))
    for option in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        if mapping(training.get(option)).get("use_reentrant"):
            told = "would give the first trained layer no gradient, for kept states need none; leave it out"
            yield f"{document.where(('training', option))}: training.{option}.use_reentrant: {told} ({name})"
    if values.get("adapter") is None:
        yield f"{where}: without an adapter no layer is frozen; give one that names the last layers, or leave this out"
    kind = str(adapter.get("peft_type"))
    reference = upstream.peft_types().get(kind)
    virtual = reference is not None and "num_virtual_tokens" in upstream.fields(reference)
    if virtual or kind == "SHADOW":
        told = "puts its virtual tokens before the first layer, and none is frozen" if virtual else "looks at the token ids"
        yield f"{document.where(('adapter', 'peft_type'))}: adapter.peft_type: {kind} {told} ({name})"
