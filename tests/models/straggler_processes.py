"""What each of several processes does in tests/models/test_stragglers.py: runs of train.py, of which one process may be slow.

torchrun --nproc-per-node 2 -m tests.models.straggler_processes FOLDER none loader=dp=2 layer=fsdp=2 …
"""

import os
import sys
import time
from unittest.mock import patch

import train
from data import Loader
from models import stragglers
from nn.attention.gqa import GQA
from nn.ffn import MLP
from optim.parallel import processes

SLOW = 1  # the rank
TINY = ["--tokenizer", "byte", "--dim", "32", "--depth", "2", "--heads", "4", "--seq-len", "32", "--stem", "", "--ffn", "mlp",
        "--batch-size", "8", "--accumulate", "2", "--dtype", "float32", "--device", "cpu", "--eval-every", "0", "--steps", "8",
        "--sample", "1", "--norm", "rmsnorm", "--mixer", "gqa", "--tp-overlap"]  # fmt: skip


def slowed(function):
    def slow(*given):
        if int(os.environ["RANK"]) == SLOW:
            time.sleep(0.05)
        return function(*given)

    return slow


def main(folder: str, *ways: str) -> None:
    """Each way: what is slow, and the mesh."""
    stragglers.EVERY, stragglers.SLOW = 4, 3  # sleeping takes ten times as long; what else the machine does, up to 1.6 times
    joined = processes.join_processes()  # once: the runs follow each other in the same processes
    where = dict(none=None, loader=(Loader, "__next__"), layer=(MLP, "forward"), mixer=(GQA, "forward"))
    with patch.object(train, "join_processes", lambda: joined):
        for number, way in enumerate(ways):
            what, _, mesh = way.partition("=")
            flags = [*TINY, "--data", f"{folder}/text", "--mesh", mesh, "--out", f"{folder}/{number}"]
            if where[what]:
                changed = patch.object(*where[what], slowed(getattr(*where[what])))
            else:  # by the processor's clock: other programs on the machine do not disturb it
                changed = patch.object(stragglers.OwnTime.__init__, "__defaults__", (time.thread_time,))
            with changed:
                assert train.main(flags) == 0, way
    processes.leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
