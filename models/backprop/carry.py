"""What the chunks of a sequence hand on to later ones, and how gradients go the other way: for models/backprop/stream.py."""

from dataclasses import fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from kernels.intervals import spans
from models.residual import Parallel, Residual
from nn.attention import GQA
from nn.context import Context
from nn.ffn import FFNS
from nn.linear_attention.atlas import Atlas
from nn.mixing.long_convolution import LongConvolution
from nn.norm import NORMS
from nn.position.none import NoPosition
from nn.ssm.s4d import S4D

WITHOUT_DOCUMENTS = (Atlas, LongConvolution, S4D)  # whose state is of one document: with several they are not cut
PARTS = ("forward", "projected", "attend")  # what is to be as GQA has it

# B batch, T time, n tokens of a chunk, K key/value heads, S keys that a chunk sees, D head dim


class Carry:
    """Nothing is handed on: each token by itself. Also the interface.

    Forward: `run` on all chunks in order, without gradients; then `finish`, and what is in `kept` stays. Backward:
    `prepare`; `run` on the chunks from the last to the first, after each of which `outputs` are differentiated too, by
    `inputs` too, whose gradients go to `take`; and `finish`. Chunk i stands at `bounds[i]`.
    """

    def __init__(self, sublayer: Residual, context: Context, bounds: list[tuple[int, int]]):
        self.sublayer, self.whole, self.bounds = sublayer, context, bounds
        self.kept: list[Tensor] = []

    def run(self, i: int, x: Tensor) -> Tensor:
        """(B, n, C) -> (B, n, C): the sublayer itself, without the hooks that a caller has around it."""
        return type(self.sublayer).forward(self.sublayer, x, self.context(i))

    def context(self, i: int) -> Context:
        return self.cut(*self.bounds[i])

    def cut(self, start: int, end: int, first: int = 0) -> Context:
        """That of the tokens start … end, which see keys from `first` on; what layers share for them they share here too."""
        whole = self.whole
        tokens, positions = whole.tokens[:, start:end], whole.positions[..., start:end]
        documents = None if whole.documents is None else whole.documents[:, start:end]
        domains = whole.domains if whole.domains is None or whole.domains.shape[1] == 1 else whole.domains[:, start:end]

        def share() -> dict:
            if documents is None:
                return {}
            seen = whole.documents[:, first:end]
            return {"document spans": spans(len(seen), end - start, end - first, documents=seen)}

        shared = whole.once(("chunk", first, start, end), share)
        return Context(tokens, positions, documents, domains, whole.causal, shared=shared)

    def prepare(self, x: Tensor) -> None:
        """Before the backward pass over the chunks of x (B, T, C)."""

    def inputs(self) -> list[Tensor]:
        return []

    def outputs(self) -> list[tuple[Tensor, Tensor | None]]:
        """What the chunk last run hands on, and the gradients of it."""
        return []

    def take(self, gradients: list[Tensor | None]) -> None:
        """The gradients of `inputs`."""

    def finish(self) -> None:
        """After a pass over all chunks: nothing is held but `kept`."""


class Stop(Exception):
    """Keys and values are made, and that was all."""


class Keys(Carry):
    """Keys and values of the whole sequence, which attention gets from its decoding state: this object.

    Backward they are made again, without gradients; then a chunk makes its own once more, and the gradient that these get is
    what all chunks that saw them have added up: no more than K, V and a gradient of each is held. With a window a chunk is
    given only what it reaches.
    """

    def __init__(self, *given):
        super().__init__(*given)
        (layer,) = mixers(self.sublayer)
        self.reach = None if layer.global_tokens else layer.window
        self.numbers: list[Tensor] = []  # K and V, (B, K, T, D)
        self.gradients: list[Tensor] = []
        self.only = False
        self.now = 0, 0, 0

    def context(self, i: int) -> Context:
        start, end = self.bounds[i]
        first = 0 if self.reach is None else max(0, start - self.reach + 1)
        self.now = first, start, end
        context = self.cut(start, end, first)
        context.state = self
        return context

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, n, D) each -> (B, K, S, D): what attention asks of a state."""
        first, start, end = self.now
        if self.gradients and torch.is_grad_enabled():
            ours = zip((k, v), self.numbers, self.gradients, strict=True)
            return tuple(Seen.apply(own, whole, gradients, self.now) for own, whole, gradients in ours)
        if not self.numbers:
            T = self.bounds[-1][1]
            self.numbers = [own.new_empty(*own.shape[:2], T, own.shape[-1]) for own in (k, v)]
        for whole, own in zip(self.numbers, (k, v), strict=True):
            whole[:, :, start:end] = own
        if self.only:
            raise Stop
        return tuple(whole[:, :, first:end] for whole in self.numbers)

    def prepare(self, x: Tensor) -> None:
        self.only = True
        for i, (start, end) in enumerate(self.bounds):
            try:
                self.run(i, x[:, start:end])
            except Stop:
                pass
        self.only = False
        wide = [torch.promote_types(whole.dtype, torch.float32) for whole in self.numbers]
        self.gradients = [torch.zeros_like(whole, dtype=dtype) for whole, dtype in zip(self.numbers, wide, strict=True)]

    def finish(self) -> None:
        self.numbers, self.gradients = [], []


class Seen(torch.autograd.Function):
    """Own keys (B, K, n, D) -> all that a chunk sees (B, K, S, D), of which the own are the last."""

    @staticmethod
    def forward(ctx, own: Tensor, whole: Tensor, gradients: Tensor, now: tuple[int, int, int]) -> Tensor:
        ctx.gradients, ctx.now = gradients, now
        return whole[:, :, now[0] : now[2]].detach()

    @staticmethod
    def backward(ctx, gradient: Tensor):
        first, start, end = ctx.now
        ctx.gradients[:, :, first:end] += gradient
        return ctx.gradients[:, :, start:end].to(gradient.dtype), None, None, None


class Slot(Tensor):
    """A tensor of a decoding state that remembers what is written to it, instead of being written to."""

    after: Tensor | None = None
    __torch_function__ = torch._C._disabled_torch_function_impl

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        self.after = source
        return self


class Borders(Carry):
    """The decoding state at the end of each chunk, whose tensors are kept. Where a document begins, a row's is a fresh one."""

    def __init__(self, *given):
        super().__init__(*given)
        self.before: list[Tensor] = []  # what the next chunk begins with, or the chunk last run began with
        self.after: list[Tensor] = []
        self.gradients: list[Tensor | None] = []  # of `after`

    def run(self, i: int, x: Tensor) -> Tensor:
        context = self.context(i)
        fresh = self.sublayer.layer.init_state(len(x), x.shape[1], dtype=x.dtype, device=x.device)
        names = [field.name for field in fields(fresh)]
        values = [getattr(fresh, name) for name in names]
        if torch.is_grad_enabled():
            many = len(names)
            self.before = [value.detach().requires_grad_() for value in self.kept[(i - 1) * many : i * many]] if i else []
        if i:
            values = self.handed(self.bounds[i][0], values)
        slots = [value.as_subclass(Slot) for value in values]
        context.state = replace(fresh, **dict(zip(names, slots, strict=True)))
        y = type(self.sublayer).forward(self.sublayer, x, context)
        self.after = [value if slot.after is None else slot.after for value, slot in zip(values, slots, strict=True)]
        if not torch.is_grad_enabled() and i + 1 < len(self.bounds):
            self.before = self.after
            self.kept += self.after
        return y

    def handed(self, start: int, fresh: list[Tensor]) -> list[Tensor]:
        """The state before token `start`: what was handed on, but a fresh one in rows where a document begins there."""
        documents = self.whole.documents
        if documents is None:
            return self.before
        begins = documents[:, start] != documents[:, start - 1]  # (B,)
        pairs = zip(fresh, self.before, strict=True)
        return [torch.where(begins.view(-1, *[1] * (b.ndim - 1)), f.to(b.dtype), b) for f, b in pairs]

    def prepare(self, x: Tensor) -> None:
        self.gradients = []

    def inputs(self) -> list[Tensor]:
        return self.before

    def outputs(self) -> list[tuple[Tensor, Tensor | None]]:
        return list(zip(self.after, self.gradients, strict=True)) if self.gradients else []

    def take(self, gradients: list[Tensor | None]) -> None:
        self.gradients = gradients

    def finish(self) -> None:
        self.before, self.after, self.gradients = [], [], []


def carry_of(sublayer: Residual, context: Context) -> type[Carry] | None:
    """What a sublayer that can be run chunk by chunk hands on; None for one that cannot."""
    inner = [module for module in sublayer.modules() if module is not sublayer]
    norms = [module for module in inner if isinstance(module, tuple(NORMS.values()))]
    if any(map(replaced, sublayer.modules())) or any(map(watched, inner)):
        return None
    if any(not getattr(norm, "per_token", True) or list(norm.buffers()) for norm in norms):
        return None
    if not (others := mixers(sublayer)):
        return Carry
    mixer = others[0]
    if len(others) > 1 or not hasattr(mixer, "init_state") or not context.causal:
        return None
    if attends_plainly(mixer):
        return Keys
    if context.documents is not None and isinstance(mixer, WITHOUT_DOCUMENTS):
        return None
    state = mixer.init_state(1, 1, dtype=torch.float32, device="meta")
    values = [getattr(state, field.name) for field in fields(state)] if is_dataclass(state) else [None]
    return Borders if all(isinstance(value, Tensor) and value.is_floating_point() for value in values) else None


def mixers(sublayer: Residual) -> list[nn.Module]:
    """What is not a feed-forward layer, in which each token is by itself."""
    layers = list(sublayer.layer.branches) if isinstance(sublayer.layer, Parallel) else [sublayer.layer]
    return [layer for layer in layers if not isinstance(layer, tuple(FFNS.values()))]


def attends_plainly(mixer: nn.Module) -> bool:
    """Whether it is GQA, or a name for settings of it, and scores need no bias, which is learned for all tokens together."""
    same = isinstance(mixer, GQA) and all(getattr(type(mixer), name) is getattr(GQA, name) for name in PARTS)
    return same and mixer.bias.__func__ is NoPosition.bias


def replaced(module: nn.Module) -> bool:
    """Whether a method of its class was replaced in this one: positions or heads are then shared among processes, say."""
    return any(callable(getattr(type(module), name, None)) for name in vars(module))


def watched(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))
