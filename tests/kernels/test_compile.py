"""Every kernel compiles for GPUs that are not here, without spilling registers, within the shared memory they have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import SPECS
from kernels.compile import TARGETS
from kernels.launch import TRITON

ROOT = Path(__file__).parents[2]


triton_alone = pytest.mark.skipif(not TRITON, reason="needs Triton")
each = pytest.mark.parametrize("name", SPECS)


def run(*words: str) -> list[str]:
    """Lines of a process of its own, one for all operations: there Triton compiles, here it interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", *words]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout.splitlines()


@pytest.fixture(scope="module")
def compilations() -> list[str]:
    return run("kernels.compile")


@pytest.fixture(scope="module")
def traces() -> list[str]:
    return run("tests.kernels.trace_triton", *SPECS)


@triton_alone
@each
def test_it_compiles_without_a_gpu(name, compilations):
    """For every target; a kernel that spills or asks for too much ends the process with another status."""
    mine = [line for line in compilations if line.startswith(f"{name}.")]
    assert {target for target in TARGETS if any(f" {target} " in line for line in mine)} == TARGETS.keys()
    assert not any("does not fit" in line for line in mine)
    assert compilations[-1].endswith(" 0 that spill or ask for too much shared memory")


@triton_alone
@each
def test_torch_compile_traces_the_triton_path(name, traces):
    """Whole, forward and backward, into graphs of which at least the first starts kernels."""
    mine = [line.split()[1:] for line in traces if line.split()[0] == name]
    assert len(mine) == len(SPECS[name].cpu)
    for counts in mine:
        assert len(counts) == (2 if SPECS[name].gradients else 1) and int(counts[0]), counts


def test_what_is_no_kernel_is_named(capsys):
    from kernels.compile import main

    assert main(["rmsnrom"]) == 2
    assert "rmsnrom" in capsys.readouterr().err
