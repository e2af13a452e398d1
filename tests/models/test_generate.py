"""Decoding: greedy against recomputation, and a sampler that keeps exactly the right tokens."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from models import Config, LanguageModel
from models.generate import Sampler, generate

VOCAB = 29
GREEDY = Sampler(temperature=0)


def model(**options) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(Config.of(**dict(vocab_size=VOCAB, dim=16, heads=4, depth=2, seq_len=32) | options)).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.4)
    return made


def prompts(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


def text(made, prompt, sampler=GREEDY, new_tokens=12, **options) -> torch.Tensor:
    return torch.stack(list(generate(made, prompt, new_tokens=new_tokens, sampler=sampler, **options)), dim=1)


@pytest.mark.parametrize("options", [dict(), dict(model="gpt2"), dict(mixer="gqa:kv_heads=2,mqa", ffn="swiglu", softcap=5.0)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_greedy_is_the_argmax_of_recomputation(options, batch):
    made, prompt = model(**options), prompts(batch, 5)
    tokens = prompt
    for _ in range(12):
        tokens = torch.cat([tokens, made(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(text(made, prompt), tokens[:, 5:])
    assert len(tokens.unique()) > 3


def test_rows_of_a_batch_go_their_own_way():
    made, prompt = model(), prompts(3, 5)
    assert torch.equal(text(made, prompt), torch.cat([text(made, row[None]) for row in prompt]))


def test_same_seed_same_text():
    made, prompt = model(), prompts(2, 3)
    one, two, other = (text(made, prompt, Sampler(seed=seed)) for seed in (4, 4, 5))
    assert torch.equal(one, two) and not torch.equal(one, other)
    torch.manual_seed(99)
    assert torch.equal(text(made, prompt, Sampler(seed=4)), one)


def test_stop():
    made, prompt = model(), prompts(1, 5)
    whole = text(made, prompt)[0].tolist()
    stop = whole[5]
    assert text(made, prompt, stop=stop)[0].tolist() == whole[: whole.index(stop) + 1]


def test_stop_waits_for_every_row():
    made, prompt = model(), prompts(3, 5)
    whole = text(made, prompt, Sampler(temperature=5.0), new_tokens=100)
    stops = [token for token in range(VOCAB) if (whole == token).any(1).all()]
    firsts = torch.stack([(whole == stop).int().argmax(1) for stop in stops])  # (stops, rows)
    for stop, ends in zip(stops, firsts.amax(1).tolist(), strict=True):
        found = text(made, prompt, Sampler(temperature=5.0), new_tokens=100, stop=stop)
        assert torch.equal(found, whole[:, : ends + 1])
    assert (firsts.amin(1) < firsts.amax(1)).any()  # some rows wait for others


def test_no_new_tokens_and_no_prompt():
    assert list(generate(model(), prompts(1, 3), new_tokens=0, sampler=GREEDY)) == []
    with pytest.raises(ValueError, match="^prompt: "):
        list(generate(model(), prompts(1, 0), new_tokens=1, sampler=GREEDY))


def test_more_tokens_than_positions():
    made = model(position="learned")
    assert text(made, prompts(1, 5), new_tokens=28).shape == (1, 28)  # the last one is never read again
    with pytest.raises(ValueError, match="^tokens: 33 positions, but learned ends at 32$"):
        text(made, prompts(1, 5), new_tokens=29)


# The sampler


def expected(logits, temperature, top_k, top_p, min_p):
    """The probabilities in NumPy, one row at a time, the filters one after the other."""
    rows = []
    for row in np.asarray(logits, dtype=np.float64):
        order = np.argsort(-row, kind="stable")
        kept = list(order[:top_k]) if top_k else list(order)

        def probabilities(kept, row=row):
            p = np.zeros(len(row))
            p[kept] = np.exp((row[kept] - row[kept].max()) / temperature)
            return p / p.sum()

        p, mass, nucleus = probabilities(kept), 0.0, []
        for token in kept:
            nucleus.append(token)
            mass += p[token]
            if mass >= top_p:
                break
        p = probabilities(nucleus if top_p < 1 else kept)
        p[p < min_p * p.max()] = 0
        rows.append(p / p.sum())
    return np.stack(rows)


def distinct_logits(batch: int, seed: int) -> torch.Tensor:
    """No two alike, so that every set of likeliest tokens is clear."""
    return torch.randn(batch, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


@given(
    st.integers(0, 10**6), st.floats(0.05, 20), st.integers(0, 2 * VOCAB), st.floats(0, 1), st.floats(0, 1), st.integers(1, 3)
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_probabilities(seed, temperature, top_k, top_p, min_p, batch):
    logits = distinct_logits(batch, seed)
    exact = expected(logits.numpy(), temperature, top_k, top_p, min_p)
    close = [
        expected(logits.numpy(), temperature, top_k, min(1.0, top_p * (1 + d)), min(1.0, min_p * (1 + d)))
        for d in (-1e-4, 1e-4)
    ]
    assume(all(((p > 0) == (exact > 0)).all() for p in close))  # no token on the very edge of a set
    p = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).probabilities(logits)
    assert p.dtype == torch.float32 and np.array_equal(p.numpy() > 1e-30, exact > 1e-30)
    np.testing.assert_allclose(p.numpy(), exact, atol=1e-5)
    np.testing.assert_allclose(p.sum(-1).numpy(), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(), 4), (dict(top_k=1), 1), (dict(top_k=3), 3), (dict(top_k=99), 4), (dict(top_p=0.5), 1), (dict(top_p=0.51), 2),
        (dict(top_p=0.75), 2), (dict(top_p=0.0), 1), (dict(top_p=1.0), 4), (dict(min_p=0.5), 2), (dict(min_p=1.0), 1),
        (dict(min_p=0.2), 4),
        (dict(top_k=3, top_p=0.8), 2), (dict(top_k=2, min_p=0.4), 2),
    ],
)  # fmt: skip
def test_what_stays_of_one_half_one_quarter_and_two_eighths(options, kept):
    """Exact powers of two: a set that holds exactly top_p is enough, and of two equals one is taken."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log2() * math.log(2)
    assert (Sampler(**options).probabilities(logits) > 0).sum() == kept


def test_temperature_zero():
    logits = distinct_logits(3, 0)
    p = GREEDY.probabilities(logits)
    assert torch.equal(p.argmax(-1), logits.argmax(-1)) and p.sum() == 3 and torch.equal(GREEDY(logits), logits.argmax(-1))


@given(st.sampled_from([1e-30, 1e-6, 1e6]), st.sampled_from([1e-3, 1.0, 1e4]))
@settings(max_examples=9, deadline=None)
def test_extreme_temperatures(temperature, scale):
    logits = distinct_logits(2, 0) * scale
    p = Sampler(temperature=temperature).probabilities(logits)
    assert p.isfinite().all() and torch.equal(p.gather(-1, logits.argmax(-1, keepdim=True)), p.amax(-1, keepdim=True))
    np.testing.assert_allclose(p.sum(-1).numpy(), 1, atol=1e-5)


def test_frequencies():
    """Draws come as often as their probabilities say: within five standard deviations."""
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    counts = Sampler(seed=1)(logits).bincount(minlength=4) / 20_000
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    assert ((counts - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_half_precision_logits():
    logits = distinct_logits(2, 3).bfloat16()
    np.testing.assert_allclose(Sampler().probabilities(logits).numpy(), expected(logits.float().numpy(), 1, 0, 1, 0), atol=1e-5)


@pytest.mark.parametrize(
    "options", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=-1), dict(top_p=1.1), dict(min_p=-0.1)]
)
def test_bad_options(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))}: "):
        Sampler(**options)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(temperature, bad):
    logits = torch.tensor([[0.0, 1.0], [bad, 1.0]])
    with pytest.raises(ValueError, match="logits: not finite"):
        Sampler(temperature=temperature)(logits)
    assert Sampler(temperature=temperature)(torch.tensor([[-math.inf, 1.0]])).item() == 1
