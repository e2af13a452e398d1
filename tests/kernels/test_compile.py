"""Every kernel compiles for GPUs that are not here, without spilling registers, within the shared memory they have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import SPECS
from kernels.launch import TRITON

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not TRITON, reason="needs Triton")
@pytest.mark.parametrize("name", SPECS)
def test_it_compiles_without_a_gpu(name, tmp_path):
    """In a process of its own: there Triton compiles, here it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile", name]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " 0 that spill" in ended.stdout


def test_what_is_no_kernel_is_named(capsys):
    from kernels.compile import main

    assert main(["rmsnrom"]) == 2
    assert "rmsnrom" in capsys.readouterr().err
