"""Claims about training state on disk."""

from __future__ import annotations

import json
import pickletools
import random

import numpy as np
import pytest
import torch

from scalepeft.checkpoint import load_state, save_state


def same(a: object, b: object) -> bool:
    """Equality to the bit and to the type."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def round_trip(state: object, path) -> object:
    save_state(state, path)
    return load_state(path)


def an_optimizer() -> torch.optim.AdamW:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW([{"params": [layer.weight], "lr": 1e-3}, {"params": [layer.bias]}], amsgrad=True)
    for _ in range(3):
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


def test_an_optimizer_comes_back_whole(tmp_path):
    state = an_optimizer().state_dict()
    assert same(round_trip(state, tmp_path / "s.safetensors"), state)
    fresh = an_optimizer()
    fresh.load_state_dict(load_state(tmp_path / "s.safetensors"))
    assert same(fresh.state_dict(), state)


def test_random_generators_go_on_where_they_were(tmp_path):
    state = (random.getstate(), np.random.get_state(), torch.random.get_rng_state())  # noqa: NPY002
    first = (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002, S311
    python, numpy, pytorch = round_trip(state, tmp_path / "s.safetensors")
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002
    torch.random.set_rng_state(pytorch)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == first  # noqa: NPY002, S311


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -1.5,
        1e-300,
        "ü \n",
        [],
        (),
        {},
        {1: (2, [3, (4,)]), "1": None, None: False, (1, 2): {}},
        torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.arange(6).reshape(2, 3).T,
        np.arange(4, dtype=np.uint32),
        ["dict", "tensor", "0"],
    ],
    ids=str,
)
def test_a_value_comes_back_as_it_was(tmp_path, value):
    assert same(round_trip({"it": value}, tmp_path / "s.safetensors"), {"it": value})


def test_two_names_of_one_tensor_are_saved_as_two(tmp_path):
    tensor = torch.arange(3.0)
    assert same(round_trip([tensor, tensor[:2]], tmp_path / "s.safetensors"), [tensor, tensor[:2]])


def test_not_finite_numbers_come_back(tmp_path):
    found = round_trip([float("inf"), float("-inf"), float("nan")], tmp_path / "s.safetensors")
    assert found[:2] == [float("inf"), float("-inf")]
    assert found[2] != found[2]  # NaN


def test_the_file_is_no_pickle_and_no_zip(tmp_path):
    save_state(an_optimizer().state_dict(), tmp_path / "s.safetensors")
    content = (tmp_path / "s.safetensors").read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert set(json.loads(content[8 : 8 + header])) > {"__metadata__", "0"}
    assert b"PK\x03\x04" not in content
    with pytest.raises(ValueError, match="opcode"):
        list(pickletools.genops(content))


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, b"bytes", 1j, torch.float32, print], ids=lambda value: type(value).__name__
)
def test_what_has_no_safe_form_is_refused_and_leaves_no_file(tmp_path, value):
    with pytest.raises(TypeError, match=type(value).__name__):
        save_state({"it": [value]}, tmp_path / "s.safetensors")
    assert not list(tmp_path.iterdir())
