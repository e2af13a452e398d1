"""Four processes, and two by two, that share the positions of rows are as one: losses, gradients, bytes, mistakes."""

from tests.processes import printed_by


def test_processes_equal_one():
    lines = printed_by(4, "tests.nn.sequence_processes")
    assert lines == [
        "heads: 1 cannot be shared among 4 processes evenly",
        "heads: 2 cannot be shared among 4 processes evenly",
        "ring: a learned bias stands beside scores that are held whole; ulysses takes it, a ring does not",
        "ring: 4 processes do not make a ring of 3 places evenly",
        "seq_len: 49 positions cannot be shared among 4 processes in 4 parts evenly",
        "state: processes that share the positions of a row read whole rows; decode with one process",
    ]
