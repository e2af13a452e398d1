"""A disk that really is full while a run saves."""

import shutil
import subprocess

import pytest

import train
from models.checkpoint import checkpoints, verify
from models.log import read

TINY = ["--tokenizer", "byte", "--dim", "32", "--depth", "2", "--heads", "4", "--seq-len", "16", "--stem", "",
        "--batch-size", "4", "--dtype", "float32", "--device", "cpu", "--eval-every", "0", "--eval-tokens", "200",
        "--sample", "1", "--keep", "1", "--schedule", "wsd:decay=0.01"]  # fmt: skip


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a file system cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def bytes_of(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(small_disk, tmp_path, capsys):
    run, text = small_disk / "run", tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 23) for i in range(2000)))
    flags = [*TINY, "--data", str(text)]
    assert train.main([*flags, "--steps", "2", "--out", str(run)]) == 0
    (good,) = checkpoints(run)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - bytes_of(good) // 2))
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--steps", "4"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train.py: ") and str(run) in line and "No space left on device" in line
    assert checkpoints(run) == [good] and not list(run.glob(".step-*"))
    verify(good)
    ballast.unlink()
    assert train.main(["--resume", str(run), "--steps", "4"]) == 0
    assert train.main([*flags, "--steps", "4", "--out", str(tmp_path / "whole")]) == 0
    ours, theirs = ([record["loss"] for record in read(folder / "log.jsonl") if "loss" in record]
                    for folder in (run, tmp_path / "whole"))  # fmt: skip
    assert ours == theirs and len(ours) == 4

