"""One operation a file: the equation in NumPy, the Triton kernel, the PyTorch op, and a SPEC its tests are made from."""

from kernels import (
    adamw,
    attention,
    block_sparse_attention,
    causal_conv1d,
    cross_entropy,
    decode_attention,
    glu,
    layernorm,
    linear_attention,
    linear_cross_entropy,
    newton_schulz,
    rmsnorm,
    rope,
    selective_scan,
    ssd,
)

SPECS = {
    "attention": attention.SPEC,
    "decode_attention": decode_attention.SPEC,
    "block_sparse_attention": block_sparse_attention.SPEC,
    "rmsnorm": rmsnorm.SPEC,
    "linear_cross_entropy": linear_cross_entropy.SPEC,
    "causal_conv1d": causal_conv1d.SPEC,
    "selective_scan": selective_scan.SPEC,
    "ssd": ssd.SPEC,
    "linear_attention": linear_attention.SPEC,
    "layernorm": layernorm.SPEC,
    "adamw": adamw.SPEC,
    "newton_schulz": newton_schulz.SPEC,
    "glu": glu.SPEC,
    "activation": glu.ACTIVATE_SPEC,
    "rope": rope.SPEC,
    "cross_entropy": cross_entropy.SPEC,
}
