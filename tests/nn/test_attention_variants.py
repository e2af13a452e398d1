"""What each variant of attention is besides a mixer: its special cases, its formulas, what it remembers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nn.attention import ATTENTION
from nn.attention import normalised as normalised_file
from nn.attention.attend import Attend
from nn.attention.visible import visible
from nn.context import Context
from nn.position import POSITIONS
from nn.position.none import NoPosition
from nn.spec import build

BATCH, TIME, DIM, HEADS = 2, 7, 16, 4
HEAD = DIM // HEADS
CLOSE = dict(rtol=0, atol=1e-10)


def make(spec: str, position: NoPosition | str = "rope") -> nn.Module:
    torch.manual_seed(0)
    position = build(position, POSITIONS, "position") if isinstance(position, str) else position
    mixer = build(spec, ATTENTION, "mixer", DIM, heads=HEADS, position=position)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(DIM))
    return mixer.double()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(length: int = TIME, start: int = 0, batch: int = BATCH, **given) -> Context:
    positions = torch.arange(start, start + length)
    return Context(torch.zeros(batch, length, dtype=torch.int64), positions, **given)


def decoded(mixer: nn.Module, x: Tensor, *lengths: int) -> Tensor:
    state, parts, start = mixer.init_state(len(x), x.shape[1], dtype=x.dtype), [], 0
    for length in lengths:
        part = x[:, start : start + length]
        parts.append(mixer(part, context(length, start, len(x), state=state)))
        start += length
    return torch.cat(parts, 1)


class Biased(NoPosition):
    """A position encoding that does all at once: it turns, has slopes, and a bias if asked."""

    def __init__(self, with_bias: bool):
        super().__init__()
        self.turn, self.with_bias = build("rope", POSITIONS, "position"), with_bias

    def rotate(self, x: Tensor, context: Context) -> Tensor:
        return self.turn.rotate(x, context)

    def slopes(self, heads: int) -> Tensor:
        return torch.linspace(0.1, 0.7, heads)

    def bias(self, context: Context, heads: int, queries: int, keys: int) -> Tensor | None:
        i, j = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
        return torch.sin((i - j).double() * torch.arange(1, heads + 1)[:, None, None])[None] if self.with_bias else None


# What a layer of gqa has of its own


@pytest.mark.parametrize("rope", ["rope:theta=900", "rope:theta=900:factor=8:original=16", "rope:theta=900:interleaved=1"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_rotary_base_of_its_own(rope, causal):
    """A layer with theta is one of a model of that base, unstretched, beside layers that keep the model's in the same call."""
    position, x, where = build(rope, POSITIONS, "position"), numbers(BATCH, TIME, DIM), context(causal=causal)
    own = "rope:theta=30" + (":interleaved=1" if "interleaved" in rope else "")
    found = [make(spec, position)(x, where) for spec in ("gqa", "gqa:theta=30", "gqa:theta=30", "gqa")]
    expected = [make("gqa", kind)(x, context(causal=causal)) for kind in (rope, own, own, rope)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("position", ["none", "alibi", "learned:seq_len=9", "sinusoidal"])
def test_a_rotary_base_needs_rope(position):
    encoding = build(position, POSITIONS, "position", dim=DIM)
    with pytest.raises(ValueError, match=f"^theta: a rotary base needs .* rope, not {type(encoding).__name__}$"):
        make("gqa:theta=30", encoding)
    with pytest.raises(ValueError, match="^theta: 0.5 is too small"):
        make("gqa:theta=0.5", "rope")


@pytest.mark.parametrize("position", ["rope", "alibi", "t5"])
@pytest.mark.parametrize("window", [1, 2, 4, TIME, 99])
@pytest.mark.parametrize("packed", [True, False])
def test_the_window_of_an_encoder(position, window, packed):
    """|i - j| < window on both sides: what a token sees, from which others change it."""
    mixer = make(f"gqa:window={window}", build(position, POSITIONS, "position", heads=HEADS))
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1]] * BATCH) if packed else None
    x = numbers(BATCH, TIME, DIM).requires_grad_()
    y = mixer(x, context(causal=False, documents=documents))
    i = torch.arange(TIME)
    near = (i[:, None] - i).abs() < window
    near = near if documents is None else near & (documents[0][:, None] == documents[0])
    for at in range(TIME):
        (gradient,) = torch.autograd.grad(y[0, at].sum(), x, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(-1) > 0, near[at])


# What a position encoding adds to the scores


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("width", [4, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_attend_against_the_equation(with_bias, width, causal, packed):
    """softmax(scale q k^T - slope |i - j| + bias) v, of the last queries, of heads wider than the kernel takes too."""
    q, k, v = numbers(2, 4, 7, width), numbers(2, 2, 7, width, seed=2), numbers(2, 2, 7, 5, seed=3)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5, 5, 5, 5, 5, 5, 2]]) if packed else None
    where, position = context(causal=causal, documents=documents), Biased(with_bias)
    attend = Attend(position, 4, 0.3)
    i, j = torch.arange(7)[:, None], torch.arange(7)
    s = 0.3 * q @ k.repeat_interleave(2, 1).mT - position.slopes(4)[:, None, None] * (i - j).abs()
    s = s + position.bias(where, 4, 7, 7) if with_bias else s
    s = s.masked_fill(i < j, -torch.inf) if causal else s
    if packed:
        s = s.masked_fill((documents[:, :, None] != documents[:, None])[:, None], -torch.inf)
    torch.testing.assert_close(attend(q, k, v, where), s.softmax(-1) @ v.repeat_interleave(2, 1), rtol=0, atol=1e-7)
    if causal and not packed:
        last = attend(q[:, :, 4:], k, v, context(3, 4))
        torch.testing.assert_close(last, attend(q, k, v, where)[:, :, 4:], rtol=0, atol=1e-7)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("spec", ["mla", "mla:kv_rank=300", "tpa", "mhe", "mhe:kind=add", "normalised:normaliser=softmax"])
def test_positions_on_the_scores_reach_every_form(spec, with_bias):
    """Decoding equals the whole, and without what stands on the scores it is another matter."""
    mixer, x = make(spec, Biased(with_bias)), numbers(BATCH, TIME, DIM)
    whole = mixer(x, context())
    torch.testing.assert_close(decoded(mixer, x, 3, 1, 3), whole, rtol=0, atol=1e-6)
    assert (make(spec, "rope")(x, context()) - whole).abs().max() > 1e-3


# MLA


@pytest.mark.parametrize("spec", ["mla", "mla:q_rank=6:kv_rank=5:nope_dim=3:rope_dim=4:value_dim=7", "mla:kv_rank=300"])
@pytest.mark.parametrize("position", ["rope", "none"])
def test_mla_absorbed_equals_materialised(spec, position):
    mixer = make(spec, position)
    q, q_rope = numbers(BATCH, TIME, HEADS, mixer.nope_dim), numbers(BATCH, TIME, HEADS, mixer.rope_dim, seed=2)
    row = numbers(BATCH, TIME, mixer.kv_rank + mixer.rope_dim, seed=3)
    whole = mixer.materialised(q, q_rope, row, context())
    torch.testing.assert_close(mixer.absorbed(q, q_rope, row, context()), whole, **CLOSE)
    torch.testing.assert_close(mixer.absorbed(q[:, 4:], q_rope[:, 4:], row, context(3, 4)), whole[:, 4:], **CLOSE)


@pytest.mark.parametrize("q_rank", [0, 6])
def test_mla_against_the_equations(q_rank):
    """Eq. 37 to 47, a head at a time, with the position turning the last numbers of queries and keys."""
    mixer, x = make(f"mla:q_rank={q_rank}:kv_rank=5:nope_dim=3:rope_dim=4:value_dim=7"), numbers(BATCH, TIME, DIM)
    norm = lambda c, gain: gain * c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt()  # noqa: E731
    turn = lambda u: build("rope", POSITIONS, "position").rotate(u[:, :, None], context())[:, :, 0]  # noqa: E731
    c, shared = norm(x @ mixer.down.weight[:5].T, mixer.norm.weight), turn(x @ mixer.down.weight[5:].T)
    source = norm(x @ mixer.query_down.weight.T, mixer.query_norm.weight) if q_rank else x
    heads = []
    for w_q, w_kv in zip(mixer.query.weight.split(3 + 4), mixer.up.weight.split(3 + 7), strict=True):
        q = torch.cat([source @ w_q[:3].T, turn(source @ w_q[3:].T)], -1)
        k, v = torch.cat([c @ w_kv[:3].T, shared], -1), c @ w_kv[3:].T
        hidden = torch.ones(TIME, TIME).triu(1).bool()
        heads.append((q @ k.mT / math.sqrt(3 + 4)).masked_fill(hidden, -torch.inf).softmax(-1) @ v)
    torch.testing.assert_close(mixer(x, context()), torch.cat(heads, -1) @ mixer.out.weight.T, **CLOSE)


def test_mla_remembers_normed_latents_and_turned_keys_only():
    mixer, x = make("mla"), numbers(BATCH, TIME, DIM)
    state = mixer.init_state(BATCH, TIME, dtype=torch.float64)
    mixer(x, context(state=state))
    latent, shared = mixer.down(x).split([mixer.kv_rank, mixer.rope_dim], -1)
    turned = build("rope", POSITIONS, "position").rotate(shared[:, :, None], context())[:, :, 0]
    torch.testing.assert_close(state.rows, torch.cat([mixer.norm(latent), turned], -1), **CLOSE)


# TPA


@pytest.mark.parametrize("groups", [HEADS, 1, 2])
@pytest.mark.parametrize("position", ["rope", "none"])
def test_tpa_with_constant_factors_is_mha_mqa_gqa(groups, position):
    """a_r = R times the indicator of the heads of group r: K = R is MHA, 1 MQA, between GQA. By either form."""
    tpa, gqa = make(f"tpa:q_rank=0:k_rank={groups}:v_rank={groups}", position), make(f"gqa:kv_heads={groups}", position)
    x = torch.cat([numbers(BATCH, TIME, DIM - 1), torch.ones(BATCH, TIME, 1)], -1).double()  # the last number carries a
    indicator = groups * torch.eye(groups).repeat_interleave(HEADS // groups, 1).double()  # (R, H)
    for name in ("key_a", "value_a"):
        weight = torch.zeros(groups * HEADS, DIM).double()
        weight[:, -1] = indicator.flatten()
        getattr(tpa, name).weight.data = weight
    for mine, theirs in (("query_b", "query"), ("key_b", "key"), ("value_b", "value"), ("out", "out")):
        getattr(tpa, mine).weight.data = getattr(gqa, theirs).weight.data
    whole = gqa(x, context())
    torch.testing.assert_close(tpa(x, context()), whole, **CLOSE)
    torch.testing.assert_close(decoded(tpa, x, 2, 1, 4), whole, **CLOSE)


def test_turning_the_factor_turns_the_queries():
    tpa, rope = make("tpa"), build("rope", POSITIONS, "position")
    a, b = numbers(BATCH, TIME, 6 * HEADS), numbers(BATCH, TIME, 6, HEAD, seed=2)
    after = rope.rotate(tpa.product(a, b), context())
    torch.testing.assert_close(tpa.product(a, rope.rotate(b, context())), after, **CLOSE)
    by_hand = sum(a[0, 3, r * HEADS + 1] * b[0, 3, r] for r in range(6)) / 6
    torch.testing.assert_close(tpa.product(a, b)[0, 3, 1], by_hand, **CLOSE)


# MHE


@pytest.mark.parametrize("kind", ["add", "mul"])
def test_mhe_parameters(kind):
    """3 n d more than one head's q, k and v; MHA has (3 n^2 - 3 n) d^2 - 3 n d more, of the same output projection."""
    count = lambda mixer: sum(p.numel() for p in mixer.parameters()) - mixer.out.weight.numel()  # noqa: E731
    mhe, n, d = count(make(f"mhe:kind={kind}")), HEADS, HEAD
    assert mhe == 3 * DIM * d + 3 * n * d
    assert count(make("mha")) - mhe == (3 * n**2 - 3 * n) * d**2 - 3 * n * d


@pytest.mark.parametrize("position", ["rope", "none"])
def test_mhe_mul_is_mha_with_scaled_projections(position):
    """W_h = diag(e_h + 1) W, since here the rows of W are the outputs."""
    mhe, mha, x = make("mhe", position), make("mha", position), numbers(BATCH, TIME, DIM)
    for name in ("query", "key", "value"):
        scales = getattr(mhe, f"{name}_heads") + 1  # (H, D)
        getattr(mha, name).weight.data = (scales[:, :, None] * getattr(mhe, name).weight).flatten(0, 1).data
    mha.out.weight.data = mhe.out.weight.data
    torch.testing.assert_close(mhe(x, context()), mha(x, context()), **CLOSE)


def test_mhe_of_one_plain_head_is_attention():
    mixer, x = make("mhe:head_dim=5", "none"), numbers(BATCH, TIME, DIM)
    for parameter in (mixer.query_heads, mixer.key_heads, mixer.value_heads):
        nn.init.zeros_(parameter)
    q, k, v = mixer.query(x), mixer.key(x), mixer.value(x)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mixer(x, context()), mixer.out(y.repeat(1, 1, HEADS)), **CLOSE)


def test_mhe_add_without_positions_ignores_key_embeddings():
    """q . e is the same for all keys: softmax takes it off. With rotary positions it is not; values gain a constant."""
    x = numbers(BATCH, TIME, DIM)
    for position, matters in (("none", False), ("rope", True)):
        mixer = make("mhe:kind=add", position)
        before = mixer(x, context())
        before.square().sum().backward()
        assert (mixer.key_heads.grad.abs().max() > 1e-3) == matters and (mixer.key_heads.grad.abs().max() < 1e-12) != matters
        mixer.key_heads.data += numbers(HEADS, HEAD, seed=5)
        assert ((mixer(x, context()) - before).abs().max() > 1e-3) == matters
    before, shift = mixer(x, context()), numbers(HEADS, HEAD, seed=6)
    mixer.value_heads.data += shift
    constant = mixer.out(shift.flatten()).expand_as(before)
    torch.testing.assert_close(mixer(x, context()) - before, constant, **CLOSE)


# Other normalisers


def scores_and_seen(seed: int = 1, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    return scale * numbers(BATCH, HEADS, TIME, TIME, seed=seed), visible(context(), TIME, TIME)[:, None]


@pytest.mark.parametrize("position", ["rope", "none"])
def test_softmax_of_scores_is_attention(position):
    mine, mha, x = make("normalised:normaliser=softmax", position), make("mha", position), numbers(BATCH, TIME, DIM)
    mha.load_state_dict(mine.state_dict())
    torch.testing.assert_close(mine(x, context()), mha(x, context()), **CLOSE)
    q, k, v = (numbers(BATCH, HEADS, TIME, HEAD, seed=s) for s in (1, 2, 3))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(mine.mix(q, k, v, visible(context(), TIME, TIME)[:, None], None), fused, **CLOSE)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("normaliser", ["softmax", "softplus", "sigmoid", "relu"])
def test_weights_against_the_equations(normaliser, scaled):
    """Row by row: over the keys that a query sees, with n of them."""
    mixer = make(f"normalised:normaliser={normaliser}:length_scale={str(scaled).lower()}")
    scores, seen = scores_and_seen(scale=3)
    weights = mixer.weights(scores, seen)
    for t in range(TIME):
        n = t + 1
        s = scores[:, :, t, :n] * (math.log(HEAD) * math.log(n) if scaled else 1) / math.sqrt(HEAD)
        a = {
            "softmax": lambda s: s.exp() / s.exp().sum(-1, keepdim=True),
            "softplus": lambda s: (1 + s.exp()).log() / (1 + s.exp()).log().sum(-1, keepdim=True),
            "sigmoid": lambda s, n=n: 1 / (1 + n * (-s).exp()),
            "relu": lambda s, n=n: s.clamp(min=0) / n,
        }[normaliser](s)
        torch.testing.assert_close(weights[:, :, t, :n], a, **CLOSE)
        assert not weights[:, :, t, n:].any()


@pytest.mark.parametrize("more", ["", ":power=15:offset=0.9"])
@pytest.mark.parametrize("normaliser", ["softmax", "softplus"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_rows_sum_to_one_whatever_the_scores(normaliser, more, scale):
    """Also in float32, at scores of 1e4 of both signs, where softplus of a whole row would underflow."""
    mixer, (scores, seen) = make(f"normalised:normaliser={normaliser}{more}"), scores_and_seen(scale=scale)
    for given in (scores, -scores.abs(), scores.abs()):
        given = given.float().requires_grad_()
        weights = mixer.weights(given, seen)
        torch.testing.assert_close(weights.sum(-1), torch.ones(BATCH, HEADS, TIME), rtol=0, atol=1e-5)
        assert weights.isfinite().all() and weights.min() >= 0 and not weights[..., ~seen[0, 0]].any()
        (weights * numbers(*weights.shape).float()).sum().backward()
        assert given.grad.isfinite().all()


def test_reweighting():
    """p = 1, o = 0 changes nothing; weights up to o / n vanish; a high power leaves the largest; the formula itself."""
    scores, seen = scores_and_seen(scale=3)
    plain = make("normalised")
    a, n = plain.weights(scores, seen), seen.sum(-1, keepdim=True).double()
    assert torch.equal(plain.reweighted(a, n), a)
    plain.offset = 1e-300  # the long way
    torch.testing.assert_close(plain.reweighted(a, n), a, **CLOSE)
    sharp = make("normalised:power=3:offset=0.5").weights(scores, seen)
    assert torch.equal(sharp == 0, a <= 0.5 / n) and ((sharp == 0) & seen).any()
    by_hand = (n * a - 0.5).clamp(min=0) ** 3
    torch.testing.assert_close(sharp, by_hand / by_hand.sum(-1, keepdim=True), **CLOSE)
    best = make("normalised:power=2000").weights(scores, seen)
    torch.testing.assert_close(best, F.one_hot(a.argmax(-1), TIME).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("spec", ["normalised", "normalised:normaliser=sigmoid"])
def test_blocks_of_queries_change_nothing(spec, monkeypatch):
    """Neither the output nor the gradients, which are worked out again."""
    mixer, x = make(spec, Biased(True)), numbers(BATCH, TIME, DIM).requires_grad_()
    results = []
    for size in (128, 3):
        monkeypatch.setattr(normalised_file, "QUERY_BLOCK", size)
        y = mixer(x, context())
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *mixer.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# What decoding remembers


def test_numbers_remembered_of_each_token():
    """At 32 heads of 128, dim 4096: the published formulas."""
    h, d, r = 32, 128, 512
    table = {
        "mha": 2 * h * d,
        "gqa:kv_heads=8": 2 * 8 * d,
        "mqa": 2 * d,
        "mla:kv_rank=512:rope_dim=64:nope_dim=128:value_dim=128": r + 64,
        "mla": 9 * d // 2,
        "tpa": (2 + 2) * (h + d),
        "tpa:k_rank=1:v_rank=3:q_rank=0": (1 + 3) * (h + d),
        "mhe": 2 * d,
        "normalised": 2 * h * d,
    }
    for spec, each in table.items():
        with torch.device("meta"):
            mixer = build(spec, ATTENTION, "mixer", 4096, heads=h)
        for batch, length, dtype in ((1, 1, torch.float32), (3, 100, torch.bfloat16)):
            assert mixer.state_bytes(batch, length, dtype) == each * batch * length * dtype.itemsize, spec
            state = mixer.init_state(batch, length, dtype=dtype, device="meta")
            assert state.bytes() == each * batch * length * dtype.itemsize, spec


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("mla:kv_rank=0", "kv_rank"), ("mla:q_rank=-1", "q_rank"), ("mla:rope_dim=0", "rope_dim"), ("mla:heads=3", "heads"),
        ("tpa:k_rank=0", "k_rank"), ("tpa:v_rank=0", "v_rank"), ("tpa:heads=3", "heads"), ("mhe:heads=3", "heads"),
        ("normalised:heads=3", "heads"), ("normalised:offset=1", "offset"), ("normalised:offset=-0.1", "offset"),
        ("normalised:power=0.5", "power"), ("normalised:power=inf", "power"), ("normalised:normaliser=relu:power=2", "power"),
        ("normalised:normaliser=sigmoid:offset=0.5", "offset"),
    ],
)  # fmt: skip
def test_impossible_options(spec, argument):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        build(spec, ATTENTION, "mixer", DIM, **({} if ":heads" in spec else {"heads": HEADS}))
