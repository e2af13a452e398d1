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

import torch
from torch import Tensor

from kernels.newton_schulz import newton_schulz
from kernels.newton_schulz import reference as orthogonalised
from kernels.shards import local, part, whole

from .base import Optimizer, require, wide

SCALES = {
    "spectral": lambda rows, columns: math.sqrt(max(1, rows / max(1, columns))),  # RMS gain alike in all shapes
    "rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),  # entries of the size of AdamW's: share its lr
}


def reference_step(param, grad, state, *, lr, momentum, nesterov, weight_decay, ns_steps, scale):
    """One step in NumPy float64: arrays (…, rows, columns) in, `(param, state)` out; `state` is `{}` at first."""
    mean = momentum * state.get("mean", 0.0) + (1 - momentum) * grad
    x = momentum * mean + (1 - momentum) * grad if nesterov else mean
    x = orthogonalised(x, ns_steps)
    size = SCALES[scale](*param.shape[-2:])
    return param - lr * weight_decay * param - lr * size * x, {"mean": mean}


class Muon(Optimizer):
    """Orthogonalised momentum for hidden weight matrices (rows, columns), or stacks (matrices, rows, columns).

    lr: step size; momentum: μ; nesterov: look ahead; weight_decay: λ, multiplied by lr (and not by s) at each step;
    ns_steps: Newton-Schulz steps; scale: `spectral` s = √max(1, rows/columns), or `rms` s = 0.2 √max(rows, columns) at
    which lr and weight_decay are those of AdamW; dtype: of the iteration, by name, see `newton_schulz`. A group's parts: the
    rows of each of several matrices that stand one above the other in its parameters, as in a fused projection; each is made
    orthogonal by itself, or the parts with small gradients would hardly move.
    State: mean (the parameter's shape; 4 bytes a parameter, 8 for float64).
    Raises ValueError naming the argument that is out of range, or a parameter that is no matrix: give those to AdamW.
    """

    elementwise = False
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
        defaults = dict(lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay, parts=())
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
        for param in group["params"] if group["parts"] else ():
            fits = not isinstance(param, Tensor) or sum(group["parts"]) == param.shape[-2]  # a saved group holds numbers
            require(fits, "parts", group["parts"], f"the rows of {tuple(getattr(param, 'shape', ()))}, in parts")

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
        means = [local(state["mean"]) for state in states]
        torch._foreach_lerp_(means, grads, 1 - momentum)
        steps = torch._foreach_lerp(grads, means, momentum) if group["nesterov"] else means
        steps = [self.place.up(step, param) for step, param in zip(steps, params, strict=True)]
        torch._foreach_mul_([local(param) for param in params], 1 - lr * group["weight_decay"])
        steps = torch.stack([whole(step, like=param) for step, param in zip(steps, params, strict=True)])
        parts = list(group["parts"]) or [params[0].shape[-2]]
        for place, rows in enumerate(steps.split(parts, -2)):
            size = lr * SCALES[group["scale"]](*rows.shape[-2:])
            steps.narrow(-2, sum(parts[:place]), parts[place]).copy_(newton_schulz(rows, group["ns_steps"], dtype).mul_(-size))
        for param, step in zip(params, steps, strict=True):
            local(param).add_(part(step, like=param))
