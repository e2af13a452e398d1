"""What a process sends, seen where PyTorch hands it to the network: whoever asks for it, DDP and FSDP too."""

from collections import Counter

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """Within it, bytes by collective, by the formulas of rings (models/plan.py), of tensors of `dtype` only.

    ValueError for a collective that has no formula.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.sent = dtype, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.count(func.name().removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def count(self, name: str, args: tuple) -> None:
        tensors = [x for arg in args for x in (arg if isinstance(arg, list) else [arg]) if isinstance(x, torch.Tensor)]
        if not tensors or tensors[0].dtype != self.dtype or name == "recv_":
            return
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        n, first, last = group.size(), tensors[0].nbytes, tensors[-1].nbytes
        if name == "allreduce_":
            name, size = "all-reduce", 2 * first * (n - 1) / n
        elif name == "_allgather_base_":  # the result, and what a rank gives
            name, size = "all-gather", first - last
        elif name == "_reduce_scatter_base_":
            name, size = "reduce-scatter", last - first
        elif name == "alltoall_base_":
            rows = args[4] or [len(tensors[-1]) // n] * n
            name, size = "all-to-all", (sum(rows) - rows[group.rank()]) * (last // len(tensors[-1]))
        elif name == "send":
            size = first
        else:
            raise ValueError(f"{name}: what it sends is not known")
        if n > 1:
            self.sent[name] += size
