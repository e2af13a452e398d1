"""How a context of `original` trained positions is stretched by a factor: from RoPE's frequencies to lower ones.

`frequencies` are float64 (R/2,), radians a position, the highest first: theta^(-2i/R). Each function gives back as many,
and with a factor of 1 the same ones. None of them reads a text: they are settled before the first token.
"""

import math

import torch
from torch import Tensor


def linear(frequencies: Tensor, factor: float) -> Tensor:
    """Position interpolation: all are divided, so that no angle is new, but neighbours stand closer than ever.

    Chen et al. 2023, "Extending Context Window of Large Language Models via Positional Interpolation" (arXiv:2306.15595).
    """
    return frequencies / factor


def ntk(frequencies: Tensor, factor: float) -> Tensor:
    """NTK-aware: theta grows by factor^(R/(R-2)), so that the highest frequency is kept and the lowest divided.

    bloc97 2023, in Peng et al. 2023, "YaRN" (arXiv:2309.00071), definition 1. The "dynamic" form, which for T tokens takes
    the factor s T / original - (s - 1), is this one at that factor.
    """
    last = max(len(frequencies) - 1, 1)
    return frequencies * factor ** (-torch.arange(len(frequencies), dtype=torch.float64) / last)


def llama3(frequencies: Tensor, factor: float, *, original: int, low: float = 1.0, high: float = 4.0) -> Tensor:
    """By turns: fewer than `low` in the trained context are divided, more than `high` kept, those between blended.

    Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv:2407.21783); also "NTK-by-parts" as YaRN's paper has it.
    """
    turns = original * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def yarn(
    frequencies: Tensor, factor: float, *, theta: float, original: int, beta_slow: float = 1.0, beta_fast: float = 32.0
) -> Tensor:
    """The same, but blended evenly over the pairs between: from the one that makes beta_fast turns to that of beta_slow.

    Peng et al. 2023, "YaRN: Efficient Context Window Extension of Large Language Models" (arXiv:2309.00071). Its eq. 13
    blends by the number of turns; here as in its authors' code, which published models follow: by whole pairs.
    """
    dim = 2 * len(frequencies)
    pair_of = lambda turns: dim * math.log(original / (2 * math.pi * turns)) / (2 * math.log(theta))  # noqa: E731
    first, last = max(math.floor(pair_of(beta_fast)), 0), min(math.ceil(pair_of(beta_slow)), dim - 1)
    divided = ((torch.arange(len(frequencies)) - first).double() / (last - first or 0.001)).clamp(0, 1)
    return frequencies * (1 - divided + divided / factor)


def yarn_gain(factor: float) -> float:
    """YaRN's temperature, eq. 15, as what queries and keys are both multiplied by: 0.1 ln(factor) + 1."""
    return 0.1 * math.log(factor) + 1


def angle_shares(frequencies: Tensor, length: int, bins: int = 360) -> Tensor:
    """(R/2, bins): of `length` positions, the share whose angle falls into each of so many equal parts of a turn.

    A part that no angle falls into counts as 2^-14 of one (float16's smallest normal number, in the authors' code).
    """
    positions, rows = torch.arange(length, dtype=torch.float64), []
    for frequency in frequencies:
        part = (positions * frequency % (2 * math.pi) * (bins / (2 * math.pi))).long().clamp(max=bins - 1)
        rows.append(torch.full((bins,), 2.0**-14, dtype=torch.float64).index_add_(0, part, torch.ones_like(positions)))
    return torch.stack(rows) / length


def disturbance(before: Tensor, after: Tensor) -> Tensor:
    """(R/2,): sum_j P_j log(P_j / Q_j) of the shares P before and Q after, (R/2, bins) each."""
    return (before * (before / after).log()).sum(-1)


def angle_dist(frequencies: Tensor, factor: float, *, original: int, bins: int = 360) -> Tensor:
    """Each is kept or divided, whichever disturbs the distribution of its angles less; in a tie, kept.

    Wu et al. 2024, "Extending Context Window of Large Language Models from a Distributional Perspective"
    (arXiv:2410.01490). Bins, direction of the divergence and the rule for a tie are those of its authors' code: with them
    Llama 2's disturbance falls by 72 % at twice its context and by 32 % at four times, as the paper says.
    """
    trained = angle_shares(frequencies, original, bins)
    kept, divided = (
        disturbance(trained, angle_shares(choice, round(original * factor), bins))
        for choice in (frequencies, frequencies / factor)
    )
    return torch.where(kept <= divided, frequencies, frequencies / factor)
