"""The Omega rule against a loop that reads like its equations, against the delta rule and autograd; the mixer made of it."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.newton_schulz import newton_schulz
from nn.context import Context
from nn.linear_attention import LINEAR_ATTENTION
from nn.linear_attention.delta_rule import delta_rule
from nn.linear_attention.omega_rule import in_window, omega_rule, orthogonal
from nn.spec import build

CLOSE = dict(rtol=0, atol=1e-10)


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def newton_schulz_5(G):
    X = G / np.linalg.norm(G)
    for _ in range(5):
        X = 3.4445 * X - 4.7750 * X @ X.T @ X + 2.0315 * X @ X.T @ X @ X.T @ X
    return X


def by_loop(q, k, v, eta, gate, alpha, theta, M, S, document, c):
    """o of one row and head with M (V, N), as the paper has it; k, v and gate of a token of the document, or before it."""
    o, before = [], c - 1
    for t in range(len(q)):
        if t > 0 and document[t] != document[t - 1]:
            M, S = 0 * M, None if S is None else 0 * S
        gradient = 0
        for i in range(t - c + 1, t + 1):
            run = document[max(i, 0) : t + 1]
            if len(set(run)) == 1 and (i >= 0 or document[0] == document[t]):
                error = M @ k[before + i] - v[before + i]
                gradient = gradient + gate[before + i] * np.outer(error, k[before + i])
        if theta is not None:
            S = theta[t] * S + gradient
            gradient = newton_schulz_5(S)
        M = alpha[t] * M - eta[t] * gradient
        o.append(M @ q[t])
    return np.array(o), M, S


def omega_inputs(B=2, T=11, H=2, N=5, V=3, c=3, seed=0, muon=False, steep=1.0):
    past = c - 1 + T
    q, k, v = (numbers(B, times, H, n, seed=seed + i) for i, (times, n) in enumerate(((T, N), (past, N), (past, V))))
    k = nn.functional.normalize(k, dim=-1)
    eta = (0.05 if muon else 0.5) * numbers(B, T, H, seed=seed + 3).sigmoid()
    gate = numbers(B, past, H, seed=seed + 4).sigmoid()
    g = -steep * numbers(B, T, H, seed=seed + 5).abs()
    theta = numbers(B, T, H, seed=seed + 6).sigmoid() if muon else None
    M, S = numbers(B, H, N, V, seed=seed + 7), numbers(B, H, N, V, seed=seed + 8) if muon else None
    return q, k, v, eta, gate, g, theta, M, S


@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 11), st.integers(1, 2), st.integers(1, 5), st.integers(1, 4)),
    c=st.integers(1, 6), chunk=st.integers(1, 12), runs=st.integers(1, 11), steep=st.sampled_from([0.0, 1.0, 50.0]),
    muon=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_omega_rule(sizes, c, chunk, runs, steep, muon, seed):
    """For any window, chunk, decay, division into documents and first state: what the loop gives."""
    q, k, v, eta, gate, g, theta, M, S = omega_inputs(*sizes, c=c, seed=seed, muon=muon, steep=steep)
    documents = (torch.arange(sizes[1]) + torch.arange(sizes[0])[:, None]) // runs % 2
    gates = in_window(gate, c, documents)
    o, (after, momentum) = omega_rule(q, k, v, eta, gates, g, theta, initial_state=(M, S), documents=documents, chunk=chunk)
    assert (momentum is None) == (not muon)
    for b, h in product(range(sizes[0]), range(sizes[2])):
        parts = [None if x is None else x[b, :, h].numpy() for x in (q, k, v, eta, gate, g.exp(), theta)]
        first = [None if x is None else x[b, h].T.numpy() for x in (M, S)]
        expected = by_loop(*parts, *first, documents[b].tolist(), c)
        np.testing.assert_allclose(o[b, :, h], expected[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(after[b, h].T, expected[1], rtol=0, atol=1e-10)
        if muon:
            np.testing.assert_allclose(momentum[b, h].T, expected[2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_with_a_window_of_one_it_is_the_delta_rule(alpha):
    """M (a - eta k k^T) + eta v k^T is a (M - eta / a M k k^T) + ...: the gated delta rule with eta / a and values of a v."""
    q, k, v, eta, _, _, _, M, _ = omega_inputs(T=70, c=1)
    g = torch.full_like(eta, math.log(alpha))
    o, (after, _) = omega_rule(q, k, v, eta, torch.ones(*eta.shape, 1).double(), g, initial_state=(M, None))
    expected = delta_rule(q, k, alpha * v, eta / alpha, g, initial_state=M)
    for one, other in zip((o, after), expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_step_is_that_of_autograd():
    """Down the gradient of half the windowed loss, every step of it."""
    q, k, v, eta, gate, g, _, M, _ = omega_inputs(1, 6, 1, c=4)
    states = [M] + [omega_rule(q[:, :t], k[:, : t + 3], v[:, : t + 3], eta[:, :t], in_window(gate[:, : t + 3], 4), g[:, :t],
                               initial_state=(M, None))[1][0] for t in range(1, 7)]  # fmt: skip
    for t in range(6):
        W = states[t][0, 0].clone().requires_grad_()
        errors = k[0, t : t + 4, 0] @ W - v[0, t : t + 4, 0]
        (gradient,) = torch.autograd.grad((gate[0, t : t + 4, 0] * errors.square().sum(-1)).sum() / 2, W)
        torch.testing.assert_close(states[t + 1][0, 0], g[0, t, 0].exp() * W - eta[0, t, 0] * gradient, **CLOSE)


@pytest.mark.parametrize("muon", [False, True])
def test_without_steps_the_memory_is_frozen(muon):
    q, k, v, eta, gate, _, theta, M, S = omega_inputs(muon=muon)
    o, (after, _) = omega_rule(q, k, v, 0 * eta, in_window(gate, 3), None, theta, initial_state=(M, S))
    torch.testing.assert_close(after, M, **CLOSE)
    torch.testing.assert_close(o, torch.einsum("bthn,bhnv->bthv", q, M), **CLOSE)


@pytest.mark.parametrize("muon", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(muon, packed):
    """By finite differences, in chunks of two: of all that is given."""
    inputs = [x.requires_grad_() for x in omega_inputs(1, 5, 1, 3, 2, muon=muon) if x is not None]
    documents = torch.tensor([[0, 0, 1, 1, 1]]) if packed else None

    def call(q, k, v, eta, gate, g, *rest):
        theta, M, S = rest if muon else (None, *rest, None)
        gates = in_window(gate, 3, documents)
        o, after = omega_rule(q, k, v, eta, gates, g, theta, initial_state=(M, S), documents=documents, chunk=2)
        return o, *after[: 1 + muon]

    assert torch.autograd.gradcheck(call, inputs)


def test_the_gates_of_a_window():
    gate = torch.arange(1.0, 8)[None, :, None]  # two tokens from before, then five
    assert in_window(gate, 3)[0, :, 0].tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6], [5, 6, 7]]
    packed = in_window(gate, 3, torch.tensor([[0, 4, 4, 0, 0]]))[0, :, 0].tolist()
    assert packed == [[1, 2, 3], [0, 0, 4], [0, 4, 5], [0, 0, 6], [0, 6, 7]]


def test_omega_rule_refuses_what_does_not_fit():
    q, k, v, eta, gate, g, theta, M, S = omega_inputs(muon=True)
    good = dict(q=q, k=k, v=v, eta=eta, gates=in_window(gate, 3), g=g, theta=theta, initial_state=(M, S))
    for name, bad in [
        ("q", q[0]), ("k", k[:, 1:]), ("v", v[:, 1:]), ("eta", eta[..., 0]), ("gates", gate), ("g", g[:1]),
        ("theta", theta[:, 1:]), ("initial_state", (M.mT, S)), ("documents", torch.zeros(2, 3)), ("chunk", 0),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: "):
            omega_rule(**good | {name: bad})


# Newton-Schulz


@pytest.mark.parametrize("shape", [(16, 16), (16, 152), (152, 16)])
def test_newton_schulz_of_gaussian_matrices(shape):
    """Five steps: singular values within [0.68, 1.14] but for the few that began near 0, directions those of U V^T."""
    x = numbers(64, *shape)
    U, s, V = torch.linalg.svd(x, full_matrices=False)
    y = orthogonal(x)
    torch.testing.assert_close(y, newton_schulz(x, 5, torch.float64), **CLOSE)
    turned = U.mT @ y @ V.mT  # diagonal, if the directions are kept
    found = turned.diagonal(dim1=-2, dim2=-1)
    assert (turned - torch.diag_embed(found)).abs().max() < 1e-10
    sure = s / s.norm(dim=-1, keepdim=True) > 0.01
    assert sure.float().mean() > 0.95 and found[sure].min() > 0.68 and found[sure].max() < 1.14
    assert not orthogonal(torch.zeros(2, 3)).any()


# The mixer

BATCH, TIME, DIM, HEADS = 2, 21, 12, 3
SPECS = [
    "atlas:conv=0",
    "atlas:window=4:degree=3:gate=false",
    "atlas:inner=muon:window=3:head_dim=2",
    "atlas:degree=1:rate=0.5",
]


def make(spec: str) -> nn.Module:
    torch.manual_seed(0)
    mixer = build(spec, LINEAR_ATTENTION, "mixer", DIM, heads=HEADS)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def context(length: int = TIME, start: int = 0, batch: int = BATCH, **given) -> Context:
    return Context(torch.zeros(batch, length, dtype=torch.int64), torch.arange(start, start + length), **given)


def unit(x):
    return x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def equation(m, x):
    """The mixer's docstring in NumPy, for one row x (T, C)."""
    w = {name: p.detach().numpy() for name, p in m.named_parameters()}
    u = np.concatenate([x @ w[f"{name}.weight"].T for name in ("query", "key", "value")], -1)
    if m.taps is not None:
        W = w["taps"].shape[1]
        padded = np.concatenate([np.zeros((W - 1, u.shape[1])), u])
        u = np.stack([(padded[t : t + W] * w["taps"].T).sum(0) for t in range(len(x))])
    q, k, v = (part.reshape(len(x), HEADS, -1) for part in np.split(u * sigmoid(u), 3, -1))

    def features(x):
        D = x.shape[-1]
        powers = [b for b in product(range(m.degree + 1), repeat=D) if 0 < sum(b) <= m.degree]
        powers.sort(key=lambda b: (sum(b), [-p for p in b]))
        monomials = np.stack([np.prod(unit(x) ** np.array(b), -1) for b in powers], -1)
        return unit(monomials * w["coefficients"])

    q, k, c = features(q), features(k), m.window
    rate = m.rate or (0.1 if m.inner == "muon" else 1)
    eta, gate = rate * sigmoid(x @ w["beta.weight"].T), sigmoid(x @ w["keep.weight"].T)
    alpha = np.exp(-np.exp(w["A_log"]) * np.logaddexp(0, x @ w["decay.weight"].T + w["dt_bias"]))
    theta = sigmoid(x @ w["momentum.weight"].T) if m.inner == "muon" else None
    o = np.zeros(v.shape)
    for h in range(HEADS):
        M = S = np.zeros((v.shape[2], k.shape[2]))
        for t in range(len(x)):
            window = range(max(0, t - c + 1), t + 1)
            share = max(1, sum(gate[i, h] for i in window))
            G = sum(gate[i, h] / share * np.outer(M @ k[i, h] - v[i, h], k[i, h]) for i in window)
            if m.inner == "muon":
                S = theta[t, h] * S + G
                G = newton_schulz_5(S)
            M = alpha[t, h] * M - eta[t, h] * G
            o[t, h] = M @ q[t, h]
    o = (o / np.sqrt((o**2).mean(-1, keepdims=True) + 1e-5) * w["gain"]).reshape(len(x), -1)
    z = 1 if m.gate is None else x @ w["gate.weight"].T
    return (o if m.gate is None else o * z * sigmoid(z)) @ w["out.weight"].T


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_mixer_against_its_equation(spec):
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    options = dict(part.split("=") for part in spec.split(":")[1:])
    mixer.degree, mixer.rate = int(options.get("degree", 2)), float(options.get("rate", 0))
    expected = torch.from_numpy(np.stack([equation(mixer, row) for row in x.numpy()]))
    torch.testing.assert_close(mixer(x, context()), expected, **CLOSE)
    state, parts, start = mixer.init_state(BATCH, TIME, dtype=x.dtype), [], 0
    for length in (8, 0, 1, 12):
        parts.append(mixer(x[:, start : start + length], context(length, start, state=state)))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), expected, **CLOSE)


def test_features_begin_as_the_series_of_the_exponential():
    """f(q).f(k) |..| |..| = q.k + (q.k)^2 / 2 + (q.k)^3 / 6, and there are binomial(D + 3, 3) - 1 of them."""
    for degree in (1, 2, 3):
        mixer = build(f"atlas:heads=1:degree={degree}", LINEAR_ATTENTION, "mixer", 6).double()
        assert mixer.coefficients.shape == (1, math.comb(6 + degree, degree) - 1)
        q, k = (nn.functional.normalize(numbers(2, 5, 1, 6, seed=seed), dim=-1) for seed in (1, 2))
        series = lambda z: sum(z**p / math.factorial(p) for p in range(1, degree + 1))  # noqa: B023, E731
        found = (mixer.features(q) * mixer.features(k)).sum(-1)
        torch.testing.assert_close(found, series((q * k).sum(-1)) / series(1.0), rtol=0, atol=1e-5)  # lengths are 1 + 1e-6


@pytest.mark.parametrize("inner", ["gradient", "muon"])
def test_what_decoding_remembers(inner):
    """M (and S, both in float64 with muon), c - 1 keys, values and gates, and W - 1 inputs: whatever the length."""
    mixer = build(f"atlas:window=5:inner={inner}", LINEAR_ATTENTION, "mixer", 16, heads=4)  # D = 4: N = 14
    memory = {"gradient": 4, "muon": 8 * 2}[inner] * 4 * 14 * 4
    for max_len in (1, 1000):
        state = mixer.init_state(3, max_len, dtype=torch.bfloat16)
        assert state.bytes() == 3 * (memory + 4 * 4 * 4 * (4 + 4 + 1) + 2 * 3 * 48)
    assert mixer.mixing_flops(7, 7) == 7 * mixer.mixing_flops(1, 1) > 7 * 4 * (4 * 5 * 14 * 4)


@pytest.mark.parametrize("option", ["window=0", "degree=0", "degree=40", "rate=-1", "conv=1", "heads=0"])
def test_impossible_options(option):
    with pytest.raises(ValueError, match=f"^{option.partition('=')[0]}: "):
        build(f"atlas:{option}", LINEAR_ATTENTION, "mixer", 16)
