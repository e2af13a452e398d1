"""Normalisation layers `(x) -> x` over the last axis."""

from nn.norm.layernorm import LayerNorm
from nn.norm.rmsnorm import RMSNorm

NORMS = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
}
