"""Several processes are as one: balance over the global batch, and experts that each process holds a part of."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_processes_equal_one():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = dict(cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=300)
    done = subprocess.run([*command, "-m", "tests.nn.moe_processes"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    *sent, refused = done.stdout.splitlines()
    assert refused == "refused: experts: 3 cannot be shared among 2 processes evenly"
    assert len(sent) == 3 and all(int(line.split()[-2]) > 0 for line in sent), sent
