"""Disentangled attention against its formula pair by pair, and what distances alone may decide."""

import math

import pytest
import torch
from torch import Tensor

from models import Config, LanguageModel
from nn.attention import ATTENTION
from nn.context import Context
from nn.position import POSITIONS
from nn.spec import build

DIM, HEADS, TIME = 12, 3, 9


def parts(spec: str = "deberta", position: str = "relative:span=4"):
    torch.manual_seed(0)
    encoding = build(position, POSITIONS, "position", dim=DIM).double()
    mixer = build(spec, ATTENTION, "mixer", DIM, heads=HEADS, position=encoding).double()
    for module in (encoding, mixer):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return mixer, encoding


def x_of(length: int = TIME) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def context(length: int = TIME, **given) -> Context:
    return Context(torch.zeros(2, length, dtype=torch.int64), torch.arange(length), **given)


def formula(mixer, encoding, x: Tensor, causal: bool, c2p=True, p2c=True) -> Tensor:
    """Score by score, from the T x T x C tensor of distance vectors."""
    T, D = x.shape[1], DIM // HEADS
    table, half = encoding.table.weight, encoding.table.num_embeddings // 2
    heads = lambda y: y.unflatten(-1, (HEADS, D))  # noqa: E731
    q, k, v = heads(mixer.query(x)), heads(mixer.key(x)), heads(mixer.value(x))
    K_r = heads((mixer.distance_key or mixer.key)(table)) if c2p else None
    Q_r = heads((mixer.distance_query or mixer.query)(table)) if p2c else None
    y = torch.zeros_like(v)
    for b in range(len(x)):
        for h in range(HEADS):
            for i in range(T):
                scores = []
                for j in range(i + 1 if causal else T):
                    row = min(max(i - j + half, 0), 2 * half - 1)
                    score = q[b, i, h] @ k[b, j, h]
                    score = score + (q[b, i, h] @ K_r[row, h] if c2p else 0) + (k[b, j, h] @ Q_r[row, h] if p2c else 0)
                    scores.append(score / math.sqrt(D * (1 + c2p + p2c)))
                y[b, i, h] = torch.stack(scores).softmax(0) @ v[b, : len(scores), h]
    return mixer.out(y.flatten(2))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("deberta", {}), ("deberta:c2p=false", dict(c2p=False)), ("deberta:p2c=false", dict(p2c=False)),
        ("deberta:shared=true:bias=false", {}), ("deberta:c2p=false:p2c=false", dict(c2p=False, p2c=False)),
    ],
)  # fmt: skip
@torch.no_grad()
def test_formula(spec, terms, causal):
    mixer, encoding = parts(spec)
    expected = formula(mixer, encoding, x_of(), causal, **terms)
    torch.testing.assert_close(mixer(x_of(), context(causal=causal)), expected, rtol=1e-10, atol=1e-10)


def test_a_table_of_zeros_leaves_content_alone():
    mixer, encoding = parts("deberta:bias=false")
    torch.nn.init.zeros_(encoding.table.weight)
    plain, _ = parts("deberta:bias=false", "none")
    plain.load_state_dict(mixer.state_dict(), strict=False)
    plain.scale = mixer.scale
    assert mixer.scale == pytest.approx(1 / math.sqrt(3 * DIM / HEADS))
    torch.testing.assert_close(mixer(x_of(), context()), plain(x_of(), context()))


def test_only_distances_count_until_positions_are_absolute():
    for spec, moves in (("deberta", False), ("deberta:absolute=40", True)):
        mixer, _ = parts(spec)
        there = Context(torch.zeros(2, TIME, dtype=torch.int64), torch.arange(20, 20 + TIME))
        assert torch.allclose(mixer(x_of(), context()), mixer(x_of(), there)) != moves
    with pytest.raises(ValueError, match="^absolute: 40 positions"):
        mixer(x_of(), Context(torch.zeros(2, TIME, dtype=torch.int64), torch.arange(35, 35 + TIME)))


def test_gradients_reach_the_table():
    mixer, encoding = parts()
    mixer(x_of(), context()).square().sum().backward()
    for tensor in [*mixer.parameters(), encoding.table.weight]:
        assert tensor.grad is not None and tensor.grad.abs().max() > 1e-8


@torch.no_grad()
def test_a_model_with_a_table_decodes_and_packs():
    torch.manual_seed(0)
    fields = dict(vocab_size=17, dim=DIM, heads=HEADS, depth=2, stem="", mixer="deberta", position="relative:span=5")
    model = LanguageModel(Config.of(**fields)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    tokens = torch.randint(17, (2, 12))
    whole, state = model(tokens), model.init_state(2, 12)
    pieces = [model(part, state=state) for part in tokens.split([5, 1, 6], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)
    packed = model(tokens, documents=torch.tensor([[0] * 5 + [1] * 7] * 2))
    torch.testing.assert_close(packed[:, 5:], model(tokens[:, 5:]), rtol=1e-9, atol=1e-9)


def test_buckets():
    """Exact up to half of them, then growing, never beyond the last; odd around zero."""
    encoding = build("relative:span=64:buckets=16", POSITIONS, "position", dim=DIM)
    rows = encoding.rows(torch.arange(-200, 201)) - 16
    assert rows[200:209].tolist() == list(range(9)) and rows.min() >= -16 and rows.max() == 15
    assert (rows.diff() >= 0).all() and torch.equal(rows[201:264], -rows[137:200].flip(0))
    with pytest.raises(ValueError, match="^span: "):
        build("relative:span=8:buckets=16", POSITIONS, "position", dim=DIM)
