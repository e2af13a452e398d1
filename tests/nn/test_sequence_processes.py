"""Four processes, and two by two, that share the positions of rows are as one: losses, gradients, bytes, mistakes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_processes_equal_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    options = dict(cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
    done = subprocess.run([*command, "-m", "tests.nn.sequence_processes"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "heads: 1 cannot be shared among 4 processes evenly",
        "heads: 2 cannot be shared among 4 processes evenly",
        "ring: a learned bias stands beside scores that are held whole; ulysses takes it, a ring does not",
        "ring: 4 processes do not make a ring of 3 places evenly",
        "seq_len: 49 positions cannot be shared among 4 processes in 4 parts evenly",
        "state: processes that share the positions of a row read whole rows; decode with one process",
    ]
