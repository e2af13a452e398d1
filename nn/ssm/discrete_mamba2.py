import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.causal_conv1d import causal_conv1d
from kernels.glu import glu
from kernels.linear_attention import linear_attention
from nn.attention.visible import visible
from nn.checks import at_least, width_of_heads
from nn.context import Context
from nn.linear import Linear, output_projection, project
from nn.ssm.common import StateSpace, check_taps, refuse_encoder, set_steps

# B batch, T time, H heads, K heads of B and X, D numbers of a head (the state's too), W taps

ONE = 1.278464542761  # silu(ONE) = 1


class DiscreteMamba2(StateSpace):
    """Mamba-2 in the shape of attention: decays of its own, no step size; what a Transformer is distilled into.

    Bick et al. 2024, "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models" (arXiv:2408.10189),
    and Bick et al. 2025, "Llamba" (arXiv:2502.14458); what the papers leave open is as in the authors' code:

        C, B, X = conv(W_query x), conv(W_key x), conv(W_value x)     nothing between convolution and recurrence
        a_t = exp(-softplus(W_decay x_t + b))                         a number a head, of the input itself
        S_t = a_t S_{t-1} + B_t X_t^T                                 (D, D) a head
        y_t = W_out ((S_t^T C_t / sqrt(D) + d X_t) silu(W_z x_t + b_z))

    Queries, keys, values and output are layers of the names and shapes of attention's, whose weights therefore fit. As there,
    H/K heads in order share a B and an X where kv_heads = K is less than H; the papers' own students have K = H.

    The convolution begins as the identity, the gate as the factor 1 and d as 1, as in their code. Choices of ours: b, with
    which -log a_t begins between 0.001 and 0.1 (they have none); and the factor 1 / sqrt(D), with which the products of
    copied queries and keys begin as the scores they were.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is (W - 1) (H + 2 K) D + H D^2 numbers whatever the length.
    ValueError if asked to see what follows (causal=False).
    """

    elementwise = ("taps",)
    together = ("query", "key", "value", "decay", "z")

    def __init__(
        self,
        dim: int,
        *,
        heads: int = 8,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        conv: int = 4,
        bias: bool = False,
        out_bias: bool | None = None,
    ):
        super().__init__()
        at_least(1, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
        check_taps(conv)
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads: {heads} heads cannot be shared among {kv_heads} evenly")
        self.heads, self.kv_heads, self.head_dim, self.conv = heads, kv_heads, width_of_heads(dim, heads, head_dim), conv
        self.inner, self.shared = heads * self.head_dim, kv_heads * self.head_dim
        self.scale = self.head_dim**-0.5
        self.query = Linear(dim, self.inner, bias=bias)
        self.key, self.value = (Linear(dim, self.shared, bias=bias) for _ in range(2))
        self.decay, self.z = Linear(dim, heads), Linear(dim, self.inner)
        channels = self.inner + 2 * self.shared
        self.taps, self.taps_bias = nn.Parameter(torch.empty(channels, conv)), nn.Parameter(torch.empty(channels))
        self.D = nn.Parameter(torch.empty(heads))
        self.out = output_projection(self.inner, dim, bias=bias if out_bias is None else out_bias)
        self.own_init()

    @torch.no_grad()
    def own_init(self, generator: torch.Generator | None = None) -> None:
        """The initial values that belong to the equation, whatever the initialisation of the other weights."""
        self.taps.zero_()[:, -1] = 1
        self.taps_bias.zero_()
        set_steps(self.decay.bias, generator)
        self.z.weight.zero_()
        self.z.bias.fill_(ONE)
        self.D.fill_(1)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        C, B, X, g, z = self.projected(x, context)
        before = None if context.state is None else context.state.h
        options = dict(scale=self.scale, initial_state=before, documents=context.documents)
        y, h = linear_attention(C, B, X, g, **options)
        if context.state is not None:
            context.state.h.copy_(h)
        y = torch.addcmul(y, X, self.D.to(X.dtype).unsqueeze(-1))
        return self.out(glu(z, y.flatten(2), activation="silu"))

    def projected(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """C, B and X (B, T, H, D), log a (B, T, H) in float32 at least, and what the gate is made of (B, T, H D)."""
        refuse_encoder(context)
        state, layers = context.state, (getattr(self, name) for name in self.together)
        query, key, value, decay, z = project(x, *layers)
        u = torch.cat([query, key, value], -1)  # (B, T, (H + 2 K) D)
        before = None if state is None else state.inputs.to(u.dtype)
        u, last = causal_conv1d(u, self.taps, self.taps_bias, initial_state=before, documents=context.documents)
        if state is not None:
            state.inputs.copy_(last)
        C, B, X = (m.unflatten(-1, (-1, self.head_dim)) for m in u.split([self.inner, self.shared, self.shared], -1))
        B, X = (m.repeat_interleave(self.heads // self.kv_heads, 2) for m in (B, X))  # (B, T, K, D) -> (B, T, H, D)
        return C, B, X, -F.softplus(decay.to(torch.promote_types(decay.dtype, torch.float32))), z

    def matrix(self, x: Tensor, context: Context) -> Tensor:
        """M (B, H, T, T), M X being what the gate multiplies: M_ts = C_t . (a_{s+1} … a_t) B_s / sqrt(D), where s = t plus d.

        For texts without a decoding state, and short ones: it is held whole. In float32 at least.
        """
        C, B, X, g, _ = self.projected(x, context)
        c = g.cumsum(1).transpose(1, 2)  # (B, H, T)
        seen = visible(context, x.shape[1], x.shape[1])[:, None]  # (B or 1, 1, T, T)
        since = (c[..., :, None] - c[..., None, :]).masked_fill(~seen, -torch.inf).exp()  # (B, H, T, T)
        scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)  # (B, H, T, T)
        return self.scale * scores * since + torch.diag_embed(self.D[:, None].to(since.dtype).expand(-1, x.shape[1]))

    def state_shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        taken = self.inner + 2 * self.shared
        return (batch, self.conv - 1, taken), (batch, self.heads, self.head_dim, self.head_dim)

    def mixing_flops(self, queries: int, keys: int) -> int:
        """FLOPs of convolution and recurrence, beside those of the projections; its form as products takes more."""
        return 2 * queries * ((self.inner + 2 * self.shared) * self.conv + self.inner * (3 * self.head_dim + 1))
