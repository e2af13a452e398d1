"""Every kernel compiles for GPUs that are not here, without spilling registers, within the shared memory they have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import SPECS
from kernels.launch import TRITON

ROOT = Path(__file__).parents[2]


triton_alone = pytest.mark.skipif(not TRITON, reason="needs Triton")
each = pytest.mark.parametrize("name", SPECS)


def run(*words: str) -> str:
    """In a process of its own: there Triton compiles, here it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@triton_alone
@each
def test_it_compiles_without_a_gpu(name):
    assert " 0 that spill" in run("kernels.compile", name)


@triton_alone
@each
def test_torch_compile_traces_the_triton_path(name):
    """Whole, forward and backward, into graphs of which at least the first starts kernels."""
    for line in run("tests.kernels.trace_triton", name).splitlines():
        counts = [int(count) for count in line.split()]
        assert len(counts) == (2 if SPECS[name].gradients else 1) and counts[0], line


def test_what_is_no_kernel_is_named(capsys):
    from kernels.compile import main

    assert main(["rmsnrom"]) == 2
    assert "rmsnrom" in capsys.readouterr().err
