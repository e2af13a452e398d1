import math

import torch
from torch import Tensor

from kernels.rope import angles, rope
from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition


class RoPE(NoPosition):
    """Rotary position embedding: turns each pair of coordinates of a query or key by (position * frequency).

    Su et al. 2021, "RoFormer" (arXiv:2104.09864), eq. 34: frequency_i = theta^(-2i/d). The pairs are (i, i + d/2), as in
    Llama, or neighbours (2i, 2i + 1) with `interleaved`, as in the paper and GPT-J. `fraction` < 1 turns only the first
    coordinates of a head. `factor` > 1 stretches a trained context of `original` positions as Llama 3.1 does: low
    frequencies (fewer than `low` turns in the original context) are divided by it, high ones (more than `high`) are
    kept, and those between are blended (Grattafiori et al. 2024, arXiv:2407.21783).
    """

    def __init__(
        self,
        *,
        theta: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        factor: float = 1.0,
        low: float = 1.0,
        high: float = 4.0,
        original: int = 8192,
    ):
        super().__init__()
        at_least(1, theta=theta, factor=factor, original=original)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: the share of a head that is turned lies in (0, 1], not {fraction}")
        if not low < high:
            raise ValueError(f"low: {low} turns is not less than high, {high}")
        self.theta, self.fraction, self.interleaved = theta, fraction, interleaved
        self.factor, self.low, self.high, self.original = factor, low, high, original

    def frequencies(self, head_dim: int) -> Tensor:
        """(rotated_dim / 2,) float64: radians a position."""
        rotated = int(head_dim * self.fraction)
        if rotated == 0:
            raise ValueError(f"fraction: {self.fraction} of {head_dim} coordinates is none")
        if rotated % 2:
            raise ValueError(f"head_dim: rope turns pairs, but {rotated} of {head_dim} coordinates is odd")
        frequency = self.theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        if self.factor == 1:
            return frequency
        turns = self.original * frequency / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)

    def rotate(self, x: Tensor, context: Context) -> Tensor:
        head_dim, exact = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
        key = (self, head_dim, exact)
        cos, sin = context.once(key, lambda: angles(context.positions, self.frequencies(head_dim), exact))  # (…, T, R/2)
        return rope(x, cos, sin, interleaved=self.interleaved)
