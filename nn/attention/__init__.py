"""Attention mixers `(x, context) -> y`."""

from nn.attention.bigbird import BigBird
from nn.attention.dca import DCA
from nn.attention.deberta import DeBERTa
from nn.attention.gqa import GQA, MHA, MQA
from nn.attention.longformer import Longformer
from nn.attention.mhe import MHE
from nn.attention.mla import MLA
from nn.attention.normalised import NormalisedAttention
from nn.attention.tpa import TPA

ATTENTION = {
    "mha": MHA,
    "mqa": MQA,
    "gqa": GQA,
    "mla": MLA,
    "tpa": TPA,
    "mhe": MHE,
    "normalised": NormalisedAttention,
    "dca": DCA,
    "deberta": DeBERTa,
    "longformer": Longformer,
    "bigbird": BigBird,
}
