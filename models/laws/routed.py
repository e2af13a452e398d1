"""The loss of a mixture by the size of what a token goes through and by the number of experts, and the size it is worth.

Clark et al. 2022, "Unified Scaling Laws for Routed Language Models" (arXiv:2202.01169), equations 1 and 11; logarithms to
the base 10, one expert a token, every second feed-forward layer a mixture, 130 billion tokens:

    log L(N, E) = a log N + b log Ê + c log N log Ê + d
    1 / Ê = 1 / (E - 1 + 1 / (1/E_start - 1/E_max)) + 1 / E_max                   so Ê(1) = E_start and Ê(inf) = E_max
    N̄ = N^(α(Ê)/α(E_start)) (Ê/E_start)^(b/α(E_start)),  α(E) = a + c log E      so L(N̄, 1) = L(N, E)

N: parameters of the same model without experts. With c > 0 what experts bring shrinks as N grows, and is nothing at
N = 10^(-b/c). N̄ is the dense size with the same loss: on it as the axis all models lie on one line.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class RoutedLaw:
    """The law with its constants; `most` may be infinite: no saturation. ValueError unless 0 < start < most."""

    a: float
    b: float
    c: float
    d: float
    start: float = 1.0
    most: float = np.inf

    def __post_init__(self):
        if not 0 < self.start < self.most:
            raise ValueError(f"start: {self.start} must be positive and less than most, {self.most}")

    def saturated(self, experts: ArrayLike) -> np.ndarray:
        """Ê for E."""
        return saturated(positive("experts", experts), self.start, self.most)

    def loss(self, size: ArrayLike, experts: ArrayLike) -> np.ndarray:
        """L(N, E), nats a token."""
        x, y = np.log10(positive("size", size)), np.log10(self.saturated(experts))
        return 10 ** (self.a * x + self.b * y + self.c * x * y + self.d)

    def effective(self, size: ArrayLike, experts: ArrayLike) -> np.ndarray:
        """N̄, the effective parameter count."""
        first, here = np.log10(self.start), np.log10(self.saturated(experts))
        slope = self.a + self.c * first  # of a dense model
        return 10 ** (((self.a + self.c * here) * np.log10(positive("size", size)) + self.b * (here - first)) / slope)

    def gain(self, size: ArrayLike) -> np.ndarray:
        """-d log L / d log Ê at the size N: by how many powers of ten the loss falls where Ê is ten times as large."""
        return -(self.b + self.c * np.log10(positive("size", size)))

    @property
    def cutoff(self) -> float:
        """The size at which experts bring nothing; infinite where their gain does not shrink."""
        return float(10 ** (-self.b / self.c)) if self.c > 0 else np.inf


PUBLISHED = {  # table 3, by the router that `moe` has
    "sinkhorn": RoutedLaw(-0.082, -0.108, 0.009, 1.104, 1.847, 314.478),
    "rl": RoutedLaw(-0.083, -0.126, 0.012, 1.111, 1.880, 469.982),
    "hash": RoutedLaw(-0.087, -0.136, 0.012, 1.157, 4.175, 477.741),
}


def fit(
    sizes: Sequence[float],
    experts: Sequence[float],
    losses: Sequence[float],
    *,
    start: float | None = None,
    most: float | None = None,
) -> RoutedLaw:
    """The law nearest to runs of sizes N, with E experts, in the squares of log L: three sequences of one length.

    `start` and `most` given are kept: `start=1, most=inf` is Ê = E. Few experts say little about `most`. Given both, the rest
    is linear; else the best of a grid of them is improved by damped Gauss-Newton steps (Marquardt 1963) on all constants.
    ValueError for fewer runs than constants, for numbers that are not positive, and for fewer than two sizes or two numbers of
    experts.
    """
    sizes, experts, losses = positive("sizes", sizes), positive("experts", experts), positive("losses", losses)
    if not sizes.shape == experts.shape == losses.shape or sizes.ndim != 1:
        raise ValueError(f"sizes: shapes {sizes.shape}, {experts.shape}, {losses.shape}; one number of each a run")
    if not np.isfinite([sizes, experts, losses]).all():
        raise ValueError("sizes: sizes, experts and losses of runs must be finite")
    needed = 4 + (start is None) + (most is None)
    if len(sizes) < needed or min(len(np.unique(sizes)), len(np.unique(experts))) < 2:
        raise ValueError(f"sizes: {len(sizes)} runs cannot tell {needed} constants; at least two sizes, two numbers of experts")
    x, y = np.log10(sizes), np.log10(losses)
    starts = np.geomspace(1, 30, 12) if start is None else [start]
    mosts = np.geomspace(2, 1e4, 16) * experts.max() if most is None else [most]
    best = min((linear(x, experts, y, s, m) for s in starts for m in mosts if s < m), key=lambda made: made[0], default=None)
    if best is None:
        raise ValueError(f"start: {start} must be less than most, {most}")
    law = best[1]
    if start is not None and most is not None:
        return law
    free = [0, 1, 2, 3, *([4] if start is None else []), *([5] if most is None else [])]
    return RoutedLaw(*descend(np.array(astuple(law)), free, x, experts, y))


def linear(x: np.ndarray, experts: np.ndarray, y: np.ndarray, start: float, most: float) -> tuple[float, RoutedLaw]:
    """The sum of squares and the law, of log sizes and log losses, where saturation is known."""
    z = np.log10(saturated(experts, start, most))
    columns = np.stack([x, z, x * z, np.ones_like(x)], 1)
    solution = np.linalg.lstsq(columns, y, rcond=None)[0]
    return float(((columns @ solution - y) ** 2).sum()), RoutedLaw(*map(float, solution), float(start), float(most))


def descend(constants: np.ndarray, free: list[int], x: np.ndarray, experts: np.ndarray, y: np.ndarray) -> list[float]:
    """The constants after damped steps of those that are `free`; the slopes are those of a complex step, exact to rounding."""

    def values(theta: np.ndarray) -> np.ndarray:
        a, b, c, d, start, most = theta
        z = np.log10(saturated(experts, start, most))
        return a * x + b * z + c * x * z + d

    damping, off = 1e-3, values(constants) - y
    for _ in range(500):
        slopes = []
        for one in free:
            aside = constants.astype(complex)
            aside[one] += 1e-30j
            slopes.append(values(aside).imag / 1e-30)
        J = np.stack(slopes, 1)  # (runs, free)
        square, down = J.T @ J, J.T @ off
        scale = np.sqrt(np.diag(square)) + 1e-300  # constants have different units
        damped = square / np.outer(scale, scale) + damping * np.eye(len(free))
        step = np.linalg.lstsq(damped, down / scale, rcond=None)[0] / scale
        tried = constants.copy()
        tried[free] -= step
        better = 0 < tried[4] < tried[5] and ((new := values(tried) - y) ** 2).sum() < (off**2).sum()
        if better:
            constants, off, damping = tried, new, max(damping / 5, 1e-14)
        else:
            damping *= 4
        if damping > 1e12:
            break
    return [float(constant) for constant in constants]


def saturated(experts: np.ndarray, start: float, most: float) -> np.ndarray:
    """Ê for E, of any numbers, complex ones too."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


def positive(name: str, values: ArrayLike) -> np.ndarray:
    """The numbers as float64. ValueError naming the argument where one is not positive and finite."""
    array = np.asarray(values, dtype=np.float64)
    if not (array > 0).all() or np.isnan(array).any():
        raise ValueError(f"{name}: must be positive numbers")
    return array
