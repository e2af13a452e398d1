"""AdamW: Adam's two running means, and weight decay that does not pass through them.

    m = β1 m + (1 - β1) g                    running mean of the gradient
    v = β2 v + (1 - β2) g²                   running mean of its square
    m̂ = m / (1 - β1^t),  v̂ = v / (1 - β2^t)  both means start at zero: this takes the bias away
    θ = θ - lr λ θ - lr m̂ / (√v̂ + ε)         the decay λ is "decoupled": not divided by √v̂

Sources: Kingma & Ba 2015, arXiv:1412.6980, algorithm 1; Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, in the
form everyone trains with, where the decay is multiplied by the whole learning rate and not by the schedule alone.
β2 = 0.95 is the value of language models since Brown et al. 2020, arXiv:2005.14165, appendix B.
"""

import math

import numpy as np
import torch
from torch import Tensor

from kernels.adamw import adamw

from .base import Optimizer, require, wide


def reference_step(param, grad, state, *, lr, betas, eps, weight_decay):
    """One step in NumPy float64: arrays of one shape in, `(param, state)` out; `state` is `{}` before the first."""
    beta1, beta2 = betas
    t = state.get("step", 0) + 1
    m = beta1 * state.get("mean", 0.0) + (1 - beta1) * grad
    v = beta2 * state.get("square", 0.0) + (1 - beta2) * grad**2
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    param = param - lr * weight_decay * param - lr * m_hat / (np.sqrt(v_hat) + eps)
    return param, {"step": t, "mean": m, "square": v}


class AdamW(Optimizer):
    """Adam with decoupled weight decay, for parameters of any shape and floating-point dtype.

    params: tensors, (name, tensor) pairs, or groups; lr: step size; betas: decay rates of the two means;
    eps: keeps the division finite, in units of the gradient; weight_decay: λ, multiplied by lr at each step.
    State: step (int), mean and square (the parameter's shape; 8 bytes a parameter in all, 16 for float64).
    Raises ValueError naming the argument that is out of range.
    """

    def __init__(
        self,
        params,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    def check(self, group: dict) -> None:
        super().check(group)
        betas, eps, weight_decay = group["betas"], group["eps"], group["weight_decay"]
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        require(pair and all(0 <= beta < 1 for beta in betas), "betas", betas, "two numbers in [0, 1)")
        require(0 <= eps < math.inf, "eps", eps, "a finite number of at least 0")
        require(0 <= weight_decay < math.inf, "weight_decay", weight_decay, "a finite number of at least 0")

    def init_state(self, param: Tensor) -> dict:
        zeros = torch.zeros_like(param, dtype=wide(param.dtype))
        return {"step": 0, "mean": zeros, "square": zeros.clone()}

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[dict]) -> None:
        for state in states:
            state["step"] += 1
        means, squares, steps = ([state[key] for state in states] for key in ("mean", "square", "step"))
        numbers = {key: group[key] for key in ("lr", "eps", "weight_decay")}
        adamw(params, grads, means, squares, steps, **numbers, beta1=group["betas"][0], beta2=group["betas"][1])
