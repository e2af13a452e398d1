"""A parameter cut among processes has one norm: LAMB steps as it does on the whole."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_parts_step_as_the_whole():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = dict(cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=120)
    done = subprocess.run([*command, "-m", "tests.optim.lamb_processes"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "equal\n"
