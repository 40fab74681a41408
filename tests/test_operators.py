"""Operators that are replaced on some processors: the same numbers, and masks of the distribution that was asked for."""

import itertools
import json

import pytest
import torch

from scalepeft import devices, operators

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def replaced():
    operators.speed_up()


def draw(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


@pytest.mark.parametrize("rows", [1, 8, 33])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_product_of_halves_is_summed_in_float32_and_rounded_once(dtype, rows):
    a, b, bias = draw(rows, 70, dtype=dtype), draw(70, 50, dtype=dtype), draw(50, dtype=dtype)
    many, others, sums = draw(3, rows, 70, dtype=dtype), draw(3, 70, 50, dtype=dtype), draw(3, rows, 50, dtype=dtype)
    cases = {
        "mm": (torch.mm, (a, b), {}),
        "addmm": (torch.addmm, (bias, a, b), {"beta": 0.5, "alpha": 2}),
        "bmm": (torch.bmm, (many, others), {}),
        "baddbmm": (torch.baddbmm, (sums, many, others), {"beta": 1, "alpha": 0.3}),
        "linear": (torch.nn.functional.linear, (many, b.t().contiguous(), bias), {}),
    }
    for name, (product, tensors, scales) in cases.items():
        found, exact = product(*tensors, **scales), product(*(tensor.double() for tensor in tensors), **scales)
        assert found.dtype == dtype, name
        assert torch.allclose(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4), name


def test_other_products_are_those_of_torch():
    for dtype in (torch.float32, torch.float64, torch.int64):
        a, b = (draw(20, 20, dtype=torch.float32) * 9).to(dtype), torch.eye(20).to(dtype)
        assert torch.equal(a @ b, a)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        torch.mm(*(torch.ones(2, 3, dtype=torch.bfloat16) for _ in range(2)))
    empty = torch.ones(0, 3, dtype=torch.bfloat16) @ torch.ones(3, 2, dtype=torch.bfloat16)
    assert empty.shape == (0, 2)


def test_what_is_slow_here_is_replaced_and_nothing_else():
    slow = bool(operators.slow())
    for name in ("mm", "addmm", "bmm", "baddbmm"):
        assert ("operators.py" in torch._C._dispatch_dump(f"aten::{name}")) is slow
    assert "operators.py" in torch._C._dispatch_dump("aten::bernoulli_.float")


def most_allocated(function, tmp_path) -> int:
    """Bytes, as the allocator reports them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = function()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    reports = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    del kept
    return max(itertools.accumulate(report["args"]["Bytes"] for report in reports))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["mm", "few rows", "addmm", "bmm", "baddbmm", "bernoulli_"])
def test_the_plan_counts_what_they_take(name, dtype, tmp_path):
    a, b, bias = draw(700, 300, dtype=dtype), draw(300, 500, dtype=dtype), draw(500, dtype=dtype)
    many, others, sums = draw(4, 700, 300, dtype=dtype), draw(4, 300, 500, dtype=dtype), draw(4, 700, 500, dtype=dtype)
    aten = torch.ops.aten
    operator, tensors = {
        "mm": (aten.mm.default, (a, b)),
        "few rows": (aten.mm.default, (a[:8], b.t().contiguous().t())),
        "addmm": (aten.addmm.default, (bias, a, b)),
        "bmm": (aten.bmm.default, (many, others)),
        "baddbmm": (aten.baddbmm.default, (sums, many, others)),
        "bernoulli_": (aten.bernoulli_.float, (a, 0.3)),
    }[name]
    operator(*tensors)  # what is allocated once
    found = operator(*tensors)
    given = 0 if name == "bernoulli_" else found.numel() * found.element_size()
    hidden = devices.hidden(operator, tensors, {}, accelerator=False)
    assert devices.hidden(operator, tensors, {}, accelerator=True) == 0
    assert most_allocated(lambda: operator(*tensors), tmp_path) == pytest.approx(given + hidden, rel=0.01, abs=64)
    assert bool(hidden) is (name == "bernoulli_" or (name != "few rows" and dtype in operators.slow()))


def test_gradients_of_halves_are_those_of_float32():
    weight, rows = draw(40, 60, dtype=torch.bfloat16), draw(8, 60, dtype=torch.bfloat16)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        layer = torch.nn.Linear(60, 40, dtype=dtype)
        layer.weight.data = weight.to(dtype)
        given = rows.to(dtype).clone().requires_grad_()
        layer(given).square().mean().backward()
        found[dtype] = (given.grad.float(), layer.weight.grad.float())
    for half, whole in zip(*found.values(), strict=True):
        assert torch.allclose(half, whole, rtol=0.05, atol=0.02 * whole.abs().max())


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9, 1e-3])
def test_a_mask_has_as_many_ones_as_it_should(p):
    count = 2**20
    ones = float(torch.empty(1024, 1024).bernoulli_(p).double().sum())
    assert abs(ones - p * count) < 5 * (p * (1 - p) * count) ** 0.5


def test_elements_of_a_mask_do_not_hang_together():
    mask = torch.empty(2**20, dtype=torch.float64).bernoulli_(0.5)
    for apart in (1, 2, 3, 4, 8, 64):
        together = float(((mask[apart:] - 0.5) * (mask[:-apart] - 0.5)).mean()) * 4
        assert abs(together) < 5 / 2**10


def test_masks_of_all_kinds():
    assert torch.empty(9).bernoulli_(0.0).sum() == 0
    assert torch.empty(9).bernoulli_(1.0).sum() == 9
    assert torch.empty(0).bernoulli_(0.5).shape == (0,)
    assert set(torch.empty(50, 3, dtype=torch.bfloat16).bernoulli_(0.5).unique().tolist()) == {0.0, 1.0}
    whole = torch.full((6, 10), 7.0)
    whole.t()[2:5].bernoulli_(0.5)
    assert set(whole[:, 2:5].unique().tolist()) == {0.0, 1.0}
    assert bool((whole[:, :2] == 7).all() and (whole[:, 5:] == 7).all())
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        torch.empty(3).bernoulli_(1.5)


def test_a_seed_decides_over_dropout():
    rows = torch.ones(64, 65)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = torch.nn.functional.dropout(rows, 0.1)
    later = torch.nn.functional.dropout(rows, 0.1)
    torch.set_rng_state(state)
    assert torch.equal(first, torch.nn.functional.dropout(rows, 0.1))
    assert not torch.equal(first, later)
    torch.set_rng_state(state)
    assert torch.equal(first != 0, operators.bernoulli_(torch.empty(64, 65), 0.9) != 0)
    own = torch.Generator().manual_seed(7)
    assert torch.equal(first != 0, torch.empty(64, 65).bernoulli_(0.9, generator=own) != 0)
