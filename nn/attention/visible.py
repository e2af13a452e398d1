import torch
from torch import Tensor

from nn.context import Context


def visible(context: Context, queries: int, keys: int) -> Tensor:
    """Which keys each query sees, (B or 1, T, S) bool; the T queries are the last T of the S keys.

    For mixers that hold their scores as one matrix, as no fused kernel can; worked out once a call for all layers.
    """

    def make() -> Tensor:
        device = context.tokens.device
        i = torch.arange(keys - queries, keys, device=device)[:, None]
        j = torch.arange(keys, device=device)
        seen = (i >= j if context.causal else torch.ones_like(i >= j))[None]
        if context.documents is not None:
            runs = torch.nn.functional.pad((torch.diff(context.documents, dim=1) != 0).cumsum(1), (1, 0))
            seen = seen & (runs[:, keys - queries :, None] == runs[:, None, :])
        return seen

    return context.once(("visible", queries, keys), make)
