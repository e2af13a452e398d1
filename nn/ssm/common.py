"""What the state space mixers share: the decoding state, initial values, checks."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nn.context import Context

STEPS = (1e-3, 1e-1)  # initial step sizes of the discretisation lie between these


@dataclass
class SSMState:
    """The decoding state of a convolution of W taps and a state space behind it: of one size, whatever the length.

    inputs: (B, W - 1, channels), the last inputs of the convolution, oldest first, zeros before the first.
    h: the state of the recurrence, never in less than float32, because it is rounded anew at each step.
    """

    inputs: Tensor
    h: Tensor

    def bytes(self) -> int:
        return self.inputs.nbytes + self.h.nbytes

    def update(self, inputs: Tensor, h: Tensor) -> None:
        self.inputs.copy_(inputs)
        self.h.copy_(h)


class StateSpace(nn.Module):
    """A mixer whose decoding state is an SSMState of one size, whose two shapes its `state_shapes(batch)` gives."""

    state_shapes: Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]]

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> SSMState:
        inputs, h = self.state_shapes(batch)
        wide = torch.promote_types(dtype, torch.float32)
        return SSMState(torch.zeros(inputs, dtype=dtype, device=device), torch.zeros(h, dtype=wide, device=device))

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        """What `init_state` takes, without making it."""
        inputs, h = map(math.prod, self.state_shapes(batch))
        return inputs * dtype.itemsize + h * torch.promote_types(dtype, torch.float32).itemsize


def set_steps(bias: Tensor, generator: torch.Generator | None) -> None:
    """In place: the biases whose softplus is log-uniform between STEPS (Gu and Dao 2023, arXiv:2312.00752, section 3.6)."""
    step = bias.uniform_(*map(math.log, STEPS), generator=generator).exp_()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


def set_taps(taps: Tensor, bias: Tensor | None, generator: torch.Generator | None) -> None:
    """In place: uniform within 1 / sqrt(W), as the depthwise convolution of the authors' code begins."""
    bound = taps.shape[-1] ** -0.5
    for parameter in (taps, bias):
        if parameter is not None:
            parameter.uniform_(-bound, bound, generator=generator)


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least: the decay of a step is exp(dt A)."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def check_taps(conv: int) -> None:
    if not 2 <= conv <= 8:
        raise ValueError(f"conv: 2 to 8 taps, not {conv}")


def refuse_encoder(context: Context) -> None:
    if not context.causal:
        raise ValueError("causal: a state space looks back only; an encoder takes bimamba")


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Within it products are of the dtypes they are given; the meta device knows no autocast anyway."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
