"""The record of a run: what is written comes back, cut lines included, and is drawn."""

import json

import pytest

from models.log import Log, draw_curve, read


def write(run, steps, after=0, **options):
    log = Log(run, after, **options)
    for step in steps:
        log.step(step / 10, step=step, loss=9 / step, elapsed=0.1 * step, lr=1.0, speed=100.0, share=0.5)
        if step % 2 == 0:
            log.evaluation(step=step, bpb=3 / step, elapsed=0.1 * step)
    log.close()


def test_what_is_written_comes_back(tmp_path):
    write(tmp_path / "run", [1, 2, 3])
    records = read(tmp_path / "run" / "log.jsonl")
    assert [(r["step"], "bpb" in r) for r in records] == [(1, False), (2, False), (2, True), (3, False)]
    assert records[0] == dict(step=1, loss=9.0, elapsed=0.1, lr=1.0, speed=100.0, share=0.5)


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    write(tmp_path, [1, 2, 3])
    write(tmp_path, [3, 4], after=2)
    assert [r["step"] for r in read(tmp_path / "log.jsonl")] == [1, 2, 2, 3, 4, 4]


def test_a_last_line_that_was_cut(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "log.jsonl"
    whole = path.read_text()
    path.write_text(whole + '{"step": 3, "lo')
    assert [r["step"] for r in read(path)] == [1, 2, 2]
    write(tmp_path, [3], after=2)
    assert [r["step"] for r in read(path)] == [1, 2, 2, 3]
    path.write_text(whole.replace("{", "[", 1))
    with pytest.raises(ValueError, match="line 1, is not JSON$"):
        read(path)


def test_quiet(tmp_path):
    write(tmp_path / "run", [1, 2], quiet=True)
    assert not (tmp_path / "run").exists() and read(tmp_path / "run" / "log.jsonl") == []


@pytest.mark.parametrize(
    "records", [[dict(step=1, loss=2.0)], [dict(step=1, bpb=2.0)], [dict(step=1, loss=2.0), dict(step=1, bpb=2.0)]]
)
def test_curve(records, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_curve(tmp_path / "log.jsonl", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
