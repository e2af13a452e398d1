"""AdamW for parameters of which a step uses few rows: experts (E, out, in) that some tokens asked, words of an embedding.

    where row r of g is not all zeros:    m_r, v_r, θ_r step as in AdamW, decay among it
    elsewhere:                            m_r, v_r and θ_r stay as they are, bit for bit

A row is what one index of the first axis has. t counts the steps of the parameter, also those that leave a row out, which makes
the correction of the bias approximate, as in torch.optim.SparseAdam. Unlike AdamW, a row that is not used neither decays nor
goes on by its momentum: a step looks through the gradient once, and of the 28 bytes a number that AdamW reads and writes only
those of used rows move. A row that was used, but with a gradient of zeros, counts as unused.

Sources: the update on the host in Ren et al. 2023, "PanGu-Sigma", arXiv:2303.10845; the equation is AdamW's
(Kingma & Ba 2015, arXiv:1412.6980; Loshchilov & Hutter 2019, arXiv:1711.05101).
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from kernels.adamw import adamw
from kernels.shards import local

from .adamw import AdamW
from .adamw import reference_step as dense_step


def reference_step(param, grad, state, *, lr, betas, eps, weight_decay):
    """One step in NumPy float64: arrays of one shape in, `(param, state)` out; `state` is `{}` before the first."""
    state = state or {"step": 0, "mean": np.zeros_like(param), "square": np.zeros_like(param)}
    rows = np.any(grad.reshape(*grad.shape[:1], -1) != 0, -1) if grad.size else np.zeros(grad.shape[:1], bool)
    rows = rows.reshape(rows.shape + (1,) * (grad.ndim - rows.ndim))
    moved, new = dense_step(param, grad, state, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    kept = {key: np.where(rows, new[key], state[key]) for key in ("mean", "square")}
    return np.where(rows, moved, param), {"step": new["step"]} | kept


def used_rows(grad: Tensor, param: Tensor) -> Tensor:
    """The numbers (n,) of rows with a gradient, of which this process has the part `grad`; the others' parts of a row count."""
    flat = grad.unsqueeze(-1).flatten(1)
    used = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    if flat.numel():
        used = (flat.amax(1) != 0) | (flat.amin(1) != 0)  # a quarter of the time of `any`, and no square vanishes in it
    if isinstance(param, DTensor):
        for dim, place in enumerate(param.placements):
            if place.is_shard() and place.dim % param.ndim:  # within rows
                flags = used.to(local(param).device, torch.int32)
                dist.all_reduce(flags, dist.ReduceOp.MAX, group=param.device_mesh.get_group(dim))
                used = flags.to(used.device) > 0
    return used.nonzero()[:, 0]


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """A copy of some rows; of all, x itself."""
    return x if len(rows) == len(x) else x.index_select(0, rows)


def put_back(value: Tensor, x: Tensor, rows: Tensor) -> None:
    if value is not x:
        x.index_copy_(0, rows, value)


class SparseAdamW(AdamW):
    """AdamW of the rows that have a gradient, the others staying as they are: for experts and embeddings.

    params: tensors, (name, tensor) pairs, or groups; a single number is a row. lr, betas, eps, weight_decay: those of AdamW.
    State: step (int), mean and square (the parameter's shape; 8 bytes a parameter in all, 16 for float64).
    Raises ValueError naming the argument that is out of range.
    """

    elementwise = False

    def update(self, group: dict, params: list[Tensor], grads: list[Tensor], states: list[dict]) -> None:
        (beta1, beta2), lr, eps, decay = group["betas"], group["lr"], group["eps"], group["weight_decay"]
        for param, grad, state in zip(params, grads, states, strict=True):
            state["step"] += 1
            own, grad, mean, square = map(torch.atleast_1d, (local(param), grad, local(state["mean"]), local(state["square"])))
            rows = used_rows(grad, param)
            g, m, v = (taken(x, rows) for x in (grad, mean, square))
            move = torch.zeros_like(m)  # where AdamW takes a parameter of zeros is how far it moves any
            adamw([move], [g], [m], [v], [state["step"]], lr=lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=0.0)
            put_back(m, mean, rows)
            put_back(v, square, rows)
            move, rows = self.place.up(move, param), rows.to(own.device)
            put_back(taken(own, rows).mul_(1 - lr * decay).add_(move), own, rows)
