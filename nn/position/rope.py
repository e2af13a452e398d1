import math

import torch
from torch import Tensor

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
        if rotated % 2:
            raise ValueError(f"head_dim: rope turns pairs, but {rotated} of {head_dim} coordinates is odd")
        frequency = self.theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        if self.factor == 1:
            return frequency
        turns = self.original * frequency / (2 * math.pi)
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return frequency * (kept + (1 - kept) / self.factor)

    def rotate(self, x: Tensor, context: Context) -> Tensor:
        cos, sin = context.once((self, x.shape[-1], x.dtype), lambda: self._table(x, context.positions))  # (…, T, 1, R)
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if self.interleaved:
            partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        else:
            partner = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
        turned = torch.addcmul(turned * cos, partner, sin)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def _table(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For each coordinate the cosine of its angle, and the sine that its partner in the pair is multiplied by."""
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        angle = positions.to(exact)[..., None] * self.frequencies(x.shape[-1]).to(positions.device, exact)  # (…, T, R/2)
        cos, sin = (angle.cos(), angle.cos()), (-angle.sin(), angle.sin())
        pair = (lambda ab: torch.stack(ab, -1).flatten(-2)) if self.interleaved else (lambda ab: torch.cat(ab, -1))
        return pair(cos).unsqueeze(-2).to(x.dtype), pair(sin).unsqueeze(-2).to(x.dtype)
