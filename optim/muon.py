"""Muon: momentum whose matrix is made orthogonal before it is taken as the step.

    M = μ M + (1 - μ) G                      running mean of the gradient
    N = μ M + (1 - μ) G                      (Nesterov: look one step ahead; else N = M)
    O = NewtonSchulz(N) ≈ U Vᵀ               where N = U Σ Vᵀ: every direction gets a step of about the same length
    θ = θ - lr λ θ - lr s O                  decoupled decay λ, and a factor s that depends on the shape alone

Sources: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks",
kellerjordan.github.io/posts/muon (the iteration, its coefficients, s = √max(1, rows/columns)); Liu et al. 2025, "Muon
is scalable for LLM training", arXiv:2502.16982 (weight decay, s = 0.2 √max(rows, columns)). M is a mean, as in Jordan's
code; the sum they write is the same up to a factor, which the orthogonalisation takes away.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .base import Optimizer, require, wide

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at 0 that keeps singular values near 1, not a convergent iteration
EPS = 1e-7  # a smaller Frobenius norm counts as this one, so that a zero gradient gives a zero step
SCALES = {
    "spectral": lambda rows, columns: math.sqrt(max(1, rows / max(1, columns))),  # RMS gain alike in all shapes
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),  # entries of the size of AdamW's: share its lr
}


def reference_step(param, grad, state, *, lr, momentum, nesterov, weight_decay, ns_steps, scale):
    """One step in NumPy float64: arrays (…, rows, columns) in, `(param, state)` out; `state` is `{}` at first."""
    mean = momentum * state.get("mean", 0.0) + (1 - momentum) * grad
    x = momentum * mean + (1 - momentum) * grad if nesterov else mean
    x = x / np.maximum(np.sqrt((x**2).sum((-2, -1), keepdims=True)), EPS)
    a, b, c = QUINTIC
    for _ in range(ns_steps):  # singular values go σ -> a σ + b σ³ + c σ⁵, singular vectors stay
        gram = x @ np.swapaxes(x, -2, -1)
        x = a * x + b * gram @ x + c * gram @ gram @ x
    size = SCALES[scale](*param.shape[-2:])
    return param - lr * weight_decay * param - lr * size * x, {"mean": mean}


def newton_schulz(g: Tensor, steps: int = 5, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The nearest semi-orthogonal matrix U Vᵀ of g = U Σ Vᵀ, roughly: 5 steps take singular values to 0.68 … 1.21.

    g: (…, rows, columns), a matrix or a batch of them; the result has its shape, and `dtype`, in which all products are
    taken. bfloat16 loses nothing that matters in training and is faster wherever the hardware multiplies it (GPUs since
    2020, CPUs with AMX or AVX512-BF16); pass float32 elsewhere. Singular values below 0.2 % of g's norm end lower.
    FLOPs: steps (4 m² n + 2 m³) a matrix of m = min(rows, columns) and n = max(…). ValueError below 2 axes.
    """
    require(g.ndim >= 2, "g", tuple(g.shape), "of at least 2 axes")
    a, b, c = QUINTIC
    tall = g.shape[-2] > g.shape[-1]  # then transpose: the Gram matrix is the small one
    x = (g / g.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)).to(dtype)  # Frobenius norm >= largest singular value
    x = (x.mT if tall else x).reshape(math.prod(g.shape[:-2]), *sorted(g.shape[-2:]))
    x, addmm = (x[0], torch.addmm) if len(x) == 1 else (x, torch.baddbmm)  # a batch of one takes 1.4 times as long
    for _ in range(steps):
        gram = x @ x.mT
        x = addmm(x, addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(g.shape)


class Muon(Optimizer):
    """Orthogonalised momentum for hidden weight matrices (rows, columns), or stacks (matrices, rows, columns).

    lr: step size; momentum: μ; nesterov: look ahead; weight_decay: λ, multiplied by lr (and not by s) at each step;
    ns_steps: Newton-Schulz steps; scale: `spectral` s = √max(1, rows/columns), or `rms` s = 0.2 √max(rows, columns) at
    which lr and weight_decay are those of AdamW; dtype: of the iteration, by name, see `newton_schulz`.
    State: mean (the parameter's shape; 4 bytes a parameter, 8 for float64).
    Raises ValueError naming the argument that is out of range, or a parameter that is no matrix: give those to AdamW.
    """

    ndims = (2, 3)
    exact = {"dtype": "float64"}

    def __init__(
        self,
        params,
        *,
        lr: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
        scale: str = "spectral",
        dtype: str = "bfloat16",
    ):
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay)
        super().__init__(params, defaults | dict(ns_steps=ns_steps, scale=scale, dtype=dtype))

    def check(self, group: dict) -> None:
        super().check(group)
        dtypes = ("bfloat16", "float32", "float64")
        require(0 <= group["momentum"] < 1, "momentum", group["momentum"], "in [0, 1)")
        decay, ns_steps = group["weight_decay"], group["ns_steps"]
        require(0 <= decay < math.inf, "weight_decay", decay, "a finite number of at least 0")
        require(isinstance(ns_steps, int) and 1 <= ns_steps < 100, "ns_steps", ns_steps, "an integer from 1 to 99")
        require(group["scale"] in SCALES, "scale", group["scale"], " or ".join(SCALES))
        require(group["dtype"] in dtypes, "dtype", group["dtype"], " or ".join(dtypes))

    def init_state(self, param: Tensor) -> dict:
        return {"mean": torch.zeros_like(param, dtype=wide(param.dtype))}

    def bucket(self, param: Tensor) -> tuple:
        """Equal shapes are multiplied as one batch: 64 x 256 four times as fast on a CPU. Beyond 2^17 entries each goes
        alone there, since a batch would leave the cache and take 1.2 times as long.
        """
        alone = param.device.type == "cpu" and param.numel() > 2**17
        return (id(param),) if alone else (param.device, param.shape)

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[dict]) -> None:
        lr, momentum, dtype = group["lr"], group["momentum"], getattr(torch, group["dtype"])
        means = [state["mean"] for state in states]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        steps = torch._foreach_lerp(grads, means, momentum) if group["nesterov"] else means
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        steps = newton_schulz(torch.stack(steps), group["ns_steps"], dtype)
        size = lr * SCALES[group["scale"]](*params[0].shape[-2:])
        for param, step in zip(params, steps, strict=True):
            param.add_(step, alpha=-size)
