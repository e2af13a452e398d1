"""The traffic that a plan predicts is that of real processes, byte for byte."""

import pytest

from tests.processes import printed_by


@pytest.mark.parametrize("processes, what, lines", [(2, "layers", 14), (4, "meshes", 8)])
def test_what_is_planned_is_sent(processes, what, lines):
    """Of layers, as they count it themselves; of whole steps, in which DDP, FSDP and pipelines send too."""
    printed = printed_by(processes, "tests.models.plan_processes", what)
    sizes = [int(line.split()[-2]) for line in printed]
    assert len(sizes) == lines and min(sizes) > 0
