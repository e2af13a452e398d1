import torch
from torch import Tensor, nn

from nn.context import Context


class IdentityMixer(nn.Module):
    """No mixing at all: y = x. A model of these reads each token alone; what a mixer gains, it gains over this.

    Yu et al. 2022, "MetaFormer Baselines for Vision" (arXiv:2210.13452), IdentityFormer. No parameters, no FLOPs.
    Shapes: x (B, T, dim) -> (B, T, dim). The decoding state is empty.
    """

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return x

    def init_state(self, batch: int, max_len: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Nothing":
        return Nothing()

    def state_bytes(self, batch: int, max_len: int, dtype: torch.dtype) -> int:
        return 0

    def mixing_flops(self, queries: int, keys: int) -> int:
        return 0


class Nothing:
    """The decoding state of a mixer that remembers nothing."""

    def bytes(self) -> int:
        return 0
