"""A parameter cut among processes has one norm, and a row one use: LAMB and SparseAdamW step as they do on the whole."""

from tests.processes import printed_by


def test_parts_step_as_the_whole():
    assert printed_by(2, "tests.optim.lamb_processes") == ["Lamb: equal", "SparseAdamW: equal"]
