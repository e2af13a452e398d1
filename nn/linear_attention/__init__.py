"""Linear attention mixers: a matrix a head remembers the sequence; members differ in what is forgotten, written and read."""

from nn.linear_attention.atlas import Atlas
from nn.linear_attention.cosformer2 import CosFormer2
from nn.linear_attention.delta import DeltaNet, GatedDeltaNet
from nn.linear_attention.gla import GLA
from nn.linear_attention.hgrn2 import HGRN2
from nn.linear_attention.lightning import LightningAttention
from nn.linear_attention.linear import KernelAttention
from nn.linear_attention.lolcats import LolCats
from nn.linear_attention.retention import Retention

LINEAR_ATTENTION = {
    "linear": KernelAttention,
    "retention": Retention,
    "lightning": LightningAttention,
    "cosformer2": CosFormer2,
    "gla": GLA,
    "hgrn2": HGRN2,
    "delta": DeltaNet,
    "gated_delta": GatedDeltaNet,
    "atlas": Atlas,
    "lolcats": LolCats,
}
