"""Several processes are as one: balance over the global batch, and experts that each process holds a part of."""

from tests.processes import printed_by


def test_processes_equal_one():
    *sent, refused = printed_by(2, "tests.nn.moe_processes")
    assert refused == "refused: experts: 3 cannot be shared among 2 processes evenly"
    assert len(sent) == 4 and all(int(line.split()[-2]) > 0 for line in sent), sent
