"""Monarch matrices: against the dense matrix they stand for, against numpy.fft, and as a causal convolution."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models import Config, build_model
from nn.monarch import (
    MonarchLinear,
    causal_convolution,
    circular_convolution,
    monarch_dft,
    monarch_multiply,
    square_of_at_least,
)
from optim.groups import split_parameters


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def stride(n: int, k: int) -> np.ndarray:
    """The permutation matrix that deals n numbers out to k blocks: block i gets i, i + k, i + 2 k, …"""
    P = np.zeros((n, n))
    P[np.arange(n), [j * k + i for i in range(k) for j in range(n // k)]] = 1
    return P


def block_diagonal(blocks: np.ndarray) -> np.ndarray:
    k, q, p = blocks.shape
    B = np.zeros((k * q, k * p), blocks.dtype)
    for i, block in enumerate(blocks):
        B[i * q : (i + 1) * q, i * p : (i + 1) * p] = block
    return B


SIZES = {
    "square": [(4, 4, 4), (4, 4, 4)],
    "rectangular": [(3, 5, 2), (5, 4, 3)],
    "other blocks": [(2, 6, 5), (4, 2, 3)],
    "order 1": [(3, 2, 4)],
    "order 3": [(4, 2, 2), (4, 2, 2), (4, 3, 2)],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_product_of_permutations_and_blocks(sizes):
    factors = [numbers(*size, seed=seed) for seed, size in enumerate(sizes)]
    M = np.eye(sizes[0][0] * sizes[0][2])
    for B in factors:
        M = block_diagonal(B.numpy()) @ stride(len(M), len(B)) @ M
    k, q, _ = sizes[-1]
    M = stride(k * q, q) @ M
    x = numbers(2, 3, M.shape[1])
    np.testing.assert_allclose(monarch_multiply(x, *factors), x.numpy() @ M.T, rtol=0, atol=1e-12)
    np.testing.assert_allclose(monarch_multiply(x[..., :-1], *factors), x[..., :-1].numpy() @ M[:, :-1].T, rtol=0, atol=1e-12)


def test_order_p_takes_n_to_the_1_plus_1_over_p():
    """Counted: 64 numbers take 4096, 1024 and 768 products, by one factor of 64 x 64, two of 8 x 8, three of 4 x 4."""
    for p, b in ((1, 64), (2, 8), (3, 4)):
        with FlopCounterMode(display=False) as counter:
            y = monarch_multiply(torch.randn(1, 64), *torch.ones(p, 64 // b, b, b))
        assert counter.get_total_flops() == 2 * p * 64 * b == 2 * {1: 4096, 2: 1024, 3: 768}[p]
        assert (y - y[0, 0]).abs().max() < 1e-4  # every output sees every input: with ones, their sum


def test_sizes_that_do_not_fit():
    B = numbers(2, 3, 4)
    for x, factors, name in [(numbers(9), [B], "x"), (numbers(8), [B, B], "factors"), (numbers(8), [], "factors"),
                             (numbers(8), [B[0]], "factors")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: "):
            monarch_multiply(x, *factors)


@pytest.mark.parametrize(
    ("dim_in", "dim_out", "blocks"), [(16, 16, None), (13, 50, None), (50, 13, 2), (7, 7, 1), (1, 3, None)]
)
def test_layer_is_its_dense_matrix(dim_in, dim_out, blocks):
    torch.manual_seed(0)
    layer, x = MonarchLinear(dim_in, dim_out, blocks=blocks, bias=True).double(), numbers(2, 3, dim_in)
    nn.init.normal_(layer.bias)
    dense = layer.dense()
    assert dense.shape == (dim_out, dim_in) and (dense != 0).all()
    torch.testing.assert_close(layer(x), x @ dense.mT + layer.bias, rtol=0, atol=1e-12)
    assert layer(x[:, :0]).shape == (2, 0, dim_out)


def test_number_of_parameters():
    """2 N^1.5 at N = b^2, and blocks q (p + s) elsewhere."""
    for b in (2, 8, 16):
        assert sum(p.numel() for p in MonarchLinear(b * b, b * b).parameters()) == 2 * b**3
    for sizes in ((256, 1024), (1024, 256)):
        assert sum(p.numel() for p in MonarchLinear(*sizes, blocks=4).parameters()) == 4 * 64 * (64 + 256)


@pytest.mark.parametrize(("dim_in", "dim_out", "blocks"), [(256, 256, None), (100, 300, 7), (300, 65, None), (256, 1024, 4)])
def test_it_begins_with_the_variance_of_a_dense_layer(dim_in, dim_out, blocks):
    """That of `fan_in`: the sum of the squares of a row is a quarter, on the average."""
    torch.manual_seed(0)
    power = torch.stack([MonarchLinear(dim_in, dim_out, blocks=blocks).dense().square().sum(1).mean() for _ in range(8)])
    assert power.mean().item() == pytest.approx(0.25, rel=0.06)


@pytest.mark.parametrize(
    ("options", "name"), [(dict(blocks=5), "blocks"), (dict(blocks=0), "blocks"), (dict(dim_out=0), "dim_out")]
)
def test_impossible_layers(options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        MonarchLinear(**dict(dim_in=16, dim_out=64) | options)


def test_a_model_of_monarch_layers_begins_as_a_dense_one():
    """Its outputs are zero and leave the stream alone, the seed decides, and its matrices are stacks that Muon moves."""
    fields = dict(vocab_size=31, dim=16, heads=2, depth=1, seq_len=8, stem="", mixer="gqa", ffn="monarch")
    one, same, other = (build_model(Config.of(**fields), seed=seed) for seed in (0, 0, 1))
    up, down = (getattr(one.stack[1].layer, name) for name in ("up", "down"))
    assert not down.second.any() and down.first.any() and up.second.any()
    assert torch.equal(up.first, same.stack[1].layer.up.first) and not torch.equal(up.first, other.stack[1].layer.up.first)
    names = {name for name, _ in split_parameters(one).hidden}
    assert {f"stack.1.layer.{part}.{factor}" for part in ("up", "down") for factor in ("first", "second")} <= names


# The Fourier transform


@pytest.mark.parametrize("n", [1, 2, 7, 12, 64, 90, 256])
def test_the_fourier_transform_is_a_monarch_matrix(n):
    x = torch.complex(numbers(3, n), numbers(3, n, seed=2))
    factors, back = monarch_dft(n), monarch_dft(n, inverse=True)
    X = monarch_multiply(x, *factors)
    np.testing.assert_allclose(X, np.fft.fft(x.numpy()), rtol=0, atol=1e-12)
    np.testing.assert_allclose(monarch_multiply(x, *back), np.fft.ifft(x.numpy()), rtol=0, atol=1e-12)
    a, b = factors[0].shape[1], factors[1].shape[1]
    assert a * b == n and sum(B.numel() for B in factors) == n * (a + b)


def test_sizes_of_squares():
    assert [square_of_at_least(n) for n in (1, 2, 4, 5, 9, 10, 1023, 1024, 1025)] == [1, 4, 4, 9, 9, 16, 1024, 1024, 1089]
    assert sum(B.numel() for B in monarch_dft(64)) == 1024  # in place of 4096


@pytest.mark.parametrize("N", [1, 2, 5, 33, 64])
def test_causal_convolution(N):
    u, k = numbers(2, N), numbers(2, N, seed=2)
    expected = np.stack([np.convolve(u[i], k[i])[:N] for i in range(2)])
    np.testing.assert_allclose(causal_convolution(u, k), expected, rtol=0, atol=1e-12)


def test_nothing_comes_from_later():
    """Of y_t no gradient goes to a u_s with s > t; on a circle of N without zeros it would."""
    N = 12
    u, k = numbers(N), numbers(N, seed=2)
    lower = torch.autograd.functional.jacobian(lambda u: causal_convolution(u, k), u)
    assert lower.triu(1).abs().max() < 1e-13 and lower.diagonal().sub(k[0]).abs().max() < 1e-13
    wrapped = torch.autograd.functional.jacobian(lambda u: circular_convolution(u, k, N), u)
    torch.testing.assert_close(wrapped[0, 1:], k.flip(0)[: N - 1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_convolution_in_less_precision(dtype):
    u, k = numbers(40).to(dtype), numbers(40, seed=2).to(dtype)
    y, exact = causal_convolution(u, k), causal_convolution(u.double(), k.double())
    assert y.dtype == torch.float32 and (y - exact).norm() / exact.norm() < 2e-6


def test_gradients():
    u, k = numbers(5).requires_grad_(), numbers(5, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(causal_convolution, (u, k))
    factors = [numbers(2, 3, 2).requires_grad_(), numbers(3, 2, 2, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(monarch_multiply, (numbers(2, 4).requires_grad_(), *factors))
