"""Leaving the other processes of a run."""

import os
import subprocess
import sys

from tests.processes import LIMIT, ROOT


def test_a_process_leaves_with_its_own_status_while_a_thread_works_for_it(tmp_path):
    """Taking the interpreter apart under the thread aborts, which is status -6."""
    command, store = [sys.executable, "-m", "tests.optim.leaving_processes"], str(tmp_path / "store")
    started = [subprocess.Popen(command, cwd=ROOT, env=os.environ | dict(STORE=store, RANK=str(rank))) for rank in range(2)]
    assert [process.wait(LIMIT) for process in started] == [3, 4]
