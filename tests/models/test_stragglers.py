"""A process that is slower than the others is named in the log, whatever the mesh; where none is, none is."""

import json
import socket

import pytest

from models.stragglers import slow_ranks
from tests.processes import printed_by

SLOWED = ["loader=dp=2", "layer=tp=2", "mixer=ulysses=2"]
UNDISTURBED = ["none=fsdp=2"]


def test_the_slow_process_is_named_and_no_other(tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 23) for i in range(2000)))
    said = printed_by(2, "tests.models.straggler_processes", str(tmp_path), *UNDISTURBED, *SLOWED)
    named = f"rank 1 on {socket.gethostname()} is slow: "
    for number, way in enumerate(UNDISTURBED + SLOWED):
        records = [json.loads(line) for line in (tmp_path / str(number) / "log.jsonl").read_text().splitlines()]
        compared = [record for record in records if "busy" in record]
        assert [record["step"] for record in compared] == [4, 8]
        assert all(len(record["busy"]) == 2 and min(record["busy"]) > 0 for record in compared)
        if way in UNDISTURBED:
            assert not any("slow" in record for record in records), (way, compared)
        else:
            lines = [record.get("slow", "") for record in compared]
            assert all(line.startswith(named) and "rank 0" not in line for line in lines), (way, compared)
            assert all(record["busy"][1] > 0.05 for record in compared)
    assert sum(named in line for line in said) == 2 * len(SLOWED), said


def test_a_rank_is_compared_with_those_that_have_the_same_layers():
    assert slow_ranks([1.0, 1.4, 1.0]) == [] and slow_ranks([1.0, 1.6, 1.0]) == [(1, 1.0)]
    assert slow_ranks([2.0, 9.0]) == [(1, 2.0)]
    assert slow_ranks([1.0, 1.0, 5.0, 5.0], stages=2) == []  # the second stage has more to do
    assert slow_ranks([1.0, 1.0, 5.0, 9.0], stages=2) == [(3, 5.0)]
    assert slow_ranks([1.0, 5.0], stages=2) == []  # none to compare it with
    assert slow_ranks([3.0, 1.0, 1.0, 3.1, 1.1]) == [(0, pytest.approx(1.05)), (3, pytest.approx(1.05))]
