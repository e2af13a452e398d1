"""Learning-rate schedules: functions from the share of the run that is done to a multiplier of the learning rate.

Progress, not steps: the same schedule serves a run of 1,000 steps and a run of 4 minutes. Pass the middle of the step
about to be taken, `(step + 0.5) / steps`, or by the clock `(elapsed + half a step) / budget`, at most 1: the first step
then has a positive multiplier, and no step is spent at a floor of zero. Every schedule rises linearly from 0 to 1 over
the first `warmup` of the run, is continuous, never rises again, and is exactly `floor` at progress 1. A ValueError
names the argument that is out of range.
"""

import math

from .base import require


def _warm(progress: float, warmup: float, floor: float) -> float:
    """Check what all schedules share; return the warm-up's multiplier, 1 once it is over."""
    require(0 <= progress <= 1, "progress", progress, "in [0, 1]")
    require(0 <= warmup < 1, "warmup", warmup, "in [0, 1)")
    require(0 <= floor <= 1, "floor", floor, "in [0, 1]")
    return progress / warmup if progress < warmup else 1.0


def _mix(floor: float, share: float) -> float:
    """`floor` at share 0, exactly 1 at share 1, linear between."""
    return share + floor * (1 - share)


def cosine(progress: float, *, warmup: float = 0.02, floor: float = 0.1) -> float:
    """Half a cosine wave from 1 to `floor` (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one cycle)."""
    warm = _warm(progress, warmup, floor)
    if progress < warmup:
        return warm
    done = (progress - warmup) / (1 - warmup)
    return _mix(floor, (1 + math.cos(math.pi * done)) / 2)


def linear(progress: float, *, warmup: float = 0.02, floor: float = 0.0) -> float:
    """A straight line from 1 to `floor`; best to zero for language models (Bergsma et al. 2025, arXiv:2502.15938)."""
    warm = _warm(progress, warmup, floor)
    if progress < warmup:
        return warm
    return _mix(floor, (1 - progress) / (1 - warmup))


def wsd(progress: float, *, warmup: float = 0.02, decay: float = 0.2, shape: str = "linear", floor: float = 0.0) -> float:
    """Warm-up, stable, decay: 1 until the last `decay` of the run, then down to `floor` (Hu et al. 2024, MiniCPM,
    arXiv:2404.06395, section 4). With t going from 0 to 1 over the decay, the shape `linear` is 1 - t and `1-sqrt` is
    1 - √t, the better one in Hägele et al. 2024, arXiv:2405.18392."""
    warm = _warm(progress, warmup, floor)
    require(0 < decay <= 1 - warmup, "decay", decay, f"above 0 and at most 1 - warmup = {1 - warmup:g}")
    require(shape in ("linear", "1-sqrt"), "shape", shape, "linear or 1-sqrt")
    if progress < warmup:
        return warm
    done = max(0.0, 1 - (1 - progress) / decay)
    return _mix(floor, 1 - (done if shape == "linear" else math.sqrt(done)))


def rsqrt(progress: float, *, warmup: float = 0.02, timescale: float = 0.1, cooldown: float = 0.2, floor: float = 0.0) -> float:
    """√(τ / (τ + time since warm-up)), τ = `timescale` as a share of the run, times a straight line to zero over the
    last `cooldown` of it (Zhai et al. 2022, arXiv:2106.04560). With timescale = warmup the first factor is
    that of Vaswani et al. 2017, arXiv:1706.03762, equation 3, scaled to a peak of 1."""
    warm = _warm(progress, warmup, floor)
    require(0 < timescale < math.inf, "timescale", timescale, "a finite number above 0")
    require(0 < cooldown <= 1 - warmup, "cooldown", cooldown, f"above 0 and at most 1 - warmup = {1 - warmup:g}")
    if progress < warmup:
        return warm
    return _mix(floor, math.sqrt(timescale / (timescale + (progress - warmup))) * min(1.0, (1 - progress) / cooldown))


SCHEDULES = {"cosine": cosine, "linear": linear, "wsd": wsd, "rsqrt": rsqrt}
