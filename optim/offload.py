"""Where an optimizer's state lives and its step is computed: where the parameters are, or on the host.

Adam remembers 8 bytes of each parameter, which a device needs only once a step. On the host, a step of P numbers is

    down      the gradient goes to the host
    step      the state is there, and so is the arithmetic, in float32 (float64 for float64 parameters)
    up        what changes the parameter goes back to it

AdamW looks at each number by itself: its step is computed on a copy of the parameter that stays on the host, and the parameter
goes up, rounded. What has to look at the whole parameter (Muon's matrices, LAMB's norms) sends up its part of the step that
needs the state; the rest runs where the parameter is, and so do the messages among processes that hold parts of it. Either way
as many numbers move as the gradient has, twice.

Source: Ren et al. 2021, "ZeRO-Offload", arXiv:2101.06840, sections 3 and 4, without their delayed update, which changes
what is learned. Here a step gives the same numbers, bit for bit, as one that is computed by the same kernels elsewhere.
"""

import torch
from torch import Tensor

from kernels.shards import cut_like, local


def host_of(device: torch.device) -> torch.device:
    """Where the state of parameters of a device lives: the CPU. Parameters that have no numbers have a state of none."""
    return device if device.type == "meta" else torch.device("cpu")


def wait(device: torch.device) -> None:
    """Until what was sent from a device has arrived on the host."""
    if device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)


class Here:
    """Everything stays where the parameter is."""

    def device(self, param: Tensor) -> torch.device:
        """Where the state of a parameter is."""
        return param.device

    def state(self, value: Tensor) -> Tensor:
        """A tensor of the state, made where the parameter is, in its place."""
        return value

    def as_param(self, value: Tensor, param: Tensor) -> Tensor:
        """The inverse of `state`: where the parameter is, and cut among processes as it is."""
        return value

    def gradients(self, params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What this process has of the parameters' gradients, where the state is."""
        return [local(param.grad).to(dtype) for param in params]

    def copy(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        """What this process has of a parameter, to be changed where the state is: the parameter itself if it is wide."""
        return local(param).to(dtype)

    def replace(self, param: Tensor, copy: Tensor) -> None:
        """Give a parameter the numbers of its changed copy, which is the parameter itself if that is wide."""
        mine = local(param)
        if copy.dtype != mine.dtype:
            mine.copy_(copy)

    def up(self, x: Tensor, param: Tensor) -> Tensor:
        """What was computed where the state is, for the arithmetic where the parameter is."""
        return x

    def forget(self) -> None:
        """The parameters may have changed otherwise than by steps."""


class Host(Here):
    """State and step live on the host. `bytes_moved` counts what went down to it and up again.

    State is plain tensors, of what this process holds of a parameter. The copies of parameters are taken at the first step and
    stay: change a parameter by steps only, or `forget` them.
    """

    def __init__(self):
        self.copies: dict[Tensor, Tensor] = {}
        self.bytes_moved = dict(down=0, up=0)

    def device(self, param: Tensor) -> torch.device:
        return host_of(param.device)

    def state(self, value: Tensor) -> Tensor:
        value = local(value)
        return value.to(host_of(value.device))

    def as_param(self, value: Tensor, param: Tensor) -> Tensor:
        return cut_like(value.to(local(param).device), param)

    def gradients(self, params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        grads = [local(param.grad) for param in params]
        moved = [grad.to(host_of(grad.device), non_blocking=True) for grad in grads]  # from a GPU: into pinned memory
        self.bytes_moved["down"] += sum(grad.nbytes for grad in moved)
        for device in {grad.device for grad in grads}:
            wait(device)
        return [grad.to(dtype) for grad in moved]

    def copy(self, param: Tensor, dtype: torch.dtype) -> Tensor:
        if param not in self.copies:
            mine = local(param)
            self.copies[param] = mine.to(host_of(mine.device), dtype, non_blocking=True, copy=True)
            wait(mine.device)
        return self.copies[param]

    def replace(self, param: Tensor, copy: Tensor) -> None:
        mine = local(param)
        rounded = copy.to(mine.dtype)
        mine.copy_(rounded, non_blocking=True)
        if rounded is not copy:
            copy.copy_(rounded)  # the next step begins at what the parameter is
        self.bytes_moved["up"] += rounded.nbytes

    def up(self, x: Tensor, param: Tensor) -> Tensor:
        self.bytes_moved["up"] += x.nbytes
        return x.to(local(param).device)

    def forget(self) -> None:
        self.copies.clear()
