"""Monarch matrices: dense in what they connect, but a product of block-diagonal factors with fixed permutations between."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.checks import at_least

# N numbers of a vector; a factor has k blocks of q rows and p columns


def monarch_multiply(x: Tensor, *factors: Tensor) -> Tensor:
    """M x of the Monarch matrix M = P B_n … P B_2 P B_1 P, with B_i block-diagonal and P a reshape and a transpose.

    Fu et al. 2023, "Monarch Mixer" (arXiv:2310.12109), section 3, after Dao et al. 2022 (arXiv:2204.00595). The factor B_i is
    given as its blocks (k, q, p). P deals a vector out to the k blocks that read it next as cards are dealt: number j goes to
    block j mod k; and the last P takes one number from each block in turn. Two factors of b blocks b x b therefore
    connect each of N = b^2 inputs with each output, in 2 N^1.5 multiplications where a dense matrix takes N^2.

    x (…, N) and factors (k, q, p) of one dtype, real or complex. One rule for every size: x is filled up with zeros to the
    k p numbers that the first factor reads, and what one factor writes the next must read, k q = k' p'. Returns (…, k q) of
    the last factor. ValueError where the sizes do not fit.
    """
    if not factors or any(B.ndim != 3 for B in factors):
        raise ValueError(f"factors: each (k, q, p), and at least one, not {[tuple(B.shape) for B in factors]}")
    shape, x = x.shape[:-1], x.reshape(-1, x.shape[-1])  # (R, N)
    read = factors[0].shape[0] * factors[0].shape[2]
    if x.shape[1] > read:
        raise ValueError(f"x: {x.shape[1]} numbers, but the first factor reads {read}")
    x = F.pad(x, (0, read - x.shape[1]))
    for B in factors:
        k, q, p = B.shape
        if x.shape[1] != k * p:
            raise ValueError(f"factors: one writes {x.shape[1]} numbers, but the next reads {k * p}")
        x = x.unflatten(1, (p, k)).permute(2, 0, 1) @ B.mT  # (k, R, q)
        x = x.transpose(0, 1).flatten(1)  # (R, k q)
    return x.unflatten(1, (k, q)).mT.reshape(*shape, k * q)


class MonarchLinear(nn.Module):
    """y = M x + bias with a Monarch matrix M of two factors of `blocks` blocks, cut to `dim_out` numbers.

    With p = dim_in / blocks and s = dim_out / blocks, rounded up, and q the smaller of the two, the factors are
    (blocks, q, p) and (blocks, s, q), as in the authors' code: blocks q (p + s) parameters. By default blocks is the root
    of the smaller dimension, rounded down, which gives 2 N^1.5 for N = dim_in = dim_out = blocks^2. More blocks are
    refused, because some inputs would then reach only some outputs.

    Shapes: (…, dim_in) -> (…, dim_out). It begins with outputs of the variance that a dense layer's have under `fan_in`
    (nn/init.py), a quarter of that of the inputs; or with zeros, if it `writes_residual`.
    """

    def __init__(self, dim_in: int, dim_out: int, *, blocks: int | None = None, bias: bool = False):
        super().__init__()
        at_least(1, dim_in=dim_in, dim_out=dim_out, blocks=blocks)
        b = blocks or math.isqrt(min(dim_in, dim_out))
        p, s = -(-dim_in // b), -(-dim_out // b)
        q = min(p, s)
        if b > q:
            raise ValueError(f"blocks: {b} blocks of {q} numbers do not all reach each other; at most the root of the dim")
        self.dim_in, self.dim_out, self.writes_residual = dim_in, dim_out, False
        self.first, self.second = nn.Parameter(torch.empty(b, q, p)), nn.Parameter(torch.empty(b, s, q))
        self.bias = nn.Parameter(torch.empty(dim_out)) if bias else None
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """Uniform weights: each factor halves the variance. A factor of zeros is the second, so that it can learn."""
        b, _, q = self.second.shape
        zero = self.writes_residual
        for factor, fan_in in ((self.first, self.dim_in / b), (self.second, math.inf if zero else q)):
            bound = math.sqrt(1.5 / fan_in)
            factor.uniform_(-bound, bound, generator=generator)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = monarch_multiply(x, self.first, self.second)[..., : self.dim_out]
        return y if self.bias is None else y + self.bias

    def dense(self) -> Tensor:
        """M as a matrix (dim_out, dim_in)."""
        one = torch.eye(self.dim_in, dtype=self.first.dtype, device=self.first.device)
        return monarch_multiply(one, self.first, self.second)[:, : self.dim_out].mT


def monarch_dft(
    n: int, *, inverse: bool = False, dtype: torch.dtype = torch.complex128, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """The discrete Fourier transform of n = a b numbers as the two factors of a Monarch matrix.

    Cooley and Tukey 1965. With w = exp(-2 pi i / n), t = b t1 + t0 and f = f1 + a f2,

        X_f = sum_t0 w^(a t0 f2)  w^(t0 f1)  sum_t1 w^(b t1 f1) x_t

    is for each t0 a transform of size a, whose results are turned by w^(t0 f1) (folded into the first factor), and then for
    each f1 one of size b. a is the largest divisor of n up to its root; a prime has none, and its second factor is dense.

    Returns the factors (b, a, a) and (a, b, b) of a complex `dtype`, n (a + b) numbers in place of n^2; with `inverse`
    those of the inverse, which are the conjugates over n.
    """
    at_least(1, n=n)
    a = next(d for d in range(math.isqrt(n), 0, -1) if n % d == 0)
    b = n // a
    one, other = torch.arange(a, device=device), torch.arange(b, device=device)
    first = one[:, None] * (b * one + other[:, None, None])  # (t0, f1, t1): the power of w
    second = (a * other[:, None] * other).expand(a, b, b)  # (f1, f2, t0)
    sign = 1 if inverse else -1
    turned = [torch.exp(2j * math.pi * sign * (power % n).double() / n) for power in (first, second)]
    return (turned[0] / n if inverse else turned[0]).to(dtype), turned[1].to(dtype)


def circular_convolution(u: Tensor, k: Tensor, n: int) -> Tensor:
    """sum_s k_(t - s mod n) u_s as M^-1 (M k o M u), M the DFT of size n as a Monarch matrix.

    u (…, N) and k (…, N'), real, of at most n numbers (the others are zeros); float32, or float64 if u is. Returns (…, n).
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    options = dict(dtype=torch.complex128 if wide == torch.float64 else torch.complex64, device=u.device)
    forth, back = monarch_dft(n, **options), monarch_dft(n, inverse=True, **options)
    u, k = (monarch_multiply(x.to(options["dtype"]), *forth) for x in (u, k))
    return monarch_multiply(u * k, *back).real


def square_of_at_least(n: int) -> int:
    """The smallest square from n on: a size at which a Monarch matrix is at its cheapest."""
    return (math.isqrt(max(n, 1) - 1) + 1) ** 2


def causal_convolution(u: Tensor, k: Tensor) -> Tensor:
    """y_t = sum_{s <= t} k_(t-s) u_s for t < N, of u (…, N) and k (…, N).

    Fu et al. 2023 (arXiv:2310.12109), section 4 and theorem 2, for the DFT: its columns are the powers of N roots of
    unity, so that M u are the values of a polynomial with coefficients u, and M^-1 (M k o M u) is a product of polynomials,
    modulo one of degree n. Polynomials of degree below N have a product of degree below 2 N - 1: with n at least
    that nothing wraps around, and no y_t depends on a u_s with s > t.
    """
    N = u.shape[-1]
    return circular_convolution(u, k, square_of_at_least(2 * N - 1))[..., :N]
