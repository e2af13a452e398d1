"""Several optimizers as one: the matrices' Muon and everything else's AdamW step, rest and are saved together."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from .base import Optimizer, require
from .offload import Host


class Combined:
    """Holds optimizers with no parameter in common and acts as one, in their order. ValueError for a shared parameter.

    `param_groups` are those of all, live: setting `group["lr"]` counts. Each has a `base_lr`, its learning rate at
    construction, for schedules: `group["lr"] = group["base_lr"] * multiplier`. Works with `torch.amp.GradScaler` too.
    """

    def __init__(self, optimizers: Iterable[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        params = [id(param) for group in self.param_groups for param in group["params"]]
        require(len(params) == len(set(params)), "optimizers", self.optimizers, "without a parameter in common")
        for group in self.param_groups:
            group.setdefault("base_lr", group["lr"])

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of each; `closure`, if given, is evaluated once, before the first, and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def offload(self) -> dict[str, int]:
        """From now on state and steps live on the host (offload.py); the count of bytes that move, `down` and `up`, live.

        To be called before the first step. ValueError where an optimizer is not one of ours.
        """
        for optimizer in self.optimizers:
            require(isinstance(optimizer, Optimizer), "offload", type(optimizer).__name__, "asked of optimizers of ours")
            require(not optimizer.state, "offload", "after a step", "asked for before the first step")
        place = Host()
        for optimizer in self.optimizers:
            optimizer.place = place
        return place.bytes_moved

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict) -> None:
        """Inverse of `state_dict`. ValueError where it is not that of as many optimizers, or as each of them says."""
        saved = state_dict.get("optimizers", [])
        require(len(saved) == len(self.optimizers), "state_dict", len(saved), f"of {len(self.optimizers)} optimizers")
        for optimizer, state in zip(self.optimizers, saved, strict=True):
            optimizer.load_state_dict(state)
