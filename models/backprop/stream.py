from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from models.backprop.carry import Carry, carry_of
from models.backprop.checkpoint import Checkpoint, run_again
from models.residual import Residual
from nn.checks import at_least
from nn.context import Context

# B batch, T time, C model dim, n tokens of a chunk


class Stream:
    """As `checkpoint`, but a sublayer is run again and differentiated one chunk of the sequence after the other.

    Luo et al. 2025, "StreamBP: Memory-Efficient Exact Backpropagation for Long Sequence Training of LLMs"
    (arXiv:2506.03077): the gradient of a matrix is a sum over tokens,

        dL/dW = sum_i (dZ_i / dW)^T dL/dZ_i          i = 1 … `chunks` chunks of the sequence,

    so what a sublayer makes of a chunk can go before the next chunk is run. Gradients are exact. What a chunk gets from
    earlier ones, and a gradient for each number of it, is all that is held for the whole sequence (carry.py):

    feed-forward layers   nothing
    mha, mqa, gqa         keys and values, which are made first; a chunk of queries is scored against those up to its end, or as
                          many of them as its window reaches (with a position encoding that is no bias)
    recurrences           the decoding state at the end of each chunk, which the forward pass keeps; chunks go from the last
                          to the first and hand the gradient of the state on. So do all mixers whose decoding state is a few
                          tensors of one size: mamba, mamba2, s4d, lstm, most of linear attention, …

    All else is run again whole, as by `checkpoint`: mixtures of experts and norms whose statistics are of a batch, encoders'
    mixers, other mixers, and a sublayer whose branch was replaced, whose layers are watched by hooks or whose parameters are
    spread by tensor parallelism. The logits of a language model come in slices anyway (kernels/linear_cross_entropy.py). On a
    CPU attention of a chunk also holds the scores of 128 queries and all keys a few times over, and so gains less.

    A sublayer is one autograd.Function that takes the parameters and returns their gradients, so that data parallelism
    reduces them once a layer; parameters sharded by FSDP2 are gathered once a layer, where whole sublayers are wrapped.
    """

    def __init__(self, *, chunks: int = 8):
        at_least(1, chunks=chunks)
        self.chunks = chunks

    @torch._disable_dynamo  # torch.compiler.disable, but imports the compiler only when it is called
    def __call__(self, sublayer: Residual, x: Tensor, context: Context) -> Tensor:
        carry = carry_of(sublayer, context)
        if carry is None or x.numel() == 0:
            return Checkpoint()(sublayer, x, context)
        sublayer.forward = lambda x, context: self.stream(sublayer, carry, x, context)  # whatever hooks there are around it
        try:
            return sublayer(x, context)
        finally:
            del sublayer.forward

    def stream(self, sublayer: Residual, carry: type[Carry], x: Tensor, context: Context) -> Tensor:
        """The sublayer, called as it is: with its parameters, where they are sharded, gathered."""
        if any(isinstance(parameter, DTensor) for parameter in sublayer.parameters()):
            return run_again(partial(type(sublayer).forward, sublayer), sublayer, x, context)
        size = -(-x.shape[1] // self.chunks)
        bounds = [(start, min(start + size, x.shape[1])) for start in range(0, x.shape[1], size)]
        learning = [parameter for parameter in sublayer.parameters() if parameter.requires_grad]
        return Streamed.apply(carry(sublayer, context, bounds), x, *learning)


class Streamed(torch.autograd.Function):
    """A sublayer of x (B, T, C) and of the parameters that learn; `carry` knows it and where chunks begin and end."""

    @staticmethod
    def forward(ctx, carry: Carry, x: Tensor, *learning: Tensor) -> Tensor:
        ctx.carry, ctx.learning, ctx.autocast, y = carry, learning, autocast_of(x), None
        with ctx.autocast():
            for i, (start, end) in enumerate(carry.bounds):
                part = carry.run(i, x[:, start:end])  # (B, n, C)
                y = part.new_empty(x.shape) if y is None else y
                y[:, start:end] = part
        carry.finish()
        ctx.save_for_backward(x, *carry.kept)
        carry.kept = []
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        (x, *kept), carry, learning = ctx.saved_tensors, ctx.carry, ctx.learning
        dx = torch.empty_like(x) if ctx.needs_input_grad[1] else None
        sums: list[Tensor | None] = [None] * len(learning)
        carry.kept = kept
        with ctx.autocast():
            carry.prepare(x)
        for i, (start, end) in reversed(list(enumerate(carry.bounds))):
            part = x[:, start:end].detach().requires_grad_(dx is not None)
            with torch.enable_grad(), ctx.autocast():
                y = carry.run(i, part)
            before = carry.inputs()
            gradient, *found = differentiate([(y, dy[:, start:end]), *carry.outputs()], [part, *before, *learning])
            if dx is not None:
                dx[:, start:end] = gradient
            carry.take(found[: len(before)])
            sums = [added(total, term) for total, term in zip(sums, found[len(before) :], strict=True)]
        carry.kept = []
        carry.finish()
        return None, dx, *(total if total is None else total.to(p.dtype) for total, p in zip(sums, learning, strict=True))


def differentiate(outputs: list[tuple[Tensor, Tensor | None]], inputs: list[Tensor]) -> list[Tensor | None]:
    """The gradients of inputs, None where there is none, given those of outputs."""
    ends = [(y, dy.to(y.dtype)) for y, dy in outputs if dy is not None and y.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    if not ends or not wanted:
        return [None] * len(inputs)
    ys, dys = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(ys, wanted, dys, allow_unused=True))
    return [next(found) if x.requires_grad else None for x in inputs]


def added(total: Tensor | None, term: Tensor | None) -> Tensor | None:
    """The sum over chunks, in float32 at least; None is nothing."""
    if term is None:
        return total
    return term.to(torch.promote_types(term.dtype, torch.float32), copy=True) if total is None else total.add_(term)


def autocast_of(x: Tensor) -> Callable[[], AbstractContextManager]:
    """Autocast as it is now, to be entered again.

    It makes no copies to last: one made of a weight without gradients would serve those who want gradients too.
    """
    if x.device.type == "meta":
        return nullcontext
    options = dict(dtype=torch.get_autocast_dtype(x.device.type), enabled=torch.is_autocast_enabled(x.device.type))
    return partial(torch.autocast, x.device.type, cache_enabled=False, **options)
