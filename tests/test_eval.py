"""eval.py as its users meet it."""

import math
import re

import pytest
import torch
from torch.nn.functional import one_hot

import eval as evaluation
import train
from models.checkpoint import checkpoints, find, read_json
from models.log import read
from models.score import answered
from models.weights import load_model

TINY = "--dim 32 --depth 2 --heads 2 --seq-len 32 --batch-size 4 --eval-every 0 --sample 1 --dtype float32 --steps 60".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny model that a published family can hold, trained on multiplication."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "text.txt").write_text("".join(f"{a} times {b} is {a * b}.\n" for a in range(40) for b in range(40)))
    stack = "--tokenizer byte --norm rmsnorm --ffn swiglu --mixer gqa --stem none".split()
    assert train.main([*TINY, *stack, "--data", str(folder / "text.txt"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def test_bpb_is_that_of_the_run(run, capsys):
    assert evaluation.main(["bpb", "--checkpoint", str(run), "--dtype", "float32"]) == 0
    printed = float(re.match(r"[\d.]+", capsys.readouterr().out)[0])
    assert printed == pytest.approx(read(run / "log.jsonl")[-1]["bpb"], abs=1e-4)
    assert evaluation.main(["bpb", "--checkpoint", str(run), "--tokens", "64", "--seq-len", "16", "--batch-size", "2"]) == 0


def sample(run, capsys, *flags: str) -> str:
    assert evaluation.main(["sample", "--checkpoint", str(run), "--prompt", "7 times", "--tokens", "40", *flags]) == 0
    return capsys.readouterr().out


def test_samples_go_on_from_the_prompt_and_follow_the_seed(run, capsys):
    one, same, other = (sample(run, capsys, "--seed", seed) for seed in ("1", "1", "2"))
    assert one == same != other and one.startswith("7 times") and len(one) > 20
    greedy = sample(run, capsys, "--temperature", "0")
    for flag, value in (("--top-k", "1"), ("--top-p", "0"), ("--min-p", "1")):
        assert sample(run, capsys, flag, value) == greedy
    assert " is " in greedy


def test_speed_prints_both_phases(run, capsys):
    assert evaluation.main(["speed", "--checkpoint", str(run), "--prompt-tokens", "8", "--tokens", "8", "--repeats", "1"]) == 0
    assert re.match(r"prefill [\d,]+ tokens/s, decode [\d,]+ tokens/s", capsys.readouterr().out)


def test_an_exported_model_says_the_same(run, tmp_path, capsys):
    published = tmp_path / "published"
    assert evaluation.main(["export", "--checkpoint", str(run), "--to", str(published)]) == 0
    assert read_json(published / "config.json")["model_type"] == "llama"
    capsys.readouterr()
    assert sample(run, capsys, "--seed", "3") == sample(published, capsys, "--seed", "3")
    data = str(run.parent / "text.txt")
    assert train.main([*TINY, "--weights", str(published), "--data", data, "--out", str(tmp_path / "on")]) == 0
    losses = [record["loss"] for record in read(tmp_path / "on" / "log.jsonl") if "loss" in record]
    assert losses[0] < 3, "fine-tuning starts from the exported weights, not from a uniform guess of log 257 = 5.5"


BAD = {
    "--checkpoint /no/such": "there is none in '/no/such'",
    "--temperature -1": "temperature: -1.0 is not between",
    "--top-p 2": "top_p: 2.0 is not between",
    "--device tpu": "device: 'tpu'",
    "--tokens few": "invalid int value",
    "--tokenizer nonsense": "nonsense",
    "--tokens 0 --tempreature 3": "unrecognized arguments",
}


@pytest.mark.parametrize("flags", BAD)
def test_bad_input_is_one_line_and_status_2(flags, run, capsys):
    try:
        status = evaluation.main(["sample", "--checkpoint", str(run), *flags.split()])
    except SystemExit as leaving:
        status = leaving.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py")]
    assert status == 2 and len(lines) == 1 and BAD[flags] in lines[0]


def test_a_damaged_checkpoint_is_named(run, capsys):
    (saved,) = checkpoints(run)
    good = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(good[:-7])
    assert evaluation.main(["sample", "--checkpoint", str(run)]) == 2
    assert "model.safetensors has" in capsys.readouterr().err
    (saved / "model.safetensors").write_bytes(good)


def table(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()[1:]]


def test_beyond_the_trained_length(run, capsys):
    assert evaluation.main(["length", "--checkpoint", str(run), "--multiples", "0.5,1,2", "--tokens", "640"]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["16", "32", "64"] and all(0 < float(cell) < 8 for row in rows for cell in row[1:])
    assert evaluation.main(["bpb", "--checkpoint", str(run), "--tokens", "640", "--batch-size", "4", "--dtype", "float32"]) == 0
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(float(rows[1][1]), abs=0.02)
    assert evaluation.main(["length", "--checkpoint", str(run), "--multiples", "1,two"]) == 2
    assert "multiples: numbers with commas" in capsys.readouterr().err


def test_passkeys_are_looked_for(run, capsys):
    flags = ["--lengths", "0,300", "--depths", "0,1", "--digits", "2", "--count", "2"]
    assert evaluation.main(["passkey", "--checkpoint", str(run), *flags]) == 0
    out = capsys.readouterr().out
    assert "chance 0.01" in out and [len(row) for row in table(out)] == [3, 3]


def test_layers_are_judged(run, capsys):
    assert evaluation.main(["layers", "--checkpoint", str(run), "--batch-size", "2", "--dtype", "float32"]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["1", "2"] and any(float(row[1]) > 0.01 for row in rows)


def test_maps_are_drawn(run, tmp_path, capsys):
    picture = tmp_path / "maps.png"
    assert evaluation.main(["maps", "--checkpoint", str(run), "--prompt", "7 times 8", "--to", str(picture)]) == 0
    assert picture.stat().st_size > 5000 and "layer 2: " in capsys.readouterr().out


def test_experts_are_counted(tmp_path, capsys):
    """Two kinds of text whose tokens do not overlap, and a router by token: what an expert tells of them is in the table."""
    for name, letters in (("a", "abcd"), ("b", "wxyz")):
        (tmp_path / name).write_text("".join(letters[i * i % 4] for i in range(4000)))
    flags = "--tokenizer byte --stem none --mixer none --ffn moe:experts=4:width=8:router=hash".split()
    data = ["--data", f"{tmp_path}/a,{tmp_path}/b", "--out", str(tmp_path / "run")]
    assert train.main([*TINY, *flags, *data, "--steps", "1"]) == 0
    picture = tmp_path / "experts.png"
    capsys.readouterr()
    call = ["experts", "--checkpoint", str(tmp_path / "run"), "--to", str(picture), "--tokens", "320", "--domains"]
    assert evaluation.main([*call, str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    rows = table(capsys.readouterr().out.rsplit("wrote", 1)[0])
    assert len(rows) == 2 and picture.stat().st_size > 3000
    for number, (mixture, row) in enumerate(zip(load_model(find(tmp_path / "run")).stack, rows, strict=True), 1):
        loads = torch.zeros(2, 4)
        for domain, letters in enumerate("ab"):
            text = (tmp_path / letters).read_text()[-400:]
            for expert in mixture.layer.router.table[0, [ord(c) for c in text], 0].tolist():
                loads[domain, expert] += 1
        p = loads / loads.sum(1, keepdim=True)
        told = -torch.xlogy(p.mean(0), p.mean(0)).sum() + torch.xlogy(p, p).sum() / 2
        assert row[0] == str(number) and float(row[-1]) == pytest.approx(told.item() / math.log(2), abs=0.05)
    assert evaluation.main([*call, str(tmp_path / "a")]) == 0
    assert all(float(row[-1]) == 0 for row in table(capsys.readouterr().out.rsplit("wrote", 1)[0]))


def test_a_model_without_experts_is_named(run, capsys):
    assert evaluation.main(["experts", "--checkpoint", str(run)]) == 2
    assert "checkpoint: it has mixtures of no experts" in capsys.readouterr().err


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A tiny model that has learnt induction over three symbols at length 8."""
    folder = tmp_path_factory.mktemp("task") / "run"
    flags = "--stem none --dim 32 --depth 2 --heads 2 --batch-size 16 --eval-every 0 --dtype float32 --steps 120".split()
    assert train.main([*flags, "--data", "task:induction:length=8:symbols=3", "--out", str(folder)]) == 0
    return folder


def test_a_task_is_judged_as_the_run_judged_it(asked, capsys):
    judge = ["task", "--checkpoint", str(asked), "--dtype", "float32"]
    assert evaluation.main(judge) == 0
    ((tokens, accuracy, complete, chance, oracle),) = table(capsys.readouterr().out)
    assert (tokens, chance, oracle) == ("8", "33.33%", "100.00%") and complete == accuracy
    recorded = read(asked / "log.jsonl")[-1]
    assert float(accuracy[:-1]) == pytest.approx(100 * recorded["accuracy"], abs=0.006) and recorded["accuracy"] > 0.8

    assert evaluation.main([*judge, "induction", "--lengths", "3,8,16", "--count", "100", "--batch-size", "7"]) == 0
    rows = table(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["3", "8", "16"] and all(row[3:] == ["33.33%", "100.00%"] for row in rows)
    assert evaluation.main([*judge, "parity:length=4", "--seed", "5"]) == 0  # a vocabulary that fits, a task never seen
    ((tokens, accuracy, complete, chance, _),) = table(capsys.readouterr().out)
    assert (tokens, chance) == ("4", "50.00%") and float(complete[:-1]) < float(accuracy[:-1]) < 80


@pytest.mark.parametrize(("flags", "message"), [
    ("inducton", "unknown task 'inducton' (did you mean 'induction'?)"),
    ("induction:lenght=8", "has no option 'lenght'"),
    ("induction:length=1", "length: 1 is too small"),
    ("--lengths 0", "length: 0 is too small"),
    ("--lengths 8,many", "lengths: numbers with commas"),
    ("phonebook --lengths 8", "lengths: phonebook:pairs="),
    ("--count 0", "count is 0"),
    ("s5", "task: S5(length=32) has 120 ids, the model knows only 4"),
])  # fmt: skip
def test_a_bad_task_is_one_line_and_status_2(flags, message, asked, capsys):
    assert evaluation.main(["task", "--checkpoint", str(asked), *flags.split()]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("eval.py")]
    assert message in line


def test_a_model_of_text_is_asked_for_a_task_by_name(run, capsys):
    assert evaluation.main(["task", "--checkpoint", str(run)]) == 2
    assert "trained on text, so name one: induction, " in capsys.readouterr().err
    assert evaluation.main(["task", "mqar:length=16", "--checkpoint", str(run), "--count", "4"]) == 0
    assert float(table(capsys.readouterr().out)[0][1][:-1]) < 50


def test_answers_are_counted_by_hand():
    """Four answers in two rows: two right in the first, one of two in the second; the others are not asked."""

    class Known(torch.nn.Module):
        causal, head = True, torch.nn.Linear(1, 1)

        def forward(self, inputs):
            return one_hot(inputs + 1, 6).float() * 2  # says the next number, with two more than nothing for the others

    inputs = torch.tensor([[0, 1, 2], [3, 2, 1]])
    targets = torch.tensor([[1, -100, 3], [-100, 3, 0]])
    found = answered(Known(), [(inputs[:1], targets[:1]), (inputs[1:], targets[1:])], lambda inputs: inputs + 1)
    sure = 2 - math.log(math.exp(2) + 5)
    assert found == pytest.approx({"accuracy": 3 / 4, "complete": 1 / 2, "oracle": 3 / 4, "val_loss": -sure + 2 / 4})
    with pytest.raises(ValueError, match="^batches: "):
        answered(Known(), [(inputs, torch.full_like(inputs, -100))])
    encoder = Known()
    encoder.causal = False
    with pytest.raises(ValueError, match="encoder"):
        answered(encoder, [(inputs, targets)])
