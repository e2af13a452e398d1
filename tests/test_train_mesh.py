"""train.py on several processes: a run that changes its mesh on the way, and what goes wrong."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError
from safetensors.torch import save_file

import eval as evaluation
import train
from models import make_whole
from models.checkpoint import checkpoints, verify
from models.log import read

ROOT = Path(__file__).parents[1]
TINY = ["--tokenizer", "byte", "--dim", "16", "--depth", "2", "--heads", "4", "--seq-len", "16", "--stem", "ngram:rows=64",
        "--batch-size", "8", "--accumulate", "2", "--dtype", "float32", "--device", "cpu", "--optimizer", "adamw:lr=0.01",
        "--eval-every", "3", "--eval-tokens", "200", "--sample", "5", "--clip", "1"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(4):
        (folder / f"{number}.txt").write_text("".join(chr(97 + (i * i + number) % 23) for i in range(2000)))
    return str(folder)


def start(processes: int, *flags: str, before: list[str] | None = None) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [*(before or []), "train.py"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    return subprocess.Popen([*command, *flags], cwd=ROOT, env=environment, start_new_session=True, **pipes)


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        out, err = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what torchrun has started too
        raise
    return process.returncode, out + err


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read(folder / "log.jsonl") if "loss" in record]


def test_a_run_goes_on_on_other_meshes_and_ends_as_on_one_process(tmp_path, text, capsys):
    """One process to step 2, four with layers and positions shared out to 4, two with heads to 6, one to 8."""
    flags = [*TINY, "--data", text, "--schedule", "wsd:decay=0.01"]
    assert train.main([*flags, "--steps", "8", "--out", str(tmp_path / "one")]) == 0
    run = str(tmp_path / "run")
    assert train.main([*flags, "--steps", "2", "--out", run]) == 0
    for processes, mesh, steps in ((4, "pp=2,ulysses=2", "4"), (2, "tp=2", "6")):
        status, said = ended(start(processes, "--resume", run, "--mesh", mesh, "--steps", steps, "--save-behind"))
        assert status == 0 and f"python eval.py sample --checkpoint {run}" in said, said[-3000:]
        assert len([*checkpoints(tmp_path / "run")[-1].glob("shard-*")]) == processes
    assert make_whole.main([run, "--out", str(tmp_path / "plain")]) == 0
    assert {path.name for path in (tmp_path / "plain").iterdir()} == {"config.json", "model.safetensors", "tokenizer"}
    shard = min(checkpoints(tmp_path / "run")[-1].glob("shard-*"))
    lost = shard.rename(tmp_path / "lost")
    capsys.readouterr()
    assert train.main(["--resume", run, "--mesh", ""]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is damaged" in line and f"{shard.name} is missing" in line
    lost.rename(shard)
    assert train.main(["--resume", run, "--mesh", "", "--steps", "8", "--no-save-behind"]) == 0
    for ours, theirs in zip(losses(tmp_path / "run"), losses(tmp_path / "one"), strict=True):
        assert math.isclose(ours, theirs, rel_tol=1e-4)
    judged = [[r["bpb"] for r in read(tmp_path / name / "log.jsonl") if "bpb" in r][-1] for name in ("run", "one")]
    assert math.isclose(*judged, rel_tol=1e-4)
    assert evaluation.main(["bpb", "--checkpoint", str(tmp_path / "plain"), "--data", text]) == 0


@pytest.mark.parametrize("flags, part", [
    (["--mesh", "tp=2"], "mesh: tp=2 needs 2 processes, but there is 1"),
    (["--mesh", "xp=1"], "mesh: there is no axis 'xp'"),
    (["--pipeline", "gpip"], "'gpip'"),
    (["--mesh", "tp=1", "--batch-size", "3"], "batch_size: 3 does not divide into 1 shares x 2 parts"),
])  # fmt: skip
def test_a_wrong_mesh_is_one_line_and_status_2(flags, part, tmp_path, text, capsys):
    status = train.main([*TINY, "--data", text, "--steps", "1", *flags, "--out", str(tmp_path / "run")])
    (line,) = capsys.readouterr().err.splitlines()
    assert status == 2 and part in line and not (tmp_path / "run").exists()


def test_a_killed_process_ends_the_run_and_a_restart_ends_as_if_nothing_had_been(tmp_path, text):
    """SIGKILL in the middle of a step: the others leave in a line each, and torchrun goes on from the last checkpoint."""
    flags = [*TINY, "--data", text, "--steps", "40", "--save-every", "5", "--keep", "2", "--mesh", "fsdp=2"]
    status, said = ended(start(2, *flags, "--out", str(tmp_path / "whole")))
    assert status == 0, said[-3000:]
    folder = tmp_path / "killed"
    process = start(2, *flags, "--out", str(folder), before=["--max-restarts", "1"])
    for _ in range(4000):
        if checkpoints(folder) or process.poll() is not None:
            break
        time.sleep(0.01)
    victim = max(workers(process.pid))
    os.kill(victim, signal.SIGKILL)
    status, said = ended(process)
    assert f"exitcode: -9) local_rank: 1 (pid: {victim})" in said, said[-3000:]
    assert "Traceback" not in said and "train.py: process 0 lost touch with another" in said, said[-3000:]
    assert status == 0 and losses(folder) == losses(tmp_path / "whole")
    verify(checkpoints(folder)[-1])


def workers(parent: int) -> list[int]:
    """The processes that another one has started and that run train.py."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if "train.py" in Path(f"/proc/{child}/cmdline").read_text()]


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, text, monkeypatch, capsys):
    flags = [*TINY, "--data", text, "--save-every", "2", "--keep", "5", "--out", str(tmp_path / "run")]
    written = []

    def no_room(tensors, path, **options):
        written.append(path)
        if len(written) > 4:  # a model, an optimizer and the generators are a checkpoint
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save_file(tensors, path, **options)

    monkeypatch.setattr("models.checkpoint.save_file", no_room)
    assert train.main([*flags, "--steps", "6"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and str(written[-1]) in line
    (good,) = checkpoints(tmp_path / "run")
    verify(good)
    monkeypatch.undo()
    assert train.main(["--resume", str(tmp_path / "run")]) == 0
