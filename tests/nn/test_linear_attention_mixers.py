"""Linear attention mixers against their equations, once as a loop over a state and once as a masked matrix of T x T."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kernels import chunks
from models import PRESETS, Config, LanguageModel
from nn.context import Context
from nn.linear import decode_in_half
from nn.linear_attention import LINEAR_ATTENTION, lightning
from nn.linear_attention.lightning import slopes_of
from nn.linear_attention.linear import FEATURES
from nn.position import RoPE
from nn.spec import build

BATCH, TIME, DIM, HEADS = 2, 21, 12, 3
CLOSE = dict(rtol=0, atol=1e-10)
SPECS = {
    "linear": "linear",
    "linear, relu": "linear:feature=relu",
    "linear, softmax": "linear:feature=softmax:weights=none",
    "linear, identity": "linear:feature=identity",
    "retention": "retention:eps=0.01",
    "lightning": "lightning",
    "lightning, third layer": "lightning:layer=3:layers=4:eps=0.01",
    "lightning, as released": "lightning:slopes=alibi:layer=2:layers=4",
    "cosformer2": "cosformer2:theta=100:rank=2",
    "gla": "gla:rank=5:temper=4:expand_v=2:eps=0.01",
    "hgrn2": "hgrn2:expand=5",
    "hgrn2, third layer": "hgrn2:layer=3:layers=4",
    "delta": "delta:conv=3:beta_max=2",
    "delta, bare": "delta:conv=0:gate=true:eps=0.01",
    "gated_delta": "gated_delta:expand=1",
}
each = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def make(spec: str) -> nn.Module:
    torch.manual_seed(0)
    mixer = build(spec, LINEAR_ATTENTION, "mixer", DIM, heads=HEADS, position=RoPE())
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(length: int = TIME, start: int = 0, batch: int = BATCH, **given) -> Context:
    return Context(torch.zeros(batch, length, dtype=torch.int64), torch.arange(start, start + length), **given)


def decoded(mixer: nn.Module, x: Tensor, *lengths: int) -> tuple[Tensor, object]:
    state, parts, start = mixer.init_state(len(x), x.shape[1], dtype=x.dtype), [], 0
    for length in lengths:
        parts.append(mixer(x[:, start : start + length], context(length, start, len(x), state=state)))
        start += length
    return torch.cat(parts, 1), state


# What each member makes of x (T, C): q, k (T, H, D), v (T, H, V), log decays g (T, H, D or 1), beta (T, H) or None, and
# what becomes of the o (T, H, V) that is read: the equations of the papers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.logaddexp(0, x)


def normed(x, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


class Weights:
    """A mixer's parameters in NumPy: `w("query", x)` is a layer, `w.gain` a vector; `w.heads(...)` cuts into heads."""

    def __init__(self, mixer: nn.Module):
        self.mixer = mixer

    def __call__(self, name: str, x):
        linear = getattr(self.mixer, name)
        bias = 0 if linear.bias is None else linear.bias.detach().numpy()
        return x @ linear.weight.detach().numpy().T + bias

    def __getattr__(self, name: str):
        return getattr(self.mixer, name).detach().numpy()

    def heads(self, name: str, x):
        return self(name, x).reshape(len(x), HEADS, -1)


def turned(x):
    """Rotary positions of pairs (i, i + D / 2), as complex numbers."""
    T, _, D = x.shape
    angle = np.arange(T)[:, None, None] * 10000.0 ** (-2 * np.arange(D // 2) / D)
    z = (x[..., : D // 2] + 1j * x[..., D // 2 :]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], -1)


def linear(m, w, x):
    f = {
        "elu": lambda u: np.where(u > 0, u + 1, np.exp(u)),
        "relu": lambda u: np.maximum(u, 0),
        "softmax": lambda u: np.exp(u) / np.exp(u).sum(-1, keepdims=True),
        "identity": lambda u: u,
    }[m.feature]
    q, k, v = f(w.heads("query", x)), f(w.heads("key", x)), w.heads("value", x)
    q = q / math.sqrt(q.shape[-1])
    if m.weights == "sum":
        v = np.concatenate([v, np.ones((*v.shape[:2], 1))], -1)

    def finish(o):
        if m.weights == "sum":
            o = np.divide(o[..., :-1], o[..., -1:], out=np.zeros_like(o[..., :-1]), where=o[..., -1:] > 0)
        return w("out", (normed(o) if m.weights == "rms" else o).reshape(len(x), -1))

    return q, k, v, np.zeros((len(x), HEADS, 1)), None, finish


def retention(m, w, x):
    q, k = turned(w.heads("query", x)), turned(w.heads("key", x))
    g = np.log(1 - 2.0 ** (-5 - np.arange(HEADS)))[None, :, None] + np.zeros((len(x), 1, 1))
    finish = lambda o: w("out", silu(w("gate", x)) * normed(o, m.eps).reshape(len(x), -1))  # noqa: E731
    return q / math.sqrt(q.shape[-1]), k, w.heads("value", x), g, None, finish


def released_slopes(heads: int):
    """As ALiBi has them for 3 heads: those of 2 heads, and the first of 4."""
    assert heads == 3
    return np.array([2.0**-4, 2.0**-8, 2.0**-2])


def lightning_(m, w, x):
    q, k = silu(w.heads("query", x)), silu(w.heads("key", x))
    layer = m.layer - 1
    if layer == 0:
        q, k = turned(q), turned(k)
    slopes = 8 * np.arange(1, HEADS + 1) / HEADS * (1 - layer / m.layers)
    if m.slopes == "alibi":
        slopes = released_slopes(HEADS) * (1 - layer / (m.layers - 1) + 1e-5)
    g = -slopes[None, :, None] + np.zeros((len(x), 1, 1))
    finish = lambda o: w("out", normed(o.reshape(len(x), -1), m.eps) * w("gate", x))  # noqa: E731
    return q, k, w.heads("value", x), g, None, finish


def cosformer2(m, w, x):
    """The weights of the cosines are made of complex numbers here: the real part of q k exp(i theta (t - s))."""
    q, k = silu(w.heads("query", x)), silu(w.heads("key", x))
    D = q.shape[-1]
    theta = 100.0 ** (-2 * np.arange(HEADS * D).reshape(HEADS, D) / (HEADS * D))
    phase = np.exp(1j * np.arange(len(x))[:, None, None] * theta)
    q, k = (np.concatenate([(u * phase).real, (u * phase).imag], -1) for u in (q, k))
    gate = sigmoid(w("gate_up", w("gate_down", x)))
    finish = lambda o: w("out", normed(o.reshape(len(x), -1)) * gate)  # noqa: E731
    return q, k, w.heads("value", x), np.zeros((len(x), HEADS, 1)), None, finish


def gla(m, w, x):
    q, k, v = w.heads("query", x), w.heads("key", x), w.heads("value", x)
    a = sigmoid(w("decay_up", w("decay_down", x))) ** (1 / m.temper)
    finish = lambda o: w("out", silu(w("gate", x)) * (normed(o, m.eps) * w.gain).reshape(len(x), -1))  # noqa: E731
    return q / math.sqrt(q.shape[-1]), k, v, np.log(a).reshape(k.shape), None, finish


HGRN2_BOUNDS = 0, 2 / 4  # of the first layer, and of the third of four


def hgrn2(m, w, x):
    bound = HGRN2_BOUNDS[m.bound > 0]
    f = bound + (1 - bound) * sigmoid(w.heads("forget", x))
    finish = lambda o: w("out", normed(o.reshape(len(x), -1), 1e-5) * w.gain)  # noqa: E731
    return silu(w.heads("query", x)), 1 - f, w.heads("value", x), np.log(f), None, finish


def delta(m, w, x):
    u = np.concatenate([w(name, x) for name in ("query", "key", "value")], -1)
    if m.taps is not None:
        W = w.taps.shape[1]
        padded = np.concatenate([np.zeros((W - 1, u.shape[1])), u])
        u = np.stack([(padded[t : t + W] * w.taps.T).sum(0) for t in range(len(x))])
    inner = HEADS * m.key_dim
    q, k, v = (part.reshape(len(x), HEADS, -1) for part in np.split(silu(u), [inner, 2 * inner], -1))
    q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
    g = np.zeros((len(x), HEADS))
    if m.gated:
        g = -np.exp(w.A_log) * softplus(w("decay", x) + w.dt_bias)
    gate = 1 if m.gate is None else silu(w("gate", x))
    finish = lambda o: w("out", gate * (normed(o, m.eps) * w.gain).reshape(len(x), -1))  # noqa: E731
    return q, k, v, g[..., None], m.beta_max * sigmoid(w("beta", x)), finish


EQUATIONS = {
    "linear": linear, "retention": retention, "lightning": lightning_, "cosformer2": cosformer2, "gla": gla, "hgrn2": hgrn2,
    "delta": delta, "gated_delta": delta,
}  # fmt: skip


def recurrent(q, k, v, g, beta):
    """o (T, H, V) and the last S (H, D, V)."""
    (T, H, D), V = k.shape, v.shape[-1]
    S, o = np.zeros((H, D, V)), np.zeros(v.shape)
    for t in range(T):
        for h in range(H):
            S[h] = np.exp(g[t, h])[:, None] * S[h]
            written = v[t, h] if beta is None else beta[t, h] * (v[t, h] - S[h].T @ k[t, h])
            S[h] += np.outer(k[t, h], written)
            o[t, h] = S[h].T @ q[t, h]
    return o, S


def parallel(q, k, v, g, beta):
    """The same as matrices: o = M V, of the delta rule o = M (I + tril(diag(beta) N, -1))^-1 diag(beta) V."""
    o = np.zeros(v.shape)
    for h in range(q.shape[1]):
        between = g[:, h].cumsum(0)[:, None] - g[:, h].cumsum(0)[None]  # (t, s, D or 1): the sum over s < r <= t
        keep = np.exp(np.minimum(between, 0)) * np.tril(np.ones((len(q), len(q))))[..., None]
        M = (q[:, None, h] * k[None, :, h] * keep).sum(-1)
        N = (k[:, None, h] * k[None, :, h] * keep).sum(-1)
        values = v[:, h]
        if beta is not None:
            b = beta[:, h, None]
            values = np.linalg.inv(np.eye(len(q)) + np.tril(b * N, -1)) @ (b * values)
        o[:, h] = M @ values
    return o


@each
@torch.no_grad()
def test_against_the_equations(spec):
    """As a loop, as a masked matrix, and by the mixer whole, one by one and in pieces; and the state is the loop's."""
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    looped, masked, states = [], [], []
    for row in x.numpy():
        *parts, finish = EQUATIONS[spec.partition(":")[0]](mixer, Weights(mixer), row)
        o, S = recurrent(*parts)
        looped.append(finish(o))
        masked.append(finish(parallel(*parts)))
        states.append(S)
    expected = torch.from_numpy(np.stack(looped))
    torch.testing.assert_close(torch.from_numpy(np.stack(masked)), expected, **CLOSE)
    torch.testing.assert_close(mixer(x, context()), expected, **CLOSE)
    for lengths in ([TIME], [1] * TIME, [8, 0, 1, 12]):
        found, state = decoded(mixer, x, *lengths)
        torch.testing.assert_close(found, expected, **CLOSE)
        torch.testing.assert_close(state.h, torch.from_numpy(np.stack(states)), **CLOSE)


@pytest.mark.parametrize("length", [1, 2, 8, 64])
@pytest.mark.parametrize("spec", ["linear", "lightning", "gla", "hgrn2"])
def test_chunks_do_not_change_the_result(spec, length, monkeypatch):
    """Nor the gradient: the length of the chunks in which a recurrence is computed is its own affair."""
    mixer, x, found = make(spec), numbers(BATCH, TIME, DIM).requires_grad_(), []
    for lengths in (None, length):
        if lengths is not None:
            monkeypatch.setattr(chunks, "chunk_length", lambda *_: length)
        y = mixer(x, context())
        found.append([y, *torch.autograd.grad((y * numbers(*y.shape, seed=3)).sum(), [x, *mixer.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


@pytest.mark.parametrize("spec", [name for name in LINEAR_ATTENTION if name not in ("lolcats", "atlas")])  # which have windows
def test_what_decoding_remembers(spec):
    """A matrix a head, in float32 whatever the dtype, and of the delta rule the last inputs of the convolution."""
    mixer = build(spec, LINEAR_ATTENTION, "mixer", 32, heads=4)  # D = 8
    numbers_of = {"linear": 4 * 8 * 9, "retention": 4 * 8 * 16, "cosformer2": 4 * 16 * 8, "gla": 4 * 4 * 8,
                  "gated_delta": 4 * 8 * 16}  # fmt: skip
    inputs = {"delta": 3 * 96, "gated_delta": 3 * 128}.get(spec, 0)
    for max_len in (1, 1000):
        state = mixer.init_state(3, max_len, dtype=torch.bfloat16)
        assert state.h.dtype == torch.float32 and state.inputs.dtype == torch.bfloat16
        assert state.bytes() == 3 * (4 * numbers_of.get(spec, 4 * 8 * 8) + 2 * inputs)
    assert mixer.mixing_flops(5, 5) == 2 * 5 * (mixer.passes * numbers_of.get(spec, 256) + 4 * inputs // 3)


@pytest.mark.parametrize("spec", [*LINEAR_ATTENTION, "delta:gate=true:conv=0"])
@torch.no_grad()
def test_decoding_in_half_precision(spec):
    """Layers of one input become one product: each gets its own part of it back."""
    mixer, x = make(spec).float(), numbers(1, 5, DIM).float()
    whole = mixer(x, context(5, batch=1))
    decode_in_half(mixer)
    found, _ = decoded(mixer, x, *[1] * 5)
    assert 0 < (found - whole).norm() / whole.norm() < 0.01


def test_only_linear_is_an_encoder():
    x = numbers(1, 4, DIM)
    for name in LINEAR_ATTENTION.keys() - {"linear"}:
        with pytest.raises(ValueError, match="^causal: "):
            make(name)(x, context(4, batch=1, causal=False))
    state = make("linear").init_state(1, 4, dtype=x.dtype)
    with pytest.raises(ValueError, match="^causal: "):
        make("linear")(x, context(4, batch=1, causal=False, state=state))


# Linear


@torch.no_grad()
def test_the_encoder_divides_by_the_sum_over_its_document():
    mixer, x = make("linear"), numbers(1, TIME, DIM)
    q, k, v, _, _, finish = linear(mixer, Weights(mixer), x[0].numpy())
    for documents in (None, torch.tensor([[3] * 5 + [1] * 15 + [3]])):
        same = np.ones((TIME, TIME)) if documents is None else (documents[0] == documents[0][:, None]).double().numpy()
        same[:5, 20:] = same[20:, :5] = documents is None  # equal numbers apart are two documents
        o = np.einsum("thd,shd,ts,shv->thv", q, k, same, v)
        found = mixer(x, context(batch=1, causal=False, documents=documents))
        torch.testing.assert_close(found[0], torch.from_numpy(finish(o)), **CLOSE)


@pytest.mark.parametrize("feature", ["elu", "relu", "softmax"])
@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_weights_that_sum_to_1_keep_what_is_constant(feature, causal):
    """If all tokens have the same value, so has every average; without the division it grows with what is summed."""
    mixer, x = make(f"linear:feature={feature}"), numbers(1, TIME, DIM)
    mixer.value.weight.zero_()
    mixer.value = nn.Linear(DIM, DIM).double()
    mixer.value.weight.zero_()
    q, k = (FEATURES[feature](layer(x)).view(TIME, HEADS, -1) for layer in (mixer.query, mixer.key))
    some = ((q * k).sum(-1) > 1e-3).repeat_interleave(DIM // HEADS, -1)  # (T, C): a head of relu may see nothing
    mixer.out.weight.copy_(torch.eye(DIM))
    y = mixer(x, context(batch=1, causal=causal))[0]
    torch.testing.assert_close(y[some], mixer.value.bias.expand(TIME, DIM)[some], **CLOSE)
    assert y.isfinite().all()


def test_features_that_are_all_zero_give_zero():
    mixer = make("linear:feature=relu")
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.abs_()
    x = (-numbers(1, 4, DIM).abs()).requires_grad_()
    y = mixer(x, context(4, batch=1))
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()


def test_options_that_do_not_fit():
    for spec, message in [
        ("linear:feature=identity:weights=sum", "weights"), ("lightning:layer=3:layers=2", "layers"),
        ("hgrn2:bound=1", "bound"),
        ("gla:expand_k=0.3", "expand_k"), ("gla:expand_v=0", "expand_v"), ("delta:conv=1", "conv"), ("delta:conv=9", "conv"),
        ("gla:rank=0", "rank"), ("retention:expand=0", "expand"), ("gated_delta:beta_max=-1", "beta_max"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}: "):
            make(spec)


# Decays


def test_decays_of_lightning():
    """exp(-(8 h / H) (1 - l / L)): computed by hand for two heads, in the first, the middle and the last of four layers."""
    table = torch.stack([torch.exp(-slopes_of("linear", 2, layer, 4)) for layer in (1, 3, 4)])
    by_hand = [
        [0.018315638888734, 0.000335462627903],
        [0.135335283236613, 0.018315638888734],
        [0.367879441171442, 0.135335283236613],
    ]
    torch.testing.assert_close(table, torch.tensor(by_hand, dtype=torch.float64), rtol=1e-10, atol=0)
    released = torch.stack([slopes_of("alibi", 8, layer, 3) for layer in (1, 2, 3)])
    shares = torch.tensor([[1.00001], [0.50001], [0.00001]], dtype=torch.float64)
    halves = torch.tensor([[2.0**-h for h in range(1, 9)]], dtype=torch.float64)
    torch.testing.assert_close(released, halves * shares, rtol=1e-10, atol=0)
    assert slopes_of("alibi", 8, 1, 1).equal(released[0])


@pytest.mark.parametrize("slope, sees", [(0.0, np.tril(np.ones((TIME, TIME)))), (1e4, np.eye(TIME))], ids=["none", "all"])
@torch.no_grad()
def test_without_a_decay_it_is_a_cumulative_sum_and_with_all_of_it_a_token_alone(slope, sees, monkeypatch):
    mixer, x = make("lightning:layer=2:layers=2"), numbers(1, TIME, DIM)
    monkeypatch.setattr(lightning, "slopes_of", lambda *_: torch.full((HEADS,), slope))
    monkeypatch.setattr(lightning, "rms_norm", lambda o, eps: o)
    w = Weights(mixer)
    q, k, v = silu(w.heads("query", x[0].numpy())), silu(w.heads("key", x[0].numpy())), w.heads("value", x[0].numpy())
    expected = w("out", np.einsum("thd,shd,ts,shv->thv", q, k, sees, v).reshape(TIME, -1) * w("gate", x[0].numpy()))
    torch.testing.assert_close(mixer(x, context(batch=1))[0], torch.from_numpy(expected), **CLOSE)


@torch.no_grad()
def test_open_gates_of_gla_forget_nothing():
    mixer, x = make("gla"), numbers(1, TIME, DIM)
    mixer.decay_up.weight.zero_()
    mixer.decay_up.bias.fill_(1000)
    q, k, v = (layer(x).view(1, TIME, HEADS, -1) for layer in (mixer.query, mixer.key, mixer.value))
    summed = torch.einsum("bthd,bthv->bthdv", k, v).cumsum(1)
    o = torch.einsum("bthd,bthdv->bthv", q, summed) / math.sqrt(q.shape[-1])
    o = nn.functional.rms_norm(o, o.shape[-1:], mixer.gain, 1e-5).flatten(2)
    expected = mixer.out(nn.functional.silu(mixer.gate(x)) * o)
    torch.testing.assert_close(mixer(x, context(batch=1)), expected, **CLOSE)


def test_the_bound_of_hgrn2():
    """Forget gates lie between the bound and 1, reach both, and keys are what they leave, to the last digit."""
    for layer in (1, 2, 4):
        mixer = make(f"hgrn2:layer={layer}:layers=4")
        g, k = mixer.gates(torch.linspace(-600, 600, 101, dtype=torch.float64))
        f, bound = g.exp(), (layer - 1) / 4
        assert mixer.bound == bound and f.min() >= bound and f.max() <= 1
        torch.testing.assert_close(f + k, torch.ones_like(f), **CLOSE)
        assert f[0] == pytest.approx(bound, abs=1e-12) and f[-1] == 1 and k[-1] > 0
    assert make("hgrn2:bound=0.3:layer=2:layers=4").bound == 0.3


def test_a_model_tells_its_layers_where_they_are():
    """Slopes fall and bounds rise from layer to layer, only the first layer turns, and a spec that says otherwise is obeyed."""
    fields = dict(vocab_size=11, dim=16, heads=2, depth=4, seq_len=8, stem="ngram", ffn="mlp", position="rope")
    with torch.device("meta"):
        model = LanguageModel(Config.of(mixer="lightning,hgrn2,lightning:layer=1:layers=9,hgrn2", **fields))
    layers = [s.layer for s in model.stack if s.is_mixer and hasattr(s.layer, "recall")]
    assert [layer.layer for layer in layers[:3:2]] == [1, 1] and [layer.layers for layer in layers[:3:2]] == [4, 9]
    assert [layer.bound for layer in layers[1::2]] == [0.25, 0.75]
    with torch.device("meta"):
        model = LanguageModel(Config.of(stack="(lightning sglu)*2 mlp lightning", **fields))
    layers = [s.layer for s in model.stack if s.is_mixer]
    assert [(layer.layer, layer.layers) for layer in layers] == [(1, 4), (2, 4), (4, 4)]
    assert [isinstance(layer.rotate.__self__, RoPE) for layer in layers] == [True, False, False]


@pytest.mark.parametrize("name, millions", [("transnormer-385m", 399), ("transnormer-1b", 1020)])
def test_published_sizes(name, millions):
    """Five matrices of dim x dim and three of the ffn a layer, one embedding, and nothing else: no gain, no bias."""
    config = Config.of(model=name)
    with torch.device("meta"):
        model = LanguageModel(config)
    width = int(config.ffn.partition("width=")[2])
    layer = 5 * config.dim**2 + 3 * config.dim * width
    count = sum(p.numel() for p in model.parameters())
    assert count == config.depth * layer + 64000 * config.dim and round(count / 1e6) == millions
    assert PRESETS["transnormer"]["mixer"] == config.mixer


@torch.no_grad()
def test_gated_delta_with_open_gates_is_delta():
    gated, plain, x = make("gated_delta:expand=1:gate=false"), make("delta"), numbers(1, TIME, DIM)
    plain.load_state_dict({name: value for name, value in gated.state_dict().items() if name in plain.state_dict()})
    assert (gated(x, context(batch=1)) - plain(x, context(batch=1))).abs().max() > 1e-3
    gated.A_log.fill_(-1000)
    torch.testing.assert_close(gated(x, context(batch=1)), plain(x, context(batch=1)), **CLOSE)
