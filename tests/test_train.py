"""train.py as its users meet it: runs, interruptions, resumption, bad input."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from models.checkpoint import checkpoints, read_json, read_tensors, verify
from models.log import read as read_log

ROOT = Path(__file__).parent.parent
TINY = "--tokenizer byte --dim 32 --depth 2 --heads 2 --seq-len 32 --batch-size 4 --eval-every 0 --sample 8".split()
TINY += ["--dtype", "float32"]


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROSETTA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of subprocesses: sums in one order on any machine


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    while STARTED:
        STARTED.pop().kill()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(40) for b in range(40)))
    return str(path)


def start(*flags: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, "train.py", *flags]
    STARTED.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    return STARTED[-1]


def run(*flags: str, launcher: tuple[str, ...] = ()) -> str:
    process = start(*flags, launcher=launcher)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in read_log(folder / "log.jsonl") if "loss" in record]


def assert_same_end(one: Path, other: Path) -> None:
    """Equal losses, weights, optimizer states and generators, bit for bit."""
    assert losses(one) == losses(other)
    a, b = checkpoints(one)[-1], checkpoints(other)[-1]
    assert a.name == b.name
    for file in ("model.safetensors", "optimizer.safetensors", "generators.safetensors"):
        ours, theirs = read_tensors(a / file), read_tensors(b / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, text):
    flags = [*TINY, "--data", text, "--steps", "100", "--save-every", "50", "--keep", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    whole = losses(tmp_path / "whole")
    assert [step for step, _ in whole] == list(range(1, 101)) and whole[-1][1] < whole[0][1] - 0.5

    # The second half again, from the checkpoint at 50.
    half = tmp_path / "half"
    assert train.main([*flags, "--out", str(half)]) == 0
    for path in checkpoints(half)[1:]:
        os.rename(path, tmp_path / "later")
    assert train.main(["--resume", str(half)]) == 0
    assert_same_end(tmp_path / "whole", half)
    assert (half / "curve.png").stat().st_size > 1000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_leaves(tmp_path, text, number):
    folder = tmp_path / "run"
    process = start(*TINY, "--data", text, "--steps", "100000", "--save-every", "0", "--out", str(folder))
    wait_for_steps(process, folder, 5)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"--resume {folder}" in out and "Traceback" not in err
    (saved,) = checkpoints(folder)
    verify(saved)
    assert saved.name == f"step-{losses(folder)[-1][0]:06d}"


def test_sigkill_at_any_moment_leaves_the_last_good_checkpoint(tmp_path, text):
    flags = [*TINY, "--data", text, "--steps", "120", "--save-every", "3", "--keep", "2"]
    assert train.main([*flags, "--out", str(tmp_path / "whole")]) == 0
    killed, moments = tmp_path / "killed", random.Random(0)
    process = start(*flags, "--out", str(killed))
    for _ in range(3):
        before = checkpoints(killed)[-1:] if killed.exists() else []
        wait_for_steps(process, killed, 4, since=int(before[0].name.removeprefix("step-")) if before else 0)
        time.sleep(moments.uniform(0, 0.1))
        process.kill()
        process.communicate()
        for path in checkpoints(killed):
            verify(path)
        process = start("--resume", str(killed))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_end(tmp_path / "whole", killed)


def wait_for_steps(process: subprocess.Popen, folder: Path, steps: int, since: int = 0) -> None:
    """Until the run has gone `steps` beyond `since` and has a checkpoint, if it makes any."""
    for _ in range(2400):
        lines = (folder / "log.jsonl").read_text().count("\n") if (folder / "log.jsonl").exists() else 0
        if lines >= since + steps or process.poll() is not None:
            return
        time.sleep(0.025)
    pytest.fail("the run did not get going")


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, text, capsys):
    flags = [*TINY, "--data", text, "--steps", "50", "--save-every", "1", "--out", str(tmp_path / "run")]
    assert train.main([*flags, "--rest-optimizer", "adamw:lr=1e30", "--embedding-lr", "1e30"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (good,) = [path for path in checkpoints(tmp_path / "run")[-1:]]
    assert "step" in line and str(good) in line and ("nan" in line or "inf" in line)


def test_processes_share_a_step_and_equal_one(tmp_path, text):
    flags = [*TINY, "--data", text, "--steps", "8", "--batch-size", "8"]
    assert train.main([*flags, "--out", str(tmp_path / "one")]) == 0
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*flags, "--out", str(tmp_path / "two"), launcher=two)
    assert train.main([*flags, "--out", str(tmp_path / "parts"), "--accumulate", "4"]) == 0
    for name in ("two", "parts"):
        for (_, ours), (_, theirs) in zip(losses(tmp_path / "one"), losses(tmp_path / name), strict=True):
            assert math.isclose(ours, theirs, rel_tol=1e-4)


def test_the_clock_ends_a_run_and_every_precision_and_schedule_trains(tmp_path, text):
    began = time.perf_counter()
    assert train.main([*TINY, "--data", text, "--minutes", "0.03", "--out", str(tmp_path / "clock")]) == 0
    assert time.perf_counter() - began < 30
    multipliers = [record["lr"] for record in read_log(tmp_path / "clock" / "log.jsonl") if "lr" in record]
    assert multipliers[-1] < 0.2 and all(0 <= m <= 1 for m in multipliers)
    for flags in ("--dtype bfloat16 --schedule cosine --packed", "--dtype float16 --clip 1 --schedule rsqrt",
                  "--schedule wsd:decay=0.5 --optimizer adamw:lr=0.003 --norm-place post"):  # fmt: skip
        folder = tmp_path / flags.split()[1]
        assert train.main([*TINY, "--data", text, "--steps", "30", *flags.split(), "--out", str(folder)]) == 0
        assert losses(folder)[-1][1] < losses(folder)[0][1]


def test_the_schedule_moves_the_learning_rate(tmp_path, text):
    curves = {}
    for floor in ("0", "1"):  # from 1 down to nothing, or 1 all along
        flags = [*TINY, "--data", text, "--steps", "10", "--schedule", f"linear:warmup=0:floor={floor}"]
        assert train.main([*flags, "--out", str(tmp_path / floor)]) == 0
        curves[floor] = losses(tmp_path / floor)
    assert curves["0"][0] == curves["1"][0] and curves["0"][4] != curves["1"][4]


def test_training_goes_on_from_weights(tmp_path, text):
    base = [*TINY, "--data", text, "--steps", "20"]
    assert train.main([*base, "--out", str(tmp_path / "a")]) == 0
    assert train.main([*base, "--weights", str(tmp_path / "a"), "--out", str(tmp_path / "b")]) == 0
    assert losses(tmp_path / "b")[0][1] < losses(tmp_path / "a")[-1][1] + 0.3


BAD = {
    "--mixer gqq": "unknown mixer 'gqq' (did you mean 'gqa'?)",
    "--mixer gqa:kv_head=2": "did you mean 'kv_heads'",
    "--mixer gqa:kv_heads=two": "is not a whole number",
    "--mixer gqa:kv_heads=3": "kv_heads: 2 query heads cannot be shared among 3",
    "--stack (gqa": "a ) is missing",
    "--heads 5": "heads: a dim of 32 does not divide into 5 heads",
    "--model gpt3": "no preset 'gpt3'",
    "--norm-place middle": "invalid choice",
    "--depht 3": "did you mean '--depth'?",
    "--steps many": "invalid int value",
    "--steps -1": "steps: -1 is too small",
    "--batch-size 4 --accumulate 3": "batch_size: 4 does not divide",
    "--steps 0 --minutes 0": "--steps",
    "--data /no/such/file": "/no/such/file",
    "--tokenizer nonsense": "nonsense",
    "--optimizer sgd": "unknown optimizer 'sgd'",
    "--optimizer muon:lr=-1": "lr must be",
    "--schedule cosine:warmup=2": "warmup",
    "--device cuda:99": "device: 'cuda:99'",
    "--resume /no/such/run": "there is none in '/no/such/run'",
    "--weights /no/such/model": "there is none in '/no/such/model'",
    "--list colour": "no family 'colour'",
    "--position rope:fraction=2": "fraction",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_status_2(flags, tmp_path, text, capsys):
    argv = [*TINY, "--data", text, "--steps", "1", "--out", str(tmp_path / "run"), *flags.split(" ", 1 if "(" in flags else -1)]
    try:
        status = train.main(argv)
    except SystemExit as leaving:
        status = leaving.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and BAD[flags] in lines[-1], lines
    assert sum("train.py:" in line for line in lines) == 1 and not checkpoints(tmp_path / "run")


def test_a_damaged_checkpoint_is_named_and_a_run_is_never_overwritten(tmp_path, text, capsys):
    folder = tmp_path / "run"
    flags = [*TINY, "--data", text, "--steps", "4", "--out", str(folder)]
    assert train.main(flags) == 0
    assert train.main(flags) == 2 and "holds a run already" in capsys.readouterr().err
    (saved,) = checkpoints(folder)
    damages = {
        "optimizer.safetensors": lambda whole: whole[:-100],
        "model.safetensors": lambda whole: whole[:900] + b"?" + whole[901:],
        "progress.json": lambda whole: whole.replace(b'"step": 4', b'"step": 3'),
        "config.json": lambda whole: b"",
    }
    for name, damage in damages.items():
        good = (saved / name).read_bytes()
        (saved / name).write_bytes(damage(good))
        assert train.main(["--resume", str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert name in line and "damaged" in line
        (saved / name).write_bytes(good)
    (saved / "tokenizer" / "tokenizer.tiktoken").unlink()
    assert train.main(["--resume", str(folder)]) == 2 and "tokenizer.tiktoken is missing" in capsys.readouterr().err


def test_list_shows_every_concept_and_help_every_flag(capsys):
    assert train.main(["--list"]) == 0
    listed = capsys.readouterr().out
    for kind, family in train.FAMILIES.items():
        assert f"\n{kind}\n" in "\n" + listed and all(f"\n  {name}" in listed for name in family)
    assert train.main(["--list", "mixer"]) == 0 and "gqa:" in capsys.readouterr().out
    with pytest.raises(SystemExit) as leaving:
        train.main(["--help"])
    assert leaving.value.code == 0 and "--rest-optimizer" in capsys.readouterr().out


def test_the_log_is_json_lines(tmp_path, text):
    assert train.main([*TINY, "--data", text, "--steps", "6", "--eval-every", "3", "--out", str(tmp_path / "run")]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "bpb" in r] == [3, 6, 6] and records[-1]["whole"]
    assert all({"step", "loss", "lr", "elapsed", "speed", "share"} <= r.keys() for r in records if "loss" in r)


def test_an_encoder_trains_and_resumes(text, tmp_path, capsys):
    """Masked tokens: the loss falls, the second half again is the same bit for bit, nothing is sampled; eval.py judges it."""
    flags = [*TINY, "--data", text, "--objective", "masked:rate=0.4", "--steps", "40", "--save-every", "20"]
    for name in ("whole", "half"):
        assert train.main([*flags, "--out", str(tmp_path / name)]) == 0
    for path in checkpoints(tmp_path / "half")[1:]:
        os.rename(path, tmp_path / "later")
    assert train.main(["--resume", str(tmp_path / "half")]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "half")
    whole = losses(tmp_path / "whole")
    assert whole[-1][1] < whole[0][1] - 0.5 and "a sample" not in capsys.readouterr().out
    assert evaluation.main(["bpb", "--checkpoint", str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    judged = [row["bpb"] for row in read_log(tmp_path / "whole" / "log.jsonl") if "bpb" in row][-1]
    assert capsys.readouterr().out == f"{judged:.4f} bits per byte\n"
    assert evaluation.main(["sample", "--checkpoint", str(tmp_path / "whole")]) == 2
    assert "an encoder" in capsys.readouterr().err


TASK = "--stem none --dim 32 --depth 2 --heads 2 --batch-size 4 --eval-every 0 --eval-tokens 64 --dtype float32".split()


def test_a_task_trains_and_resumes_bit_for_bit(tmp_path, capsys):
    """Induction of few symbols is learnt; the second half again is the same; the log and the end speak of accuracy."""
    flags = [*TASK, "--data", "task:induction:length=8:symbols=3", "--batch-size", "16"]
    flags += "--steps 120 --save-every 60 --eval-every 60 --eval-tokens 512".split()
    for name in ("whole", "half"):
        assert train.main([*flags, "--out", str(tmp_path / name)]) == 0
    said = capsys.readouterr().out
    for path in checkpoints(tmp_path / "half")[1:]:
        os.rename(path, tmp_path / "later")
    assert train.main(["--resume", str(tmp_path / "half")]) == 0
    assert_same_end(tmp_path / "whole", tmp_path / "half")
    records = read_log(tmp_path / "whole" / "log.jsonl")
    judged = [record for record in records if "accuracy" in record]
    assert [record["step"] for record in judged] == [60, 120, 120] and judged[-1]["whole"]
    assert all(record["chance"] == 1 / 3 and not {"loss", "bpb"} & record.keys() for record in judged)
    assert judged[-1]["accuracy"] > 0.8 and judged[-1]["val_loss"] < 0.6 < judged[0]["val_loss"] + 0.6
    assert losses(tmp_path / "whole")[0][1] == pytest.approx(math.log(4)), "nats a position that is asked; the head begins at 0"
    assert "right (chance 33.3%)" in said and "bits per byte" not in said and "a sample" not in said
    assert "inputs:  s" in said and "answers: s" in said and "model:   s" in said
    assert (tmp_path / "half" / "curve.png").stat().st_size > 1000

    first, last = (read_json(path / "progress.json")["loader"]["row"] for path in checkpoints(tmp_path / "whole"))
    assert (first, last) == (60 * 16, 120 * 16)
    saved = checkpoints(tmp_path / "whole")[-1]
    config = read_json(saved / "config.json")
    assert (config["seq_len"], config["vocab_size"]) == (8, 4) and not (saved / "tokenizer").exists()
    longer = "task:induction:length=12:symbols=3"
    assert train.main(["--resume", str(tmp_path / "half"), "--data", longer]) == 2
    assert "loader state: task was Induction(length=8, symbols=3)" in capsys.readouterr().err
    more = ["--weights", str(tmp_path / "whole"), "--data", longer, "--steps", "3", "--out", str(tmp_path / "more")]
    assert train.main(more) == 0 and losses(tmp_path / "more")[0][1] < 1


def test_processes_share_a_task_and_equal_one(tmp_path):
    flags = [*TASK, "--data", "task:mqar:length=16:pairs=2:keys=8:values=8", "--steps", "6", "--batch-size", "8"]
    assert train.main([*flags, "--out", str(tmp_path / "one")]) == 0
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    run(*flags, "--out", str(tmp_path / "two"), launcher=two)
    assert train.main([*flags, "--out", str(tmp_path / "parts"), "--accumulate", "4"]) == 0
    assert train.main([*flags, "--out", str(tmp_path / "other"), "--seed", "1"]) == 0
    for name in ("two", "parts"):
        for (_, ours), (_, theirs) in zip(losses(tmp_path / "one"), losses(tmp_path / name), strict=True):
            assert math.isclose(ours, theirs, rel_tol=1e-4)
    assert losses(tmp_path / "one")[1:] != losses(tmp_path / "other")[1:]


BAD_TASKS = {
    "--data task:inducton": "unknown task 'inducton' (did you mean 'induction'?)",
    "--data task:induction:lenght=8": "has no option 'lenght' (did you mean 'length'?)",
    "--data task:induction:length=2": "length: 2 is too small",
    "--data task:induction:length=8 --seq-len 16": "seq_len: 16 was given, but a sequence of task:induction:length=8 has 8",
    "--data task:parity --tokenizer byte": "a task has words",
    "--data task:parity --val-data x": "a task has words",
    "--data task:parity --objective masked": "objective: a task asks for answers of its own",
}


@pytest.mark.parametrize("flags", BAD_TASKS)
def test_a_bad_task_is_one_line_and_status_2(flags, tmp_path, capsys):
    assert train.main([*TASK, "--steps", "1", "--out", str(tmp_path / "run"), *flags.split()]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert BAD_TASKS[flags] in line and line.startswith("train.py: ") and not checkpoints(tmp_path / "run")
