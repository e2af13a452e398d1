from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from models.residual import Residual
from nn.context import Context

Contexts = tuple[AbstractContextManager, AbstractContextManager]
PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]  # what linear layers are made of


class Checkpoint:
    """Only the input of each sublayer is kept: the backward pass runs the sublayer again before it differentiates it.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost" (arXiv:1604.06174), by torch.utils.checkpoint: B T C
    numbers a sublayer stay, at the price of one more forward pass. Random numbers are drawn again as they were, autocast is
    as it was, and what a sublayer leaves behind besides its output is that of its first run, see `Again`.
    """

    @torch._disable_dynamo  # torch.compiler.disable, but imports the compiler only when it is called
    def __call__(self, sublayer: Residual, x: Tensor, context: Context) -> Tensor:
        return run_again(sublayer, sublayer, x, context)


class Selective:
    """The products of linear layers are kept beside the input of each sublayer, and all else is computed again.

    That is norms, activations, rotations, convolutions, and attention between the projections, or a scan: work that grows
    with the width, where products grow with its square. Korthikanti et al. 2022, "Reducing Activation Recomputation in Large
    Transformer Models" (arXiv:2205.05198), section 5, compute attention again and keep the rest; here the rest that costs
    nothing is computed again too. (At lengths where attention costs as much as the products, this is as dear as
    `checkpoint`.) Experts of a mixture are products too on a CPU; on a GPU one kernel, which is run again.
    """

    @torch._disable_dynamo  # torch.compiler.disable, but imports the compiler only when it is called
    def __call__(self, sublayer: Residual, x: Tensor, context: Context) -> Tensor:
        return run_again(sublayer, sublayer, x, context, partial(create_selective_checkpoint_contexts, PRODUCTS))


def nothing() -> Contexts:
    return nullcontext(), nullcontext()


def run_again(
    call: Callable[[Tensor, Context], Tensor],
    sublayer: Residual,
    x: Tensor,
    context: Context,
    contexts: Callable[[], Contexts] = nothing,
) -> Tensor:
    """What `call` (the sublayer, or its forward pass) gives; `contexts` are those of the first run and of the second."""
    first, second = contexts()
    again = Again(call, sublayer, context, second)
    y = checkpoint(again.run, x, use_reentrant=False, context_fn=lambda: (first, again))
    again.forget_what_stayed()
    return y


class Again:
    """The context of a second run: a sublayer finds all as it was before the first, and what it then leaves is taken away.

    That is: what modules hold in attributes (an auxiliary loss, the routing, counts of a step, also in objects with an
    `after_step` of their own), buffers that moved (the statistics of a norm), and what layers share in a call.
    """

    def __init__(
        self, call: Callable[[Tensor, Context], Tensor], sublayer: Residual, context: Context, within: AbstractContextManager
    ):
        self.call, self.context, self.within = call, context, within
        self.places = list(attributes(sublayer))
        self.before = [dict(place) for place in self.places]
        self.shared = dict(context.shared)
        modules = [(module._buffers, name) for module in sublayer.modules() for name in module._buffers]
        self.buffers = [(owner, name, owner[name], owner[name]._version, owner[name].clone()) for owner, name in modules]

    def run(self, x: Tensor) -> Tensor:
        return self.call(x, self.context)

    def forget_what_stayed(self) -> None:
        """After the first run: copies of buffers that it did not touch are needed no more."""
        self.buffers = [entry for entry in self.buffers if entry[2]._version != entry[3]]

    def __enter__(self) -> None:
        self.after = [dict(place) for place in self.places]
        put(self.places, self.before)
        for owner, name, _, _, copy in self.buffers:
            owner[name] = copy.clone()
        self.first, self.context = self.context, replace(self.context, state=None, shared=dict(self.shared))
        self.within.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.within.__exit__(*error)
        self.context = self.first
        for owner, name, buffer, _, _ in self.buffers:
            owner[name] = buffer
        put(self.places, self.after)


def attributes(sublayer: nn.Module) -> Iterator[dict]:
    """The attributes of its modules, and of what in them counts over a step."""
    for module in sublayer.modules():
        yield vars(module)
        yield from (vars(value) for value in vars(module).values() if hasattr(value, "after_step"))


def put(places: list[dict], values: list[dict]) -> None:
    for place, value in zip(places, values, strict=True):
        place.clear()
        place.update(value)
