"""The speed-up factor: compute of a dense model for a loss, divided by what another kind of model has spent on the same loss.

    s(L) = C_dense(L) / C(L)

Artetxe et al. 2021, "Efficient Large Scale Language Modeling with Mixtures of Experts" (arXiv:2112.10684). C_dense is read off
the curve of a ladder of dense models, on which log C is linear in L between two neighbours. Computes have any unit, FLOPs of
training say, and losses too, nats or bits, as long as both sides have the same.
"""

from collections.abc import Sequence

import numpy as np


def dense_compute(loss: float, compute: Sequence[float], losses: Sequence[float]) -> float:
    """The compute at which the curve through (compute, losses) of dense models, in any order, has this loss.

    ValueError where these are no curve (fewer than two, not positive, or a loss that does not fall as compute grows), and
    where the loss lies outside of it: nothing is extrapolated.
    """
    compute, losses = np.asarray(compute, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    if compute.ndim != 1 or compute.shape != losses.shape or len(compute) < 2:
        raise ValueError(f"compute: {compute.shape} and losses {losses.shape}; at least two numbers each, as many of both")
    if not (np.isfinite(compute).all() and (compute > 0).all()):
        raise ValueError("compute: it must be finite and positive")
    order = np.argsort(compute)
    compute, losses = compute[order], losses[order]
    if not (np.diff(losses) < 0).all() or not (np.diff(compute) > 0).all():
        raise ValueError("losses: those of dense models must fall as compute grows")
    if not losses[-1] <= loss <= losses[0]:
        raise ValueError(f"loss: {loss:.4g} lies outside of the dense curve, {losses[-1]:.4g} to {losses[0]:.4g}")
    return float(np.exp(np.interp(loss, losses[::-1], np.log(compute[::-1]))))


def speedup(loss: float, spent: float, compute: Sequence[float], losses: Sequence[float]) -> float:
    """How many times as much compute as `spent` dense models need for this loss; `compute` and `losses` are their curve.

    More than 1 where they need more. ValueError as in `dense_compute`, and for `spent` that is not positive.
    """
    if not spent > 0:
        raise ValueError(f"spent: {spent} is no compute; it must be positive")
    return dense_compute(loss, compute, losses) / spent
