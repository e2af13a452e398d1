"""Attention mixers `(x, context) -> y`."""

from nn.attention.gqa import GQA, MHA, MQA

ATTENTION = {
    "mha": MHA,
    "mqa": MQA,
    "gqa": GQA,
}
