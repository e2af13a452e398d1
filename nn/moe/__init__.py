"""Mixtures of experts: routers, what keeps them balanced, expert layers.

routing.py       what a router decides
losses.py        balance and z-loss
capacity.py      a bound on what an expert takes, and what becomes of the rest
compressed.py    fewer experts a token
experts.py       the experts as stacks of matrices
host_experts.py  stacks on the host, of which a device sees what a batch asks for
"""

from nn.moe.moa import MoA
from nn.moe.moe import ROUTERS, MoE

MOE = {
    "moe": MoE,
}
MOE_MIXERS = {
    "moa": MoA,
}

__all__ = ["MOE", "MOE_MIXERS", "ROUTERS", "MoA", "MoE"]
