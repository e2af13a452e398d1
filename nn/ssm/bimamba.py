from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nn.context import Context
from nn.ssm.common import SSMState
from nn.ssm.mamba import Mamba

# B batch, T time, C model dim


class BiMamba(nn.Module):
    """Two Mamba blocks of weights of their own, whose outputs are added: for encoders, the second reads from the end.

    Zhu et al. 2024, "Vision Mamba" (arXiv:2401.09417), section 3.2, and Schiff et al. 2024, "Caduceus" (arXiv:2403.03234),
    section 3.1; here nothing is shared between the directions, the projections neither. With shared weights a block could
    not tell a text from its mirror image. In a decoder (causal=True) both read forwards. Options are those of `mamba`.

    Shapes: x (B, T, C) -> (B, T, C). The decoding state is that of two `mamba`.
    """

    def __init__(self, dim: int, *, state: int = 16, expand: int = 2, conv: int = 4, dt_rank: int | None = None):
        super().__init__()
        self.ahead, self.back = (Mamba(dim, state=state, expand=expand, conv=conv, dt_rank=dt_rank) for _ in range(2))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        states = (None, None) if context.state is None else (context.state.ahead, context.state.back)
        ahead, back = (replace(context, causal=True, state=state) for state in states)
        if context.causal:
            return self.ahead(x, ahead) + self.back(x, back)
        if context.state is not None:
            raise ValueError("causal: an encoder sees all tokens at once; it has no decoding state")
        back.documents = None if context.documents is None else context.documents.flip(1)
        return self.ahead(x, ahead) + self.back(x.flip(1), back).flip(1)

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> "BothStates":
        return BothStates(*(m.init_state(batch, max_len, dtype=dtype, device=device) for m in (self.ahead, self.back)))

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return self.ahead.state_bytes(batch, max_len, dtype) + self.back.state_bytes(batch, max_len, dtype)

    def mixing_flops(self, queries: int, keys: int) -> int:
        return self.ahead.mixing_flops(queries, keys) + self.back.mixing_flops(queries, keys)


@dataclass
class BothStates:
    ahead: SSMState
    back: SSMState

    def bytes(self) -> int:
        return self.ahead.bytes() + self.back.bytes()
