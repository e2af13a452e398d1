"""One operation a file: the equation in NumPy, the Triton kernel, the PyTorch op, and a SPEC its tests are made from."""

from kernels import (
    adamw,
    attention,
    causal_conv1d,
    glu,
    layernorm,
    linear_attention,
    linear_cross_entropy,
    newton_schulz,
    rmsnorm,
    rope,
    selective_scan,
)

SPECS = {
    "attention": attention.SPEC,
    "rmsnorm": rmsnorm.SPEC,
    "linear_cross_entropy": linear_cross_entropy.SPEC,
    "causal_conv1d": causal_conv1d.SPEC,
    "selective_scan": selective_scan.SPEC,
    "linear_attention": linear_attention.SPEC,
    "layernorm": layernorm.SPEC,
    "adamw": adamw.SPEC,
    "newton_schulz": newton_schulz.SPEC,
    "glu": glu.SPEC,
    "activation": glu.ACTIVATE_SPEC,
    "rope": rope.SPEC,
}
