from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear, output_projection

# B batch, T time, C model dim, W cells


@dataclass
class LSTMState:
    """What a layer of cells remembers: h (B, W), its last outputs, and c (B, W), its cells, in float32 at least."""

    h: Tensor
    c: Tensor

    def bytes(self) -> int:
        return self.h.nbytes + self.c.nbytes


class LSTMCells(nn.Module):
    """A layer of long short-term memory: cells that are kept, written to and read as three gates say.

    Hochreiter and Schmidhuber 1997, "Long Short-Term Memory", with the forget gate of Gers et al. 2000:

        i, f, o = sigmoid(W x_t + U h_{t-1} + b);  g = tanh(W x_t + U h_{t-1} + b)      rows of W, U and b for each
        c_t = f c_{t-1} + i g
        h_t = o tanh(c_t)

    The rows stand in the order i, f, g, o. What x adds is one product for all times; what h adds has to wait for the step
    before, which is why a sequence takes T steps, on whatever machine.

    Shapes: x (B, T, C), state of B rows -> (B, T, W) and the state after the last time. `keep` (B, T): 0 where a row
    forgets all it knows before it reads x_t, 1 elsewhere.
    """

    def __init__(self, dim: int, width: int):
        super().__init__()
        at_least(1, width=width)
        self.width = width
        self.input, self.recur = Linear(dim, 4 * width, bias=True), Linear(width, 4 * width, bias=False)

    def forward(self, x: Tensor, state: LSTMState, keep: Tensor | None = None) -> tuple[Tensor, LSTMState]:
        made, outputs = self.input(x).unbind(1), []  # T of (B, 4 W)
        h, c = state.h.to(x.dtype), state.c
        for t, from_x in enumerate(made):
            if keep is not None:
                h, c = h * keep[:, t, None].to(h.dtype), c * keep[:, t, None].to(c.dtype)
            i, f, g, o = (from_x + self.recur(h)).to(c.dtype).chunk(4, -1)
            c = torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh())
            h = (o.sigmoid() * c.tanh()).to(from_x.dtype)
            outputs.append(h)
        return torch.stack(outputs, 1) if outputs else x.new_empty(*x.shape[:2], self.width), LSTMState(h, c)

    def init_state(self, batch: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> LSTMState:
        wide = torch.promote_types(dtype, torch.float32)
        sizes = dict(size=(batch, self.width), device=device)
        return LSTMState(torch.zeros(**sizes, dtype=dtype), torch.zeros(**sizes, dtype=wide))


class LSTM(nn.Module):
    """LSTM as a mixer: a layer of cells and a projection back to the residual stream, see `LSTMCells`.

    The gates see what the layer said before, so no scan can do several steps at once: the ancestor that linear recurrences
    are measured against. `width` cells, by default as many as the model has channels. The bias of the forget gates begins
    at 1, so that a fresh layer remembers (Jozefowicz et al. 2015).

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is 2 W numbers whatever the length. ValueError if asked to see
    what follows (causal=False).
    """

    def __init__(self, dim: int, *, width: int | None = None):
        super().__init__()
        at_least(1, width=width)
        self.cells = LSTMCells(dim, width or dim)
        self.out = output_projection(self.cells.width, dim)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        W = self.cells.width
        self.cells.input.bias.zero_()[W : 2 * W] = 1

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if not context.causal:
            raise ValueError("causal: an LSTM looks back only")
        state, documents = context.state, context.documents
        keep = None
        if documents is not None:
            keep = torch.diff(documents, dim=1, prepend=documents[:, :1]) == 0  # the first belongs to the state that comes in
        before = self.cells.init_state(len(x), dtype=x.dtype, device=x.device) if state is None else state
        y, after = self.cells(x, before, keep)
        if state is not None:
            state.h.copy_(after.h)
            state.c.copy_(after.c)
        return self.out(y)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> LSTMState:
        return self.cells.init_state(batch, dtype=dtype, device=device)

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return batch * self.cells.width * (dtype.itemsize + wide.itemsize)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of cells and outputs, beside those of the products with x and with the outputs before."""
        return 4 * queries * self.cells.width
