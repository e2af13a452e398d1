"""Normalisation layers `(x) -> x` over the last axis."""

from nn.norm.crmsnorm import CRMSNorm
from nn.norm.fake_norm import FakeNorm
from nn.norm.layernorm import LayerNorm
from nn.norm.none import NoNorm
from nn.norm.powernorm import PowerNorm
from nn.norm.rmsnorm import RMSNorm
from nn.norm.simple_rmsnorm import SimpleRMSNorm
from nn.norm.unified_norm import UnifiedNorm

NORMS = {
    "none": NoNorm,
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "srmsnorm": SimpleRMSNorm,
    "crmsnorm": CRMSNorm,
    "powernorm": PowerNorm,
    "unifiednorm": UnifiedNorm,
    "fakenorm": FakeNorm,
}
