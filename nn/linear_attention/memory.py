import torch
from torch import Tensor

from kernels.linear_attention import linear_attention
from nn.checks import at_least
from nn.context import Context
from nn.ssm.common import StateSpace

# B batch, T time, H heads, D key dim, V value dim, W taps of a short convolution


class MatrixMemory(StateSpace):
    """What the mixers of this family share: a D x V matrix a head, which is all that decoding remembers but a few inputs.

    S_t = decay_t S_{t-1} + k_t v_t^T is what most of them write, and o_t = S_t^T q_t what all of them read. A member
    makes queries, keys, values and decays of its input and calls `recall`. The matrix is never in less than float32,
    because it is rounded anew at each step; `passes` says how often each of its numbers is multiplied a token.
    """

    passes = 3  # decayed, written, read

    def __init__(self, heads: int, key_dim: int, value_dim: int, *, taps: int = 0, channels: int = 0):
        super().__init__()
        at_least(1, heads=heads, key_dim=key_dim, value_dim=value_dim)
        self.heads, self.key_dim, self.value_dim = heads, key_dim, value_dim
        self.recent = (taps - 1, channels) if taps else (0, 0)

    def recall(
        self, q: Tensor, k: Tensor, v: Tensor, context: Context, g: Tensor | None = None, *, scale: float = 1.0
    ) -> Tensor:
        """o (B, T, H, V) of q and k (B, T, H, D), v (B, T, H, V) and log decays g; the state goes on to the next call."""
        looks_back_only(context)
        state = context.state
        g = None if g is None else g.to(v.device, torch.promote_types(v.dtype, torch.float32))
        options = dict(initial_state=None if state is None else state.h, documents=context.documents)
        o, h = linear_attention(q, k.to(q.dtype), v, g, scale=scale, **options)
        if state is not None:
            state.h.copy_(h)
        return o

    def heads_of(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, T, H n) as (B, T, H, n)."""
        return tuple(x.unflatten(-1, (self.heads, -1)) for x in tensors)

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (batch, *self.recent), (batch, self.heads, self.key_dim, self.value_dim)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of recurrence and convolution, beside those of the projections; the form in chunks takes more."""
        taps, channels = self.recent
        matrix = self.passes * self.heads * self.key_dim * self.value_dim
        return 2 * queries * (matrix + (taps + 1) * channels)


def looks_back_only(context: Context) -> None:
    if not context.causal:
        raise ValueError("causal: this recurrence looks back only; of its family an encoder takes linear")
