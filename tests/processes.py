"""Several processes on one machine, as torchrun starts them, each on one thread."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 400  # seconds, after which they hang


def printed_by(processes: int, module: str, *words: str) -> list[str]:
    """The lines that `processes` processes of a module print; an AssertionError with their complaints if one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", module]
    options = dict(cwd=ROOT, env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=LIMIT)
    done = subprocess.run([*command, *words], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
