"""A bound on the tokens an expert takes, and what becomes of the rest.

An expert has room for C = ceil(factor N K / E) of the N K choices. Where experts stand on different machines the busiest one
decides how long a layer takes, so a bound of C makes the layer wait no longer than factor times the mean: He et al. 2025,
"Capacity-Aware Inference: Mitigating the Straggler Effect in Mixture of Experts" (arXiv:2503.05066), equations 3 to 6. In
training it makes tensors of one size (Lepikhin et al. 2020, "GShard", arXiv:2006.16668). A choice that finds no room is
dropped, so that the token passes by on the residual path, or given to the next best expert with room.
"""

import math

import torch
from torch import Tensor

METRICS = ("score", "order", "reverse", "random")


def room(factor: float, choices: int, experts: int) -> int:
    """How many choices each of the experts may take, of all `choices` together."""
    return min(choices, math.ceil(factor * choices / experts)) if factor < math.inf else choices


def precedence(weights: Tensor, metric: str) -> Tensor:
    """(N, K) -> (N K,): the choices, by number, in the order in which they are served.

    score: the largest weight first. order: first choices before second ones, each as the tokens stand (GShard). reverse: the
    other way round. random: drawn from PyTorch's generator.
    """
    N, K = weights.shape
    if metric == "score":
        return weights.flatten().argsort(descending=True, stable=True)
    if metric == "random":
        return torch.randperm(N * K, device=weights.device)
    order = torch.arange(N * K, device=weights.device).view(N, K).T.flatten()
    return order if metric == "order" else order.flip(0)


def fitting(experts: Tensor, order: Tensor, rooms: Tensor) -> Tensor:
    """(N K,) bool: which choices find room. experts (N, K); `order` (M,) who is served first; rooms (E,) of each expert."""
    E, served = len(rooms), experts.flatten()[order]
    by_expert = served.argsort(stable=True)
    counts = served.new_zeros(E + 1).scatter_add_(0, served, torch.ones_like(served))
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[served[by_expert]]
    rooms = torch.cat([rooms, rooms.new_zeros(1)])  # none has no room
    kept = torch.zeros(experts.numel(), dtype=torch.bool, device=order.device)
    kept[order[by_expert]] = place < rooms[served[by_expert]]
    return kept


def drop(experts: Tensor, weights: Tensor, many: int, capacity: int, metric: str = "score") -> Tensor:
    """Choices (N, K) of `many` experts -> the same with `many`, which means none, where there was no room."""
    rooms = torch.full((many,), capacity, device=experts.device)
    kept = fitting(experts, precedence(weights, metric), rooms).view_as(experts)
    return torch.where(kept, experts, many)


def reroute(
    experts: Tensor, weights: Tensor, scores: Tensor, capacity: int, metric: str = "score", extra: int | None = None
) -> tuple[Tensor, Tensor]:
    """What finds no room goes to the best expert that the token has not chosen and that has: (N, K) experts and weights.

    `scores` (N, E) rank the experts of a token. Beyond its K choices a token has `extra` candidates (all, where None), tried in
    rounds: in each, the token's largest choice without a place asks the next candidate, and candidates accept by score. The
    weight is to the score as for the token's other choices. Some may stay without a place although there is room, since no
    token takes one expert twice.
    """
    K, E = experts.shape[1], scores.shape[-1]
    placed = drop(experts, weights, E, capacity, metric)
    own = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, True)
    ranking = scores.masked_fill(own, -torch.inf).argsort(dim=-1, descending=True, stable=True)  # the own ones last
    ratio = weights.sum(-1) / scores.gather(-1, experts).sum(-1).clamp(min=torch.finfo(scores.dtype).tiny)  # (N,)
    rounds = E - K if extra is None else min(extra, E - K)
    for candidate in ranking[:, :rounds].T:  # (N,)
        homeless = placed == E
        slot = torch.where(homeless, weights, -1.0).argmax(-1, keepdim=True)
        asks = homeless.gather(-1, slot)[:, 0]
        score = scores.gather(-1, candidate[:, None])[:, 0]
        order = torch.where(asks, score, -torch.inf).argsort(descending=True, stable=True)[: int(asks.sum())]
        used = torch.zeros(E + 1, dtype=torch.int64, device=experts.device)
        used.scatter_add_(0, placed.flatten(), torch.ones_like(placed.flatten()))
        accepted = fitting(candidate[:, None], order, capacity - used[:E])  # (N,)
        here = accepted[:, None] & torch.zeros_like(homeless).scatter(-1, slot, True)
        placed = torch.where(here, candidate[:, None], placed)
        weights = torch.where(here, (ratio * score)[:, None], weights)
    return placed, weights
