"""Every kernel compiles for GPUs that are not here, without spilling registers, within the shared memory they have."""

import pytest

from kernels import SPECS
from kernels.compile import TARGETS
from kernels.launch import TRITON

triton_alone = pytest.mark.skipif(not TRITON, reason="needs Triton")
each = pytest.mark.parametrize("name", SPECS)


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
