"""The traffic that a plan predicts is that of real processes, byte for byte."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_what_is_planned_is_sent():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = dict(cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=200)
    done = subprocess.run([*command, "-m", "tests.models.plan_processes"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = [int(line.split()[-2]) for line in done.stdout.splitlines()]
    assert len(sizes) == 11 and min(sizes) > 0
