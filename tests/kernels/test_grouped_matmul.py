"""What the contract of kernels cannot say of grouped products: whole numbers, and what is refused."""

import numpy as np
import pytest
import torch

from kernels.group_products import rounded
from kernels.grouped_matmul import grouped_matmul, reference
from kernels.launch import use
from tests.kernels.contract import interpreted

ENDS = torch.tensor([3, 3, 8])


def case(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-128, 128, (5, 40), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (3, 33, 40), generator=generator, dtype=torch.int8)
    order = torch.randperm(10, generator=generator)
    return x.to(dtype), weight.to(dtype), ENDS, dict(gather=order, fan_out=2, scatter=order.flip(0))


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])
@pytest.mark.parametrize("scaled", [False, True])
def test_int8_is_summed_exactly(path, scaled):
    x, weight, ends, places = case(torch.int8)
    scale = torch.linspace(0.5, 2, 10) if scaled else None
    with use(path):
        y = grouped_matmul(x, weight, ends, **places, scale=scale)
    assert y.dtype == (torch.float32 if scaled else torch.int32)
    arrays = (np.asarray(t, dtype=np.float64) for t in (x, weight))
    exact = reference(*arrays, ends.numpy(), gather=places["gather"].numpy(), fan_out=2, scatter=places["scatter"].numpy(),
                      scale=None if scale is None else scale.numpy().astype(np.float64))  # fmt: skip
    assert np.abs(exact).max() > 2**15
    np.testing.assert_allclose(y.numpy(), exact, rtol=1e-6 if scaled else 0, atol=0)


def test_rows_beyond_the_groups_are_zero():
    x, weight, ends, _ = case()
    y = grouped_matmul(x, weight, torch.tensor([1, 2, 3]))
    assert y[3:].eq(0).all() and y[:3].ne(0).any(1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(5)), r"^x: \(M, K\), not \(5,\)"),
        (dict(weight=torch.zeros(3, 33, 41)), r"^weight: \(G, N, 40\)"),
        (dict(weight=torch.zeros(3, 33, 40, dtype=torch.float64)), r"^weight: .*float64"),
        (dict(weight=torch.zeros(0, 33, 40)), "^weight: at least one group"),
        (dict(ends=torch.tensor([1, 2])), "^ends: an end for each of 3 groups"),
        (dict(ends=torch.tensor([4, 3, 8])), r"^ends: rising from 0 to at most 10, not \[4, 3, 8\]"),
        (dict(ends=torch.tensor([4, 5, 11])), "^ends: rising from 0 to at most 10"),
        (dict(ends=torch.tensor([-1, 5, 6])), "^ends: rising from 0"),
        (dict(fan_out=3), "^gather: 15 rows, 3 for each of x, not 10"),
        (dict(fan_out=0), "^fan_out: at least 1, not 0"),
        (dict(gather=None), "^fan_out: 2 without a gather"),
        (dict(scatter=torch.arange(9)), r"^scatter: \(10,\), not \(9,\)"),
        (dict(scale=torch.ones(9)), r"^scale: \(10,\), not \(9,\)"),
    ],
)
def test_bad_input_is_named(change, message):
    x, weight, ends, places = case()
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**(dict(x=x, weight=weight, ends=ends) | places | change))


def test_in_16_bits_groups_have_few_sizes():
    """At most an eighth more rows, eight numbers an octave; elsewhere nothing is added."""
    for dtype in (torch.bfloat16, torch.float16):
        sizes = [rounded(rows, dtype) for rows in range(4097)]
        assert all(rows <= size <= max(rows * 9 / 8, rows + 7) for rows, size in enumerate(sizes))
        assert len({size for size in sizes if 1024 < size <= 2048}) == 8 and len(set(sizes)) < 70
    assert [rounded(rows, torch.float32) for rows in range(100)] == list(range(100))


@pytest.mark.parametrize(("K", "N"), [(16, 24), (24, 16)])
@pytest.mark.parametrize("ends", [(0, 1, 1, 40), (7, 30, 30, 39), (40, 40, 40, 40), (0, 0, 0, 0), (13, 26, 39, 40)])
def test_rows_that_are_added_for_speed_leave_no_trace(ends, K, N):
    """Those of other groups do not show, be they ever so large, nor what lies in memory behind them."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((40, K), (4, N, K), (40, N)))
    x[7:13], dy[7:13] = 1e30, 1e30  # overflow in products with what is not theirs
    begin, ends = 0, torch.tensor(ends)
    expected, gradient = torch.zeros(40, N, dtype=torch.bfloat16), torch.zeros(4, N, K, dtype=torch.bfloat16)
    for e, end in enumerate(ends.tolist()):
        expected[begin:end], gradient[e] = x[begin:end] @ weight[e].T, dy[begin:end].T @ x[begin:end]
        begin = end
    weight.requires_grad_()
    y = grouped_matmul(x, weight, ends)
    y.backward(dy)
    torch.testing.assert_close(y.detach(), expected)
    torch.testing.assert_close(weight.grad, gradient)
