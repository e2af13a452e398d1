"""A parameter cut among processes has one norm: LAMB steps as it does on the whole."""

from tests.processes import printed_by


def test_parts_step_as_the_whole():
    assert printed_by(2, "tests.optim.lamb_processes") == ["equal"]
