from typing import Literal

import torch
from torch import Tensor

from kernels.rope import angles, rope
from nn.checks import at_least
from nn.context import Context
from nn.position.none import NoPosition
from nn.position.rope_scaling import angle_dist, linear, llama3, ntk, yarn, yarn_gain


class RoPE(NoPosition):
    """Rotary position embedding: turns each pair of coordinates of a query or key by (position * frequency).

    Su et al. 2021, "RoFormer" (arXiv:2104.09864), eq. 34: frequency_i = theta^(-2i/d). The pairs are (i, i + d/2), as in
    Llama, or neighbours (2i, 2i + 1) with `interleaved`, as in the paper and GPT-J. `fraction` < 1 turns only the first
    coordinates of a head. `factor` > 1 stretches a trained context of `original` positions, in the way of `scaling`:

    llama3       frequencies of fewer than `low` turns in the original context are divided by it, of more than `high` (4)
                 kept, and those between blended
    yarn         the same in even steps, `high` being 32; queries and keys also grow by 0.1 ln(factor) + 1
    linear       all are divided
    ntk          the highest is kept, the lowest divided, and theta grows as that needs
    angle_dist   each is kept or divided, whichever disturbs the distribution of its angles less

    Formulas and sources: nn/position/rope_scaling.py. The attribute `gain` is what turning multiplies lengths by.
    """

    def __init__(
        self,
        *,
        theta: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        scaling: Literal["llama3", "yarn", "linear", "ntk", "angle_dist"] = "llama3",
        factor: float = 1.0,
        low: float = 1.0,
        high: float | None = None,
        original: int = 8192,
    ):
        super().__init__()
        at_least(1, theta=theta, factor=factor, original=original)
        high = (32.0 if scaling == "yarn" else 4.0) if high is None else high
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: the share of a head that is turned lies in (0, 1], not {fraction}")
        if not 0 < low < high:
            raise ValueError(f"low: {low} turns are not more than 0 and less than high, {high}")
        if scaling == "yarn" and theta == 1:
            raise ValueError("theta: yarn needs frequencies that differ, so more than 1")
        self.theta, self.fraction, self.interleaved = theta, fraction, interleaved
        self.scaling, self.factor, self.low, self.high, self.original = scaling, factor, low, high, original
        self.gain = yarn_gain(factor) if scaling == "yarn" else 1.0
        self.others: dict[float, RoPE] = {}  # those of layers with a base of their own, by it
        self.worked_out: dict[int, Tensor] = {}  # frequencies of angle_dist, which counts angles, by their number

    def frequencies(self, head_dim: int) -> Tensor:
        """(rotated_dim / 2,) float64: radians a position."""
        rotated = int(head_dim * self.fraction)
        if rotated == 0:
            raise ValueError(f"fraction: {self.fraction} of {head_dim} coordinates is none")
        if rotated % 2:
            raise ValueError(f"head_dim: rope turns pairs, but {rotated} of {head_dim} coordinates is odd")
        plain = self.theta ** (-torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
        return plain if self.factor == 1 else self.stretched(plain)

    def stretched(self, plain: Tensor) -> Tensor:
        """Frequencies for `factor` times the original context, from those for it."""
        if self.scaling == "linear":
            return linear(plain, self.factor)
        if self.scaling == "ntk":
            return ntk(plain, self.factor)
        if self.scaling == "yarn":
            options = dict(theta=self.theta, original=self.original, beta_slow=self.low, beta_fast=self.high)
            return yarn(plain, self.factor, **options)
        if self.scaling == "angle_dist":
            if len(plain) not in self.worked_out:
                self.worked_out[len(plain)] = angle_dist(plain, self.factor, original=self.original)
            return self.worked_out[len(plain)]
        return llama3(plain, self.factor, original=self.original, low=self.low, high=self.high)

    def with_base(self, theta: float) -> "RoPE":
        """The same turning from another base and never stretched: for layers that keep their distances in a longer context."""
        if theta not in self.others:
            self.others[theta] = RoPE(theta=theta, fraction=self.fraction, interleaved=self.interleaved)
        return self.others[theta]

    def rotate(self, x: Tensor, context: Context) -> Tensor:
        head_dim, exact = x.shape[-1], torch.promote_types(x.dtype, torch.float32)

        def tables() -> tuple[Tensor, ...]:  # cos and sin, (…, T, R/2)
            pair = angles(context.positions, self.frequencies(head_dim), exact)
            return pair if self.gain == 1 else tuple(table * self.gain for table in pair)

        cos, sin = context.once((self, head_dim, exact), tables)
        return rope(x, cos, sin, interleaved=self.interleaved)
