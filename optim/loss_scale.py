"""Float16: the loss is multiplied so that small gradients do not vanish, and a step in which one overflows is left out.

Micikevicius et al. 2017, "Mixed Precision Training" (arXiv:1710.03740), sections 3.2 and 4.3.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.shards import local


class LossScale:
    """The factor of the loss, the same on all processes, for optimizers whose gradients may be cut among them in any way.

    Of a gradient that overflows, a process may hold nothing: it has other layers, heads or shards. So before a step all ask
    each other, and all leave it out and halve the factor if one of them has found an infinity or NaN; after `interval` steps
    without one it doubles. Used as `torch.amp.GradScaler` is, whose saved state it has; if not `enabled`, nothing is done.
    """

    def __init__(self, device: torch.device | str = "cpu", *, enabled: bool = True, interval: int = 2000):
        self.device, self.enabled, self.factor, self.interval = device, enabled, 2.0**16, interval
        self.good_steps, self.overflow = 0, None  # None: gradients are still multiplied

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor if self.enabled else loss

    @torch.no_grad()
    def unscale_(self, optimizer) -> None:
        """Divide gradients, once before a step, by the factor, for who looks at them."""
        if not self.enabled:
            return
        grads = [local(p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        found = torch.zeros((), device=self.device)
        if grads:
            torch._foreach_mul_(grads, 1 / self.factor)
            largest = torch.stack([norm.float() for norm in torch._foreach_norm(grads, math.inf)])
            found = (~largest.isfinite().all()).float()
        if dist.is_initialized():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        self.overflow = bool(found)

    def step(self, optimizer) -> None:
        """A step of the optimizer, unless a gradient overflowed on any process."""
        if self.enabled and self.overflow is None:
            self.unscale_(optimizer)
        if not self.overflow:
            optimizer.step()

    def update(self) -> None:
        """The factor of the next step."""
        if not self.enabled:
            return
        self.good_steps = 0 if self.overflow else self.good_steps + 1
        if self.overflow:
            self.factor /= 2
        elif self.good_steps == self.interval:
            self.factor, self.good_steps = 2 * self.factor, 0
        self.overflow = None

    def state_dict(self) -> dict:
        if not self.enabled:
            return {}
        fixed = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=self.interval)
        return dict(scale=self.factor, **fixed, _growth_tracker=self.good_steps)

    def load_state_dict(self, state: dict) -> None:
        """A run that goes on in another dtype begins anew."""
        if self.enabled and state:
            self.factor, self.interval, self.good_steps = (state[k] for k in ("scale", "growth_interval", "_growth_tracker"))
