"""State space mixers: a sequence is read into a state of fixed size. The causal part of them is a scan or a convolution."""

from nn.ssm.bimamba import BiMamba
from nn.ssm.discrete_mamba2 import DiscreteMamba2
from nn.ssm.mamba import Mamba
from nn.ssm.mamba2 import Mamba2
from nn.ssm.s4d import S4D

SSM = {
    "s4d": S4D,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "discrete_mamba2": DiscreteMamba2,
    "bimamba": BiMamba,
}
