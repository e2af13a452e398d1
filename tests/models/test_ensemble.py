"""The mixture of experts' predictions: its formula, its limits, its causality, its decoding, and the command that judges it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from data import windows, write_shard
from data.sources import resolve
from data.token_files import open_files
from data.tokens import Tokens
from models import Config, LanguageModel
from models.ensemble import Ensemble, expert_weights, main, mixture_nats, nats_of
from models.generate import Sampler, generate
from models.score import bits_per_byte
from models.weights import save_model

VOCAB, TIME, K = 19, 13, 4


def expert(seed: int, **options) -> LanguageModel:
    torch.manual_seed(seed)
    config = dict(vocab_size=VOCAB, dim=8, heads=2, depth=1, seq_len=32, mixer="mha", stem="", position="rope", norm="rmsnorm")
    made = LanguageModel(Config.of(**config | options)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.6)
    return made.eval()


EXPERTS = [expert(seed) for seed in range(K)]


def distances(contexts) -> torch.Tensor:
    """From what stands in a context to each expert: it changes with every token, and rows differ."""
    return torch.tensor([[abs(math.sin(float(c.sum()) + 2 * len(c) + 3 * j)) + 0.01 * j for j in range(K)] for c in contexts])


def tokens(batch: int = 3, time: int = TIME, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def by_the_formula(ids, temperature: float, top_k: int, stride: int) -> torch.Tensor:
    """p (B, T, V), one position of one row at a time."""
    probabilities = [expert(ids).softmax(-1) for expert in EXPERTS]
    mixed = torch.zeros(*ids.shape, VOCAB, dtype=torch.float64)
    for b, row in enumerate(ids):
        for t in range(len(row)):
            d = distances([row[: t // stride * stride + 1]])[0].double()
            kept = sorted(range(K), key=lambda j: d[j])[:top_k]
            score = {j: math.exp(-(d[j].item() ** 2) / temperature) for j in kept}
            for j in kept:
                mixed[b, t] += score[j] / sum(score.values()) * probabilities[j][b, t]
    return mixed


# --- weights -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 6), st.integers(1, 6), st.floats(0.01, 100), st.integers(0, 999))
@settings(max_examples=80, deadline=None)
def test_weights(experts, top_k, temperature, seed):
    top_k = min(top_k, experts)
    d = torch.rand(5, 2, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    weights = expert_weights(d, temperature, top_k)
    torch.testing.assert_close(weights.sum(-1), torch.ones(5, 2, dtype=torch.float64))
    nearest = d.argsort(-1)[..., :top_k]
    allowed = torch.zeros_like(d).scatter(-1, nearest, 1)
    expected = (-(d**2) / temperature).exp() * allowed
    stable = expected.sum(-1, keepdim=True) > 1e-250
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(torch.where(stable, weights, 0), torch.where(stable, expected, 0))
    assert (weights[allowed == 0] == 0).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_limits_of_the_temperature(scale):
    """Infinity: the top_k nearest alike. Zero, and anything near it: the nearest alone."""
    d = torch.rand(7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    for top_k in range(1, K + 1):
        alike = torch.zeros_like(d).scatter(-1, d.argsort(-1)[:, :top_k], 1 / top_k)
        torch.testing.assert_close(expert_weights(d, math.inf, top_k), alike)
        torch.testing.assert_close(expert_weights(d, 1e12 * scale**2, top_k), alike)
        for cold in (0.0, 1e-300, 1e-12 * scale**2):
            assert torch.equal(expert_weights(d, cold, top_k), nn.functional.one_hot(d.argmin(-1), K).double())
    assert expert_weights(torch.ones(3, K), 0.1, 2).sum(-1).tolist() == [1, 1, 1]  # ties


# --- the mixture -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "top_k", "stride"), [(0.3, 2, 1), (1.0, 4, 5), (0.1, 3, 13), (0.5, 1, 2)])
def test_against_the_formula(temperature, top_k, stride):
    model = Ensemble(EXPERTS, distances, temperature=temperature, top_k=top_k, stride=stride)
    ids, targets = tokens(), tokens(seed=1)
    expected = by_the_formula(ids, temperature, top_k, stride)
    log_p = model(ids)
    torch.testing.assert_close(log_p.exp(), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(3, TIME, dtype=torch.float64))
    targets[0, :4] = -100
    nats = -log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(model(ids, targets), nats[targets >= 0].sum())
    torch.testing.assert_close(model(ids, last=True), log_p[:, -1:])


def test_identical_experts_are_the_dense_model():
    one = EXPERTS[0]
    model = Ensemble([one] * K, distances, top_k=3, temperature=0.3)
    ids, targets = tokens(), tokens(seed=1)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), one(ids).log_softmax(-1), rtol=0, atol=1e-12)
        torch.testing.assert_close(model(ids, targets), one(ids, targets), rtol=1e-12, atol=0)


@torch.no_grad()
def test_hot_is_the_uniform_ensemble_and_cold_is_the_nearest_expert():
    ids = tokens()
    every = torch.stack([expert(ids).softmax(-1) for expert in EXPERTS])
    hot = Ensemble(EXPERTS, distances, top_k=K, temperature=math.inf)(ids)
    torch.testing.assert_close(hot.exp(), every.mean(0))
    cold = Ensemble(EXPERTS, distances, top_k=K, temperature=0.0)(ids)
    nearest = distances([row[: t + 1] for row in ids for t in range(TIME)]).argmin(-1).view(3, TIME)
    assert len(nearest.unique()) == K
    chosen = every.permute(1, 2, 3, 0).gather(-1, nearest[..., None, None].expand(-1, -1, VOCAB, 1))[..., 0]
    torch.testing.assert_close(cold.exp(), chosen)
    torch.testing.assert_close(Ensemble(EXPERTS, distances, top_k=1)(ids), cold)


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_what_comes_later_changes_nothing(stride):
    """Each token in its turn is another: nothing before it moves, and what is from it on does."""
    model, ids = Ensemble(EXPERTS, distances, stride=stride, temperature=0.5), tokens()
    log_p = model(ids)
    for t in range(TIME):
        changed = ids.clone()
        changed[:, t] = (ids[:, t] + 1) % VOCAB
        moved = (model(changed) - log_p).abs().amax(-1)
        assert (moved[:, :t] < 1e-12).all()  # by rounding alone: an expert may read with other rows beside it
        assert (moved[:, t] > 1e-6).all()


def test_contexts_end_where_they_should():
    """At stride 4: after inputs 0, 4, 8, 12, and never further."""
    asked = []

    def spy(contexts):
        asked.extend(contexts)
        return distances(contexts)

    ids = tokens(2)
    model = Ensemble(EXPERTS, spy, stride=4)
    model(ids)
    expected = [row[: n + 1].tolist() for row in ids for n in (0, 4, 8, 12)]
    assert [c.tolist() for c in asked] == expected
    asked.clear()
    state = model.init_state(2, TIME)
    for t in range(TIME):
        model(ids[:, t : t + 1], state=state, last=True)
    assert sorted(c.tolist() for c in asked) == sorted(expected)  # in decoding too, each once


def test_an_expert_without_a_weight_does_not_read():
    """Rows go only where they have a weight; here rows 0 and 2 to expert 1, row 1 to expert 3, whatever the position."""
    read = {}

    def fixed(contexts):
        return torch.tensor([[9.0, 0, 9, 9] if c[0] % 2 == 0 else [9.0, 9, 9, 0] for c in contexts])

    ids = tokens()
    ids[:, 0] = torch.tensor([0, 1, 2])
    model = Ensemble(EXPERTS, fixed, top_k=1)
    hooks = [e.register_forward_pre_hook(lambda m, given, j=j: read.update({j: given[0]})) for j, e in enumerate(EXPERTS)]
    log_p = model(ids)
    for hook in hooks:
        hook.remove()
    assert read.keys() == {1, 3} and torch.equal(read[1], ids[[0, 2]]) and torch.equal(read[3], ids[[1]])
    with torch.no_grad():
        torch.testing.assert_close(log_p[1], EXPERTS[3](ids)[1].log_softmax(-1))


def test_packed_documents_reach_the_experts():
    ids, documents = tokens(), torch.zeros(3, TIME, dtype=torch.int64)
    documents[:, 6:] = 1
    one = EXPERTS[0]
    model = Ensemble([one] * K, distances)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, documents=documents), one(ids, documents=documents).log_softmax(-1))
        assert (model(ids, documents=documents) - model(ids)).abs().max() > 1e-3


# --- Jensen ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.floats(0.01, 10), st.integers(1, K))
@settings(max_examples=50, deadline=None)
def test_a_mixture_needs_no_more_than_its_experts_on_average(seed, temperature, top_k):
    random = torch.Generator().manual_seed(seed)
    p, d = (torch.rand(20, K, dtype=torch.float64, generator=random) for _ in range(2))
    weights = expert_weights(d, temperature, top_k)
    nats = mixture_nats(-p.log(), weights)
    torch.testing.assert_close(nats, -(weights * p).sum(-1).log())
    assert (nats <= -(weights * p.log()).sum(-1) + 1e-12).all()


def test_nats_of_an_expert_and_bits_of_the_mixture():
    """By `bits_per_byte`, and by the experts' own nats of each target: the same."""
    ids, targets = tokens(5), tokens(5, seed=1)
    targets[2, 5:] = -100
    contexts = dict(inputs=ids, targets=targets, documents=torch.zeros_like(ids))
    nats = torch.stack([nats_of(expert, contexts, 2) for expert in EXPERTS], -1)
    with torch.no_grad():
        for j, one in enumerate(EXPERTS):
            torch.testing.assert_close(nats[..., j].sum(), one(ids, targets), rtol=1e-6, atol=0)
    points = range(0, TIME, 3)
    d = distances([row[: n + 1] for row in ids for n in points]).view(5, len(points), K)
    weights = expert_weights(d.double(), 0.2, 2)[:, torch.arange(TIME) // 3]
    expected = mixture_nats(nats, weights)[targets >= 0].sum() / math.log(2) / (targets >= 0).sum()
    model = Ensemble(EXPERTS, distances, temperature=0.2, top_k=2, stride=3)
    batches = [(ids[:3], targets[:3], None), (ids[3:], targets[3:], None)]
    found = bits_per_byte(model, batches, torch.ones(VOCAB, dtype=torch.int64).numpy())
    assert math.isclose(found, expected.item(), rel_tol=1e-5)


# --- decoding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 50])
@pytest.mark.parametrize("parts", [[13], [1] * 13, [5, 1, 1, 4, 2]])
@pytest.mark.parametrize("last", [False, True])
def test_in_parts_as_in_one(stride, parts, last):
    """Also for experts that are asked late and read what they have missed."""
    model, ids = Ensemble(EXPERTS, distances, temperature=0.1, top_k=1, stride=stride), tokens()
    whole, state, at = model(ids), model.init_state(3, TIME), 0
    for size in parts:
        log_p = model(ids[:, at : at + size], state=state, last=last)
        at += size
        torch.testing.assert_close(log_p, whole[:, at - (1 if last else size) : at])
    assert state.bytes() == sum(own.bytes() for own in state.experts) > 0
    if last and stride == 50 and parts == [13]:
        lengths = [own.length for own in state.experts]
        assert set(lengths) == {0, TIME} or lengths == [TIME] * K


def test_generate():
    """Greedy text is the argmax of recomputation; of one row, one expert alone works at a time, the others lag behind."""
    model, prompt = Ensemble(EXPERTS, distances, temperature=0.2, top_k=2, stride=2), tokens(2, 5)
    said = torch.stack(list(generate(model, prompt, new_tokens=10, sampler=Sampler(temperature=0))), 1)
    ids = prompt
    for _ in range(10):
        ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(said, ids[:, 5:]) and len(said.unique()) > 3
    drawn = [torch.stack(list(generate(model, prompt, new_tokens=10, sampler=Sampler(seed=2))), 1) for _ in range(2)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], said)


def test_an_expert_that_is_never_asked_reads_nothing():
    model = Ensemble(EXPERTS, lambda contexts: torch.tensor([[1.0, 0, 2, 3]] * len(contexts)), top_k=2)
    state = model.init_state(1, TIME)
    model(tokens(1), state=state)
    assert [own.length for own in state.experts] == [TIME, TIME, 0, 0]


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (dict(top_k=0), "top_k"), (dict(top_k=K + 1), "top_k"), (dict(temperature=-0.1), "temperature"),
        (dict(temperature=math.nan), "temperature"), (dict(stride=0), "stride"), (dict(experts=[]), "experts"),
        (dict(experts=[EXPERTS[0], expert(0, vocab_size=20)]), "experts"),
        (dict(experts=[EXPERTS[0], expert(0, objective="masked")]), "experts"),
    ],
)  # fmt: skip
def test_bad_options(options, name):
    with pytest.raises(ValueError, match=f"^{name}: "):
        Ensemble(**dict(experts=EXPERTS, distances=distances) | options)


def test_distances_of_another_number_of_experts():
    with pytest.raises(ValueError, match="^distances: from 4 centres, but there are 3 experts"):
        Ensemble(EXPERTS[:3], distances)(tokens())


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path):
    """Four experts in folders, and measured contexts of 37 tokens."""
    for j, one in enumerate(EXPERTS):
        (tmp_path / str(j)).mkdir()
        save_model(one.float(), tmp_path / str(j))
        one.double()
    write_shard(tmp_path / "t.bin", tokens(1, 37)[0].numpy().astype("uint16"))
    stream = Tokens(*open_files(resolve(str(tmp_path / "t.bin")), VOCAB, VOCAB - 1))
    (batch,) = windows(stream, batch_size=9, seq_len=10)
    d = distances([row[: n + 1] for row in batch.inputs for n in (0, 4, 8)]).view(4, 3, K).double()
    sizes = torch.arange(VOCAB) % 3
    save_file(batch._asdict() | dict(distances=d, stride=torch.tensor(4), token_bytes=sizes), tmp_path / "contexts")
    return tmp_path


def test_the_command_prints_what_the_functions_give(place, capsys):
    runs = [str(place / str(j)) for j in range(K)]
    flags = ["--top-k", "1,3", "--temperature", "0.2", "--batch-size", "3", "--device", "cpu"]
    assert main([str(place / "contexts"), "--experts", ",".join(runs), *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    ids = tokens(1, 37)[0]
    inputs, targets = torch.zeros(4, 10, dtype=torch.int64), torch.full((4, 10), -100)
    for n in range(4):
        read, wanted = ids[10 * n : 10 * n + 10], ids[10 * n + 1 : 10 * n + 11]
        inputs[n, : len(read)], targets[n, : len(wanted)] = read, wanted
    sizes = (torch.arange(VOCAB) % 3).numpy()

    def bits(model) -> float:
        return bits_per_byte(model, [(inputs, targets, None)], sizes)

    options = [dict(temperature=math.inf, top_k=4), dict(temperature=0.2, top_k=1), dict(temperature=0.2, top_k=3)]
    expected = [*map(bits, EXPERTS), *(bits(Ensemble(EXPERTS, distances, stride=4, **given)) for given in options)]
    assert lines[0] == "bits per byte" and len(lines) == 8
    for line, number in zip(lines[1:], expected, strict=True):
        assert abs(float(line.split()[0]) - number) < 2e-4, line
    assert [line.split()[1] for line in lines[1:5]] == runs and "all weighed alike" in lines[5]
    assert "top 3, temperature 0.2; mean weights" in lines[7]
    shares = [int(share.strip("%,")) for share in lines[7].split()[-K:]]
    assert abs(sum(shares) - 100) <= 2


@pytest.mark.parametrize(
    ("file", "experts", "flags", "message"),
    [
        ("contexts", "0,1,2", [], "experts: 3 of them, but the contexts are measured from 4 clusters"),
        ("contexts", "0,1,2,9", [], "checkpoint: there is none in"),
        ("contexts", "0,1,2,3", ["--top-k", "5"], "top_k: 5 of 4 experts"),
        ("contexts", "0,1,2,3", ["--top-k", "two"], "top_k: whole numbers with commas between them, as 1,2,4, not 'two'"),
        ("contexts", "0,1,2,3", ["--temperature", "-1"], "temperature: -1.0"),
        ("absent", "0,1,2,3", [], "absent' is not a readable safetensors file"),
        ("0/model.safetensors", "0,1,2,3", [], "contexts: "),
        ("wordless", "0,1,2,3", [], "stand for no bytes of text"),
        ("larger", "0,1,2,3", [], "experts: they know 19 tokens, the tokenizer of the contexts 20"),
    ],
)
def test_mistakes_are_one_line_and_status_2(place, capsys, file, experts, flags, message):
    whole = load_file(place / "contexts")
    save_file(whole | dict(token_bytes=torch.zeros(VOCAB, dtype=torch.int64)), place / "wordless")
    save_file(whole | dict(token_bytes=torch.ones(VOCAB + 1, dtype=torch.int64)), place / "larger")
    runs = ",".join(str(place / run) for run in experts.split(","))
    assert main([str(place / file), "--experts", runs, "--device", "cpu", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1, err
