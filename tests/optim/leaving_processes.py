"""What each of two processes does in tests/optim/test_processes.py: the first leaves while a thread of gloo's waits for Python,
to tell it that nothing holds a tensor any more.

RANK=0 STORE=/tmp/store python -m tests.optim.leaving_processes
"""

import os
import sys
import time
from contextlib import suppress

import torch
import torch.distributed as dist

from optim.parallel.processes import leave_processes

if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{os.environ['STORE']}", rank=rank, world_size=2)
    group = dist.group.WORLD
    if rank == 0:
        sys.setswitchinterval(100.0)  # seconds for which this thread keeps others waiting
        dist.all_reduce(torch.zeros(4), async_op=True)
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
    else:
        with suppress(RuntimeError):  # on a busy machine the first may be gone by now
            dist.all_reduce(torch.zeros(4))
    leave_processes(3 + rank)
