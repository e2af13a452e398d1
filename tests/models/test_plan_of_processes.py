"""The traffic that a plan predicts is that of real processes, byte for byte."""

from tests.processes import printed_by


def test_what_is_planned_is_sent():
    lines = printed_by(2, "tests.models.plan_processes")
    sizes = [int(line.split()[-2]) for line in lines]
    assert len(sizes) == 11 and min(sizes) > 0
