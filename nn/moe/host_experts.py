"""Experts in the host's memory: a pass moves to the device those that its tokens were sent to, and no other.

Ren et al. 2023, "PanGu-Sigma" (arXiv:2303.10845), "Expert Computation and Storage Separation": a device needs
room for the experts of one batch, however many there are. With n of E experts of S numbers asked by the tokens of a pass, b
bytes a number in which it computes,

    forward     n S b bytes up         the matrices of those experts, cast on the host first
    backward    n S b bytes down       their gradients; those of all others are zeros that never were on the device

Routers that send a batch to few experts are those that gain: a domain's own (hashed.py), not one that is balanced over a large
batch. `optim/sparse_adamw.py` then steps on the host, and only on experts that were asked.

    python train.py --ffn moe:experts=64:top_k=1:router=hash:host=true --optimizer sparse_adamw:lr=0.002
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.grouped_matmul import grouped_matmul
from nn.linear import cast_once
from nn.moe.experts import StackedLinear


class Visit(torch.autograd.Function):
    """Matrices of a stack (E, out, in) on the host -> (n, out, in) on a device, in a dtype; and their gradients home again."""

    @staticmethod
    def forward(ctx, stack: Tensor, asked: Tensor, device: torch.device, dtype: torch.dtype, moved: dict[str, int]) -> Tensor:
        ctx.asked, ctx.shape, ctx.dtype, ctx.moved = asked, stack.shape, stack.dtype, moved
        chosen = stack[asked].to(dtype)
        chosen = chosen.pin_memory() if device.type == "cuda" else chosen
        moved["up"] += chosen.nbytes
        return chosen.to(device, non_blocking=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.to(ctx.asked.device)
        ctx.moved["down"] += grad.nbytes
        whole = grad.new_zeros(ctx.shape, dtype=ctx.dtype).index_copy_(0, ctx.asked, grad.to(ctx.dtype))
        return whole, None, None, None, None


class HostLinear(StackedLinear):
    """A linear layer an expert, weight (E, out, in), which stays on the host whatever device the model moves to.

    `moved` counts bytes, `up` in forward passes and `down` in backward passes.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.moved = dict(up=0, down=0)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """What `.to()`, `.double()` and their like do, but for the device, unless there are no numbers to move."""

        def at_home(tensor: Tensor) -> Tensor:
            made = fn(tensor)
            return made if made.is_meta else made.cpu()

        return super()._apply(at_home, recurse)

    def forward(self, x: Tensor, ends: Tensor, **places) -> Tensor:
        """A group of no rows may be left away: where the others end stays as it was."""
        x = cast_once(x)
        if self.weight.is_meta:  # a pass that only counts
            return super().forward(x, ends, **places)
        asked = torch.diff(ends, prepend=ends.new_zeros(1)).nonzero()[:, 0]
        asked = asked if len(asked) else asked.new_zeros(1)
        weight = Visit.apply(self.learned(), asked.cpu(), x.device, x.dtype, self.moved)
        return grouped_matmul(x, weight, ends[asked], **places)


def moved_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that the experts of a model have moved so far, `up` to the device and `down` from it."""
    layers = [module for module in model.modules() if isinstance(module, HostLinear)]
    return {way: sum(layer.moved[way] for layer in layers) for way in ("up", "down")}
