"""Fewer experts a token: the best stay whole, the others are one learned vector each.

He et al. 2025, "Efficiently Editing Mixture-of-Experts Models with Compressed Experts" (arXiv:2503.00634), section 3: of the K
choices of a token the `main` ones with the largest weights g are asked, the others modulate what those read:

    x' = x * (sum_main g_i + sum_others g_j e_j) / sum_all g,      y = (sum_all g / sum_main g) sum_main g_i E_i(x')

With vectors e_j of ones it is the mixture of the `main` best experts. That the product is with the input, and that the gates
are normalised so, is our reading.
"""

import torch
from torch import Tensor


def modulated(x: Tensor, experts: Tensor, weights: Tensor, vectors: Tensor, main: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, dim), choices and weights (N, K), vectors (E, dim) -> x', and the main choices and their weights (N, main)."""
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    experts = experts.gather(-1, order)
    best, whole = weights[:, :main], weights.sum(-1, keepdim=True)
    others = torch.cat([vectors, torch.zeros_like(vectors[:1])])[experts[:, main:]]  # (N, K - main, dim); none has no vector
    share = best.sum(-1, keepdim=True)
    x = x * ((share + (weights[:, main:, None] * others).sum(1)) / whole).to(x.dtype)
    return x, experts[:, :main], best * whole / share
