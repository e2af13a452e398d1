"""LAMB: Adam's step, made as long for each parameter as the parameter is large. For large batches.

    m = β1 m + (1 - β1) g,  v = β2 v + (1 - β2) g²       Adam's two running means
    m̂ = m / (1 - β1^t),     v̂ = v / (1 - β2^t)           both start at zero: this takes the bias away
    r = m̂ / (√v̂ + ε)
    u = r + λ θ                                          the decay λ is part of the step, and so of its length
    θ = θ - lr φ u,         φ = |θ| / |u|                norms of one whole parameter; φ = 1 where either is zero

Source: You et al. 2019, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", arXiv:1904.00962,
algorithm 2, its scaling function being the identity. MegaScale (Jiang et al. 2024, arXiv:2402.15627) trains with it at four
times the batch. As lr is a relative change, what starts at zero and stays small (biases) is better left to another optimizer:
`--optimizer lamb:lr=0.02` moves the hidden matrices alone.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from kernels.shards import cuts, local

from .adamw import AdamW


def reference_step(param, grad, state, *, lr, betas, eps, weight_decay):
    """One step in NumPy float64: arrays of one shape in, `(param, state)` out; `state` is `{}` before the first."""
    beta1, beta2 = betas
    t = state.get("step", 0) + 1
    m = beta1 * state.get("mean", 0.0) + (1 - beta1) * grad
    v = beta2 * state.get("square", 0.0) + (1 - beta2) * grad**2
    r = (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + eps)
    u = r + weight_decay * param
    weight, update = np.sqrt(np.sum(param**2)), np.sqrt(np.sum(u**2))
    trust = weight / update if weight > 0 and update > 0 else 1.0
    return param - lr * trust * u, {"step": t, "mean": m, "square": v}


def lengths(parts: list[Tensor], params: list[Tensor]) -> list[Tensor]:
    """The norm of each tensor of which this process holds a part, cut as the parameter is: one message a way of cutting."""
    norms = [torch.linalg.vector_norm(x) for x in parts]
    ways: dict[tuple[dist.ProcessGroup, ...], list[int]] = {}
    for number, param in enumerate(params):
        ways.setdefault(cuts(param), []).append(number)
    for groups, members in ways.items():
        squares = torch.stack([norms[number].square() for number in members])
        for group in groups:
            dist.all_reduce(squares, group=group)
        for number, square in zip(members, squares, strict=True):
            norms[number] = square.sqrt()
    return norms


class Lamb(AdamW):
    """Layer-wise adaptive Adam, for parameters of any shape and floating-point dtype; each parameter is a layer, also where
    processes hold a part of it each.

    params: tensors, (name, tensor) pairs, or groups; lr: length of a step, as a share of the parameter's norm; betas: decay
    rates of the two means; eps: keeps the division finite, in units of the gradient; weight_decay: λ, within the step.
    State: step (int), mean and square (the parameter's shape; 8 bytes a parameter in all, 16 for float64).
    Raises ValueError naming the argument that is out of range.
    """

    elementwise = False

    def __init__(
        self,
        params,
        *,
        lr: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[dict]) -> None:
        (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
        own, steps = [local(param) for param in params], []
        for param, grad, state in zip(own, grads, states, strict=True):
            state["step"] += 1
            mean = local(state["mean"]).lerp_(grad, 1 - beta1)
            square = local(state["square"]).mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            root = (square / (1 - beta2 ** state["step"])).sqrt_().add_(eps)
            step = self.place.up((mean / (1 - beta1 ** state["step"])).div_(root), param)
            steps.append(step.add_(param, alpha=decay))
        for param, step, weight, update in zip(own, steps, lengths(own, params), lengths(steps, params), strict=True):
            trust = torch.where((weight > 0) & (update > 0), weight / update, 1.0)  # stays on the device: nothing waits
            param.sub_(step.mul_(lr * trust))
