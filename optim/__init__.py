"""Optimizers and learning-rate schedules. An optimizer is one file: its equation, `reference_step`, and its class.

base.py        what optimizers share: checks, wide state, exact checkpoints
groups.py      which parameter goes to which optimizer
combined.py    several optimizers as one
state.py       optimizer state as tensors and JSON
offload.py     state and steps on the host
loss_scale.py  float16: the factor of the loss, one for all processes
"""

from .adamw import AdamW
from .combined import Combined
from .groups import by_parts, split_parameters
from .lamb import Lamb
from .muon import Muon
from .schedule import SCHEDULES
from .sparse_adamw import SparseAdamW
from .state import flatten_state, unflatten_state

OPTIMIZERS = {
    "adamw": AdamW,
    "sparse_adamw": SparseAdamW,
    "lamb": Lamb,
    "muon": Muon,
}

__all__ = ["OPTIMIZERS", "SCHEDULES", "AdamW", "Combined", "Lamb", "Muon", "SparseAdamW"]
__all__ += ["by_parts", "flatten_state", "split_parameters", "unflatten_state"]
