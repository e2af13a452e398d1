"""Distillation: each distance written out, 0 where it must be; who learns and who does not; train.py with a teacher."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import train
from models import Config, LanguageModel, build_model
from models.checkpoint import checkpoints, read_tensors
from models.distill import Distillation, matrix_of, pairs, with_teacher
from models.learn_only import learn_only
from models.linearize import linearize
from models.log import read as read_log
from models.weights import load_model, save_model
from nn.attention import GQA
from nn.context import Context
from nn.position import POSITIONS
from nn.spec import build

VOCAB, DIM, TIME = 19, 16, 11
FIELDS = dict(vocab_size=VOCAB, dim=DIM, heads=2, depth=2, seq_len=TIME, stem="", ffn="mlp:width=16", position="rope")
CLOSE = dict(rtol=0, atol=1e-10)
DOCUMENTS = torch.tensor([[0] * 4 + [1] * 7, [5] * 10 + [6], [2] * 11])


def trained(seed: int = 0, **options) -> LanguageModel:
    torch.manual_seed(seed)
    model = LanguageModel(Config.of(**FIELDS | options)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def batch(counted: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens, targets = torch.randint(VOCAB, (2, 3, TIME), generator=generator)
    return tokens, targets.where(torch.rand(3, TIME, generator=generator) < counted, -100)


# Matrices


@pytest.mark.parametrize("position", ["none", "rope", "alibi", "t5:heads=4"])
@pytest.mark.parametrize(
    "options", ["", "kv_heads=2:bias=true", "qk_norm=head:softcap=2", "window=3:global_tokens=2:sinks=true", "temperature=0.6"]
)
@torch.no_grad()
def test_the_matrix_of_attention_times_its_values_is_its_output(position, options):
    encoding = build(position, POSITIONS, "position", dim=DIM, heads=4, seq_len=TIME).double()
    torch.manual_seed(0)
    layer = build(f"gqa:heads=4:{options}".rstrip(":"), {"gqa": GQA}, "mixer", DIM, position=encoding).double()
    for parameter in [*layer.parameters(), *encoding.parameters()]:
        nn.init.normal_(parameter, std=0.6)
    x, context = torch.randn(3, TIME, DIM, dtype=torch.float64), Context(batch()[0], torch.arange(TIME), DOCUMENTS)
    weights = matrix_of(layer, x, context)
    assert weights.shape == (3, 4, TIME, TIME) and weights.dtype == torch.float64 and not weights.triu(1).any()
    if "sinks" not in options:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, TIME, dtype=torch.float64), **CLOSE)
    values = layer.projected(x, context)[2].repeat_interleave(4 // layer.kv_heads, 2).transpose(1, 2)
    y = layer.out((weights @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x, context), y, **CLOSE)


def softmax_matrix(layer: GQA, x: Tensor, context: Context) -> Tensor:
    """What plain attention says: softmax over s <= t, of the same document, of q_t . k_s / sqrt(D)."""
    q, k, _ = layer.projected(x, context)
    q, k = layer.rotate(q, context), layer.rotate(k, context)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(layer.head_dim)
    hidden = torch.ones(TIME, TIME).triu(1).bool()
    if context.documents is not None:
        hidden = (hidden | (context.documents[:, :, None] != context.documents[:, None]))[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


# The distances written out


def by_hand(model: LanguageModel, teacher: LanguageModel, tokens: Tensor, documents: Tensor | None, match: str) -> Tensor:
    """The mean over the mixers, walking the teacher's stack by hand."""
    context, found = teacher.context(tokens, documents, None), []
    x = teacher.embedding(tokens)
    for ours, theirs in zip(model.stack, teacher.stack, strict=True):
        u = theirs.norm(x)
        if theirs.is_mixer:
            if match == "matrices":
                M, A = ours.layer.matrix(u, context), softmax_matrix(theirs.layer, u, context)
                found.append((M - A).square().sum((-1, -2)).sqrt().mean())
            else:
                error = ours.layer(u, context) - theirs.layer(u, context)
                found.append(error.square().mean() if "mse" in match else error.square().sum(-1).sqrt().mean())
        x = x + theirs.layer(u, context)
    return sum(found) / len(found)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["alone", "packed"])
@pytest.mark.parametrize("match", ["matrices", "outputs", "outputs:norm=mse"])
def test_matrices_and_outputs(match, documents):
    teacher, student = trained(mixer="gqa"), trained(1, mixer="discrete_mamba2")
    tokens, targets = batch(0.5)
    counted = int((targets >= 0).sum())
    loss = Distillation(student, teacher, match)(tokens, targets, documents=documents)
    torch.testing.assert_close(loss / counted, by_hand(student, teacher, tokens, documents, match), **CLOSE)


@pytest.mark.parametrize("counted", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("options", [dict(), dict(softcap=3.0, tie=True)])
def test_logits(counted, options, monkeypatch):
    """The cross-entropy to soft labels of the tokens that count, and its gradient, however it is sliced."""
    teacher, student = trained(depth=3, mixer="gqa", **options), trained(1, mixer="gla", **options)  # of any depth
    tokens, targets = batch(counted)
    counts = targets.flatten() >= 0
    logits = student(tokens).flatten(0, 1)[counts]
    wanted = F.cross_entropy(logits, teacher(tokens).flatten(0, 1)[counts].softmax(-1).detach(), reduction="sum")
    before = torch.autograd.grad(wanted, student.parameters(), allow_unused=True)
    monkeypatch.setattr("models.distill.slices", lambda x, head: [slice(i, i + 5) for i in range(0, len(x), 5)])
    loss = Distillation(student, teacher)(tokens, targets)
    torch.testing.assert_close(loss, wanted, **CLOSE)
    loss.backward()
    for gradient, parameter in zip(before, student.parameters(), strict=True):
        if gradient is not None and counts.any():
            torch.testing.assert_close(parameter.grad, gradient, **CLOSE)


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_that_is_its_teacher(packed):
    """Its matrices and outputs differ by nothing, its cross-entropy is the entropy: the planted solution of each stage."""
    teacher, student = (trained(mixer="discrete_mamba2,gqa", norm_place="sandwich") for _ in range(2))
    (tokens, targets), documents = batch(), DOCUMENTS if packed else None
    for match in ("matrices", "outputs", "outputs:norm=mse"):
        assert Distillation(trained(mixer="discrete_mamba2,gqa", norm_place="sandwich"), teacher, match)(
            tokens, targets, documents=documents) == 0  # fmt: skip
    loss = Distillation(trained(mixer="discrete_mamba2,gqa", norm_place="sandwich"), teacher)(
        tokens, targets, documents=documents
    )
    p = teacher(tokens, documents=documents).softmax(-1)
    torch.testing.assert_close(loss, -(p * p.log()).sum(), **CLOSE)


def test_a_linear_attention_teacher_is_found_by_its_matrices():
    """Stage 1 from the teacher's embeddings and other mixers: its loss falls to where the planted weights are."""
    teacher = trained(mixer="discrete_mamba2:conv=2")
    student = linearize(trained(mixer="gqa"), "discrete_mamba2:conv=2")
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for sublayer in student.stack[::2]:  # what no matrix depends on
            sublayer.layer.z.weight.normal_()
            sublayer.layer.value.weight.normal_()
            sublayer.layer.out.weight.normal_()
    assert Distillation(student, teacher, "matrices")(*batch()) == 0
    student.stack[0].layer.decay.bias.data += 0.1
    assert Distillation(student, teacher, "matrices")(*batch()) > 1e-3


def test_documents_and_side_by_side():
    """Packed: as each document alone. A mixer beside an ffn is compared alone."""
    teacher, student = trained(mixer="gqa+mlp", ffn="none"), trained(1, mixer="discrete_mamba2+mlp", ffn="none")
    tokens, targets = batch()
    layers = pairs(student, teacher)
    assert [type(ours).__name__ for ours, _ in layers] == ["DiscreteMamba2"] * 2
    rows = [Distillation(student, teacher, "outputs")(tokens[i : i + 1, at], targets[i : i + 1, at])
            for i in range(3) for n in DOCUMENTS[i].unique() for at in [DOCUMENTS[i] == n]]  # fmt: skip
    whole = Distillation(student, teacher, "outputs")(tokens, targets, documents=DOCUMENTS)
    torch.testing.assert_close(whole, sum(rows), **CLOSE)


def test_a_hybrid_is_compared_where_it_differs():
    teacher = trained(mixer="gqa", depth=3, stem="ngram")
    student = linearize(teacher, "discrete_mamba2", layers="2")
    assert pairs(student, teacher) == [(student.stack[3].layer, teacher.stack[3].layer)]
    assert len(pairs(teacher, teacher)) == 3  # without the stem


# Who learns


@pytest.mark.parametrize("match", ["matrices", "outputs", "logits"])
def test_gradients_reach_only_what_learns(match):
    teacher = trained(mixer="gqa")
    student = linearize(teacher, "discrete_mamba2")
    learn_only(student, "*.key.*, *.layer.decay.weight")
    distillation = Distillation(student, teacher, match)
    assert {*map(id, distillation.parameters())} == {*map(id, student.parameters())}
    assert not any("aside" in name for name in distillation.state_dict())
    distillation(*batch()).backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    for name, parameter in student.named_parameters():
        learns = ".key." in name or ".decay.weight" in name
        assert parameter.requires_grad == learns == (parameter.grad is not None), name
        assert not learns or parameter.grad.abs().max() > 1e-9


def test_only():
    model = trained(mixer="gqa")
    learn_only(model, "")
    assert all(p.requires_grad for p in model.parameters())
    learn_only(model, "stack.0.layer.*,head.weight")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "head.weight", *(f"stack.0.layer.{n}.weight" for n in ("query", "key", "value", "out"))}  # fmt: skip
    with pytest.raises(ValueError, match="^only: .* 'Head.*'; there are stack.[*].layer.query.weight, "):
        learn_only(model, "head.*,Head.*")


# What does not fit


@pytest.mark.parametrize(
    ("ours", "theirs", "match", "part"),
    [
        (dict(), dict(), "matrix", "^unknown match 'matrix' .did you mean 'matrices'"),
        (dict(), dict(), "logits:norm=l2", "^match 'logits' has no option 'norm'"),
        (dict(), dict(vocab_size=20), "logits", "^teacher: a decoder of 20 ids; the model is a decoder of 19 ids"),
        (dict(), dict(objective="masked"), "logits", "^teacher: an encoder of 19 ids; the model is a decoder"),
        (dict(), dict(depth=3), "outputs", "^teacher: 6 sublayers, mixers at 1, 3, 5, width 16; the model has 4 sublayers, "),
        (dict(), dict(dim=32), "matrices", "^teacher: 4 sublayers, mixers at 1, 3, width 32; the model has"),
        (
            dict(stack="mlp gqa gqa mlp"),
            dict(),
            "outputs",
            "^teacher: 4 sublayers, mixers at 1, 3, width 16; .* at 2, 3",
        ),
        (dict(mixer="gla"), dict(), "matrices", "^match: matrices of attention .* not GLA"),
        (dict(), dict(mixer="mla"), "matrices", "^match: matrices of attention .* not MLA"),
        (dict(mixer="discrete_mamba2:heads=4"), dict(), "matrices", "^teacher: its matrices have 2 heads, the model's 4"),
    ],
)
def test_teachers_that_do_not_fit(ours, theirs, match, part):
    with pytest.raises(ValueError, match=part):
        Distillation(trained(**dict(mixer="gqa") | ours), trained(**dict(mixer="gqa") | theirs), match)


def test_nothing_that_learns_has_a_part():
    teacher = trained(mixer="gqa")
    student = linearize(teacher, "discrete_mamba2")
    learn_only(student, "*.z.*")
    with pytest.raises(ValueError, match="^only: no parameter that learns has a part in the matrices"):
        Distillation(student, teacher, "matrices")(*batch())
    with torch.no_grad():
        assert Distillation(student, teacher, "matrices")(*batch()) > 0


def test_a_config_without_a_teacher():
    model = build_model(Config.of(**FIELDS))
    assert with_teacher(model, model.config) is model
    for fields, part in ((dict(match="logits"), "^match: 'logits' needs a --teacher"),
                         (dict(teacher="x", compile=True), "^compile: ")):  # fmt: skip
        with pytest.raises(ValueError, match=part):
            with_teacher(model, Config.of(**FIELDS | fields))


# As flags of train.py

TASK = "--data task:induction:length=8:symbols=6 --steps 4 --batch-size 64 --dtype float32 --eval-every 2 --eval-tokens 64"
TASK = [*TASK.split(), "--save-every", "2"]


@pytest.fixture
def teacher(tmp_path):
    """A teacher's folder and that of its student, of a vocabulary that the task asks for."""
    fields = dict(FIELDS, vocab_size=8, seq_len=8, mixer="gqa")
    model = trained(**fields).float()
    for name, made in (("teacher", model), ("student", linearize(model, "discrete_mamba2"))):
        (tmp_path / name).mkdir()
        save_model(made, tmp_path / name)
    return tmp_path


def losses(folder) -> list[float]:
    return [record["loss"] for record in read_log(folder / "log.jsonl") if "loss" in record]


def call(folder, out: str, *flags: str) -> int:
    return train.main([*TASK, "--weights", str(folder / "student"), "--out", str(folder / out), *flags])


def test_a_run_with_a_teacher_and_its_resumption(teacher):
    """Its log begins with the distance before the first step; it saves the student alone; resumed it ends bit for bit so."""
    flags = ["--teacher", str(teacher / "teacher"), "--only", "*.key.*,*.decay.*"]
    assert call(teacher, "whole", *flags) == 0
    begun, end = load_model(teacher / "student"), checkpoints(teacher / "whole")[-1]
    tensors, first = read_tensors(end / "model.safetensors"), begun.state_dict()
    assert tensors.keys() == first.keys()
    for name, tensor in tensors.items():
        learns = ".key." in name or ".decay." in name
        assert torch.equal(tensor, first[name]) != learns, name
    shutil.copytree(teacher / "whole", teacher / "half")
    shutil.rmtree(teacher / "half" / end.name)
    assert train.main(["--resume", str(teacher / "half")]) == 0
    assert losses(teacher / "half") == losses(teacher / "whole")
    for file in ("model", "optimizer"):
        one, two = (read_tensors(checkpoints(teacher / run)[-1] / f"{file}.safetensors") for run in ("half", "whole"))
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    records = read_log(teacher / "whole" / "log.jsonl")
    assert [r["step"] for r in records if "accuracy" in r] == [2, 4, 4]
    data = train.TaskLoader(train.task_of(TASK[1]), batch_size=64, seed=0)
    inputs, targets, _ = next(data)
    with torch.no_grad():
        found = Distillation(begun, load_model(teacher / "teacher"), "logits")(inputs, targets) / (targets >= 0).sum()
    assert losses(teacher / "whole")[0] == pytest.approx(found.item(), rel=1e-5)


def test_processes_share_a_step_and_equal_one(teacher):
    """With a part of the model that the loss leaves out: no matrix depends on a gate, or on a head."""
    flags = ["--teacher", str(teacher / "teacher"), "--match", "matrices"]
    assert call(teacher, "one", *flags) == 0
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", *TASK, *flags]
    command += ["--weights", str(teacher / "student"), "--out", str(teacher / "two")]
    subprocess.run([sys.executable, *command], cwd=Path(train.__file__).parent, check=True, capture_output=True)
    assert losses(teacher / "two") == pytest.approx(losses(teacher / "one"), rel=1e-4)


def test_training_on_after_distillation_has_no_teacher_and_freezes_nothing(teacher, monkeypatch):
    model, configs = load_model(teacher / "student"), []
    model.config = replace(model.config, teacher="x", match="logits", only="*.key.*")
    save_model(model, teacher / "student")
    monkeypatch.setattr(train, "train", lambda config, resumed: configs.append(config) or 0)
    assert call(teacher, "on") == 0 and call(teacher, "on", "--only", "head.*") == 0
    assert [(c.teacher, c.match, c.only) for c in configs] == [("", "", ""), ("", "", "head.*")]


@pytest.mark.parametrize("only", ["*.key.weight", "embedding.*"])
def test_one_optimizer_may_have_nothing_to_do(only):
    model = trained(mixer="gqa")
    learn_only(model, only)
    (optimizer,) = train.build_optimizer(model.config, model).optimizers
    found = {*map(id, optimizer.param_groups[0]["params"])}
    assert found == {id(p) for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        ("--teacher nowhere", "teacher: checkpoint: there is none in 'nowhere'"),
        ("--teacher {}/no_model", "teacher: "),
        ("--teacher {}/teacher --match sums", "unknown match 'sums'"),
        ("--match logits", "match: 'logits' needs a --teacher"),
        ("--only *.keys.*", "only: no parameter that learns is called '*.keys.*'; there are embedding.weight, "),
        ("--teacher {}/teacher --match outputs --only head.*", "only: no parameter that learns has a part in the outputs"),
        ("--teacher {}/teacher --compile", "compile: not with a teacher"),
    ],
)
def test_mistakes_are_one_line(teacher, flags, part, capsys):
    (teacher / "no_model").mkdir()
    (teacher / "no_model" / "config.json").write_text("{}")
    assert call(teacher, "run", *flags.format(teacher, teacher).split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: ") and part in line and not checkpoints(teacher / "run")
