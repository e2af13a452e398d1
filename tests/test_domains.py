"""Texts of several kinds, from the flag to the experts that belong to each: train.py --domains, eval.py --domain."""

import math
import re

import pytest
import torch

import eval as evaluation
import train
from models.checkpoint import checkpoints, find
from models.log import read
from models.weights import load_model

TINY = "--dim 32 --depth 2 --heads 2 --seq-len 32 --batch-size 4 --eval-every 0 --sample 1 --dtype float32".split()
TINY += "--tokenizer byte --stem none --ffn moe:experts=4:width=32:router=hash/domains=2 --seed 3".split()
TEXTS = ["sums.txt", "letters.txt"]


@pytest.fixture(scope="module", autouse=True)
def texts(tmp_path_factory):
    """The flags that name two kinds of text: sums, and letters in their order."""
    folder = tmp_path_factory.mktemp("domains")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROSETTA_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        (folder / "sums.txt").write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(40) for b in range(40)))
        (folder / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz\n" * 400)
        (folder / "one.txt").write_text("one\n" * 100)
        yield ["--domains", "--data", ",".join(TEXTS)]


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("domains") / "run"
    assert train.main([*TINY, *texts, "--steps", "40", "--save-every", "20", "--keep", "2", "--out", str(folder)]) == 0
    return folder


def bits(run, capsys, *flags: str) -> float:
    assert evaluation.main(["bpb", "--checkpoint", str(run), "--dtype", "float32", *flags]) == 0
    return float(re.match(r"[\d.]+", capsys.readouterr().out)[0])


def test_all_text_is_judged_as_in_training_and_each_kind_by_itself(run, capsys):
    both = bits(run, capsys)
    assert both == pytest.approx(read(run / "log.jsonl")[-1]["bpb"], abs=1e-4)
    own = [bits(run, capsys, "--domain", str(number)) for number in range(2)]
    assert min(own) < both < max(own)
    named = [bits(run, capsys, "--domain", str(number), "--data", text) for number, text in enumerate(TEXTS)]
    assert named == own
    assert bits(run, capsys, "--domain", "1", "--val-data", TEXTS[1]) != own[1]  # all of it, not a tenth
    crossed = [bits(run, capsys, "--domain", str(1 - number), "--data", text) for number, text in enumerate(TEXTS)]
    assert all(wrong > right + 0.01 for wrong, right in zip(crossed, own, strict=True)), (own, crossed)


def test_a_kind_uses_its_own_experts_alone(run, tmp_path, capsys):
    """Told from the loads: the expert of a choice tells one bit, which of two kinds; with one kind told, none."""
    picture = str(tmp_path / "experts.png")
    assert evaluation.main(["experts", "--checkpoint", str(run), "--tokens", "2048", "--to", picture]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert [float(row[-1]) for row in rows] == [1.0, 1.0]


def test_a_resumed_run_is_the_same(run, texts, tmp_path):
    whole = tmp_path / "whole"
    assert train.main([*TINY, *texts, "--steps", "40", "--save-every", "0", "--out", str(whole)]) == 0
    first = tmp_path / "first"
    assert train.main([*TINY, *texts, "--steps", "40", "--save-every", "20", "--keep", "9", "--out", str(first)]) == 0
    early, late = checkpoints(first)
    for file in sorted(late.rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    late.rmdir()
    assert train.main(["--resume", str(early)]) == 0
    ours, theirs = (load_model(find(folder)).state_dict() for folder in (first, whole))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_dense_model_reads_the_same_text(run, texts, tmp_path):
    dense = [flag for flag in TINY if not flag.startswith("moe:") and flag != "--ffn"]
    assert train.main([*dense, *texts, "--steps", "2", "--out", str(tmp_path / "run")]) == 0
    assert math.isfinite(read(tmp_path / "run" / "log.jsonl")[-1]["bpb"])


BAD = {
    "--no-domains": "domains: layers tell 2 kinds of text apart, the text has 1; with --domains, an entry each",
    "--ffn moe:experts=6:router=hash/domains=3": "domains: layers tell 3 kinds of text apart, the text has 2",
    "--ffn moe:router=hash/domains=2,moe:router=hash/domains=4": "domains: layers of one model tell 2 and 4 kinds",
    "--val-data one.txt": "val_data: 1 entries, where --data has 2 domains",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_status_2(flags, texts, tmp_path, capsys):
    given = texts[1:] if flags == "--no-domains" else [*texts, *flags.split()]
    assert train.main([*TINY, *given, "--steps", "1", "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert BAD[flags] in line and line.startswith("train.py: ") and not checkpoints(tmp_path / "run")


def test_a_task_has_no_kinds(capsys):
    assert train.main(["--domains", "--data", "task:parity", "--steps", "1"]) == 2
    assert "domains: a task is of one kind" in capsys.readouterr().err


def test_a_kind_that_is_not_there_is_named(run, capsys):
    assert evaluation.main(["bpb", "--checkpoint", str(run), "--domain", "2"]) == 2
    assert "domain: 2 is none of 0 to 1" in capsys.readouterr().err
    assert evaluation.main(["sample", "--checkpoint", str(run)]) == 2
    assert "domains: the router has 2, but the tokens were given none" in capsys.readouterr().err
