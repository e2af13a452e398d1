"""Muon's orthogonalisation: the nearest semi-orthogonal matrix, roughly, by a few matrix products.

    X = G / |G|                          Frobenius norm, so that no singular value is above 1
    A = X X^T                            symmetric: half of its blocks are worked out, and mirrored
    X = a X + (b A + c A A) X            again and again; b A + c A A is symmetric too

Singular values go s -> a s + b s^3 + c s^5, singular vectors stay. The coefficients are the steepest at 0 that keep
values near 1 and so do not converge: five steps take singular values of 0.2 % of the norm and more to 0.68 … 1.21.
Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", kellerjordan.github.io/posts/muon.

For matrices of m = min(rows, columns) and n = max(…), a step is 4 m^2 n + 2 m^3 FLOPs; half of the symmetric products
saved, 3 m^2 n + m^3. Bytes of b a number: (3 m n + 4 m^2) b a step.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kernels.launch import dot, launch, on_triton, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

QUINTIC = (3.4445, -4.7750, 2.0315)
EPS = 1e-7  # a smaller norm counts as this one, so that a zero gradient stays zero

# E matrices, M rows, K columns with M <= K


def reference(g, steps=5):
    a, b, c = QUINTIC
    x = g / np.maximum(np.sqrt((g**2).sum((-2, -1), keepdims=True)), EPS)
    for _ in range(steps):
        gram = x @ np.swapaxes(x, -2, -1)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@triton.jit
def symmetric_kernel(x, y, M, K, b, c, POLYNOMIAL: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """y = x x^T, or y = b x + c x x^T for a symmetric x: a block on or below the diagonal a program, and its mirror image."""
    i, j = tl.program_id(0), tl.program_id(1)
    if j <= i:
        x += tl.program_id(2).to(tl.int64) * M * K
        y += tl.program_id(2).to(tl.int64) * M * M
        rows = i * BLOCK + tl.arange(0, BLOCK)
        others = j * BLOCK + tl.arange(0, BLOCK)
        product = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, K, DEPTH):
            k = start + tl.arange(0, DEPTH)
            left = tl.load(x + rows[:, None] * K + k[None, :], (rows[:, None] < M) & (k[None, :] < K), 0)  # (BLOCK, DEPTH)
            right = tl.load(x + others[None, :] * K + k[:, None], (others[None, :] < M) & (k[:, None] < K), 0)
            product = dot(left, right, product)
        inside = (rows[:, None] < M) & (others[None, :] < M)
        if POLYNOMIAL:
            product = c * product + b * tl.load(x + rows[:, None] * K + others[None, :], inside, 0).to(tl.float32)
        result = product.to(y.dtype.element_ty)
        tl.store(y + rows[:, None] * M + others[None, :], result, inside)
        if j < i:
            tl.store(y + rows[:, None] + others[None, :] * M, result, inside)


def symmetric_product(x: Tensor, polynomial: tuple[float, float] | None = None) -> Tensor:
    """(E, M, K) -> (E, M, M): x x^T, or with polynomial (b, c) and a symmetric x (K = M) b x + c x x."""
    E, M, K = x.shape
    if not on_triton(x):
        if polynomial is None:
            return x @ x.mT
        return torch.baddbmm(x, x, x, beta=polynomial[0], alpha=polynomial[1])
    y = x.new_empty(E, M, M)
    block = 16 if M < 128 else 64 if M < 512 or x.element_size() == 4 else 128
    blocks = -(-M // block)
    b, c = polynomial or (0.0, 1.0)
    depth = min(64, 2 * block) if x.element_size() == 2 else 16  # float32 is multiplied without tensor cores
    options = dict(BLOCK=block, DEPTH=depth, num_warps=8 if block == 128 else 4, num_stages=3)
    launch(symmetric_kernel, (blocks, blocks, E), x, y, M, K, b, c, POLYNOMIAL=polynomial is not None, **options)
    return y


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    """U V^T of g = U S V^T, roughly: five steps take singular values to 0.68 … 1.21.

    g: (…, rows, columns), a matrix or a batch of them; the result has its shape, and `dtype` (None: that of g), in which
    all products are taken. bfloat16 loses nothing that matters in training and is faster wherever the hardware
    multiplies it (GPUs since 2020, CPUs with AMX or AVX512-BF16). ValueError below 2 axes or for fewer than 0 steps.
    """
    require(g.ndim >= 2 and g.is_floating_point(), "g", f"floating point of at least 2 axes, not {g.dtype} {tuple(g.shape)}")
    require(steps >= 0, "steps", f"at least 0, not {steps}")
    a, b, c = QUINTIC
    dtype = dtype or g.dtype
    tall = g.shape[-2] > g.shape[-1]  # then transpose: the Gram matrix is the small one
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    x = (wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)).to(dtype)
    x = (x.mT if tall else x).reshape(math.prod(g.shape[:-2]), *sorted(g.shape[-2:])).contiguous()
    if len(x) == 1 and not on_triton(x):  # on a CPU a batch of one takes 1.4 times as long as a matrix
        x = x[0]
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        for _ in range(steps):
            x = torch.baddbmm(x, symmetric_product(symmetric_product(x), (b, c)), x, beta=a)
    x = x.reshape(*g.shape[:-2], *sorted(g.shape[-2:]))
    return x.mT if tall else x


def op(g: Tensor, steps: int = 5) -> Tensor:
    """All in the dtype of g, as the SPEC's test needs it."""
    return newton_schulz(g, steps, None)


def pytorch(g, steps=5):
    a, b, c = QUINTIC
    wide = g.to(torch.promote_types(g.dtype, torch.float32))
    x = (wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)).to(g.dtype)
    for _ in range(steps):
        gram = x @ x.mT if g.shape[-2] <= g.shape[-1] else x.mT @ x
        polynomial = b * gram + c * gram @ gram
        x = a * x + (polynomial @ x if g.shape[-2] <= g.shape[-1] else x @ polynomial)
    return x


def inputs(draw: Draw) -> dict:
    shape = draw.one_of((), (0,), (1,), (3,), (2, 2)) + draw.one_of((1, 1), (3, 8), (8, 3), (20, 20), (40, 33), (17, 70))
    return dict(g=draw.normal(*shape, scale=draw.one_of(1.0, 1e-3, 0.0)), steps=draw.one_of(0, 1, 2, 5))


def cost(g, steps=5) -> tuple[Cost, Cost]:
    m, n = sorted(g.shape[-2:])
    return Cost(steps * (3 * m * m * n + m**3) * math.prod(g.shape[:-2]), 2 * bytes_of(g)), Cost(0, 0)


SPEC = Spec(
    op=op,
    reference=reference,
    reference_backward=None,
    pytorch=pytorch,
    inputs=inputs,
    gradients=(),
    cost=cost,
    gpu=(dict(g=Shape((8, 4096, 4096))), dict(g=Shape((48, 256, 1024)))),
    cpu=(dict(g=Shape((256, 1024))), dict(g=Shape((12, 256, 256)))),
)
