"""Tensor parallelism that computes while messages travel: the same numbers, and as many bytes."""

from tests.processes import printed_by


def test_overlapped_equals_plain():
    """Losses and gradients of every parameter, in float64; layers that cannot overlap stay as they are."""
    lines = printed_by(4, "tests.nn.overlap_processes")
    assert len(lines) == 4 and all(float(line.split()[-1]) < 1e-12 for line in lines), lines
