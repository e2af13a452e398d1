import torch
from torch import Tensor


def exactly(x: Tensor) -> Tensor:
    """x in at least float32: what statistics are worked out in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def affine(x: Tensor, gain: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x * gain + bias over the last axis, of which either may be missing, rounded to `dtype` once at the end."""
    x = x if gain is None else x * gain.to(x.dtype)
    x = x if bias is None else x + bias.to(x.dtype)
    return x.to(dtype)
