"""State space mixers against their equations written as loops, their initial values, their sizes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kernels import chunks, scan_chunks
from kernels.selective_scan import selective_scan
from kernels.ssd import ssd
from models import PRESETS, Config, LanguageModel, build_model
from models.describe import activation_bytes
from nn.context import Context
from nn.init import INITS
from nn.spec import build
from nn.ssm import SSM
from optim import split_parameters

BATCH, TIME, DIM = 2, 21, 16
CLOSE = dict(rtol=0, atol=1e-10)
SPECS = {
    "mamba": "mamba:state=3:dt_rank=2",
    "mamba, normed": "mamba:state=3:inner_norm=true:bias=true:conv_bias=false:conv=3",
    "mamba2": "mamba2:state=3:head_dim=8",
    "mamba2, groups": "mamba2:state=3:head_dim=4:groups=4:bias=true:conv_bias=false:conv=3",
    "mamba2, limits": "mamba2:state=3:head_dim=8:groups=2:dt_min=0.6:dt_max=0.9:eps=0.1",
    "s4d": "s4d:state=3",
}
each = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def make(spec: str) -> nn.Module:
    torch.manual_seed(0)
    mixer = build(spec, SSM, "mixer", DIM)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(length: int = TIME, start: int = 0, batch: int = BATCH, **given) -> Context:
    return Context(torch.zeros(batch, length, dtype=torch.int64), torch.arange(start, start + length), **given)


def decoded(mixer: nn.Module, x: Tensor, *lengths: int) -> Tensor:
    state, parts, start = mixer.init_state(len(x), x.shape[1], dtype=x.dtype), [], 0
    for length in lengths:
        parts.append(mixer(x[:, start : start + length], context(length, start, len(x), state=state)))
        start += length
    return torch.cat(parts, 1)


# The equations as loops over time, one number of the batch after the other


def softplus(x):
    return np.logaddexp(0, x)


def silu(x):
    return x / (1 + np.exp(-x))


def unit(x, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def layer(mixer: nn.Module, name: str, x):
    bias = getattr(mixer, name).bias
    return getattr(mixer, name).weight.detach().numpy() @ x + (0 if bias is None else bias.detach().numpy())


def value(mixer: nn.Module, name: str):
    parameter = getattr(mixer, name)
    return 0 if parameter is None else parameter.detach().numpy()


def mamba_step(m: nn.Module, x, recent, h):
    """One token of Mamba: algorithm 2 of the paper within its block."""
    u, z = np.split(layer(m, "up", x), 2)
    recent = np.vstack([recent[1:], u])
    u = silu((value(m, "taps") * recent.T).sum(1) + value(m, "taps_bias"))
    r, B, C = np.split(layer(m, "select", u), [m.dt_rank, m.dt_rank + m.state])
    r, B, C = (unit(v) for v in (r, B, C)) if m.inner_norm else (r, B, C)
    d = softplus(layer(m, "dt", r) + value(m, "dt_bias"))
    h = np.exp(-d[:, None] * np.exp(value(m, "A_log"))) * h + np.outer(d * u, B)
    return layer(m, "out", (h @ C + value(m, "D") * u) * silu(z)), recent, h


def s4d_step(m: nn.Module, x, recent, h):
    """The same with constants for step size, B and C."""
    u, z = np.split(layer(m, "up", x), 2)
    recent = np.vstack([recent[1:], u])
    u = silu((value(m, "taps") * recent.T).sum(1) + value(m, "taps_bias"))
    d = softplus(value(m, "dt_bias"))[:, None]
    h = np.exp(-d * np.exp(value(m, "A_log"))) * h + d * value(m, "B") * u[:, None]
    return layer(m, "out", ((h * value(m, "C")).sum(1) + value(m, "D") * u) * silu(z)), recent, h


def mamba2_step(m: nn.Module, x, recent, h):
    """One token of Mamba-2, head by head; h (H, P, N)."""
    z, u, d = np.split(layer(m, "up", x), [m.inner, m.inner + m.mixed])
    recent = np.vstack([recent[1:], u])
    u = silu((value(m, "taps") * recent.T).sum(1) + value(m, "taps_bias"))
    d = np.clip(softplus(d + value(m, "dt_bias")), m.dt_min, m.dt_max)
    X, B, C = np.split(u, [m.inner, m.inner + m.groups * m.state])
    B, C = B.reshape(m.groups, m.state), C.reshape(m.groups, m.state)
    y, h = np.zeros((m.heads, m.head_dim)), h.copy()
    for head in range(m.heads):
        group, own = head * m.groups // m.heads, X.reshape(m.heads, -1)[head]
        h[head] = np.exp(-d[head] * np.exp(value(m, "A_log")[head])) * h[head] + d[head] * np.outer(own, B[group])
        y[head] = h[head] @ C[group] + value(m, "D")[head] * own
    y = unit((y.flatten() * silu(z)).reshape(m.groups, -1), m.eps).flatten() * value(m, "gain")
    return layer(m, "out", y), recent, h


STEPS = {"mamba": mamba_step, "mamba2": mamba2_step, "s4d": s4d_step}


@each
@torch.no_grad()
def test_against_the_equations(spec):
    """Whole, one by one and in pieces: what the loop gives; and the state that is kept is the loop's."""
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    (_, before, channels), h_shape = mixer.state_shapes(1)
    expected, states = np.zeros(x.shape), []
    for row in range(BATCH):
        recent, h = np.zeros((before + 1, channels)), np.zeros(h_shape[1:])
        for t in range(TIME):
            expected[row, t], recent, h = STEPS[spec.partition(":")[0]](mixer, x[row, t].numpy(), recent, h)
        states.append((recent[1:], h))
    expected = torch.from_numpy(expected)
    torch.testing.assert_close(mixer(x, context()), expected, **CLOSE)
    for lengths in ([TIME], [1] * TIME, [8, 0, 1, 12]):
        torch.testing.assert_close(decoded(mixer, x, *lengths), expected, **CLOSE)
    state = mixer.init_state(BATCH, 1, dtype=torch.float64)
    mixer(x, context(state=state))
    torch.testing.assert_close(state.inputs, torch.from_numpy(np.stack([s[0] for s in states])), **CLOSE)
    torch.testing.assert_close(state.h, torch.from_numpy(np.stack([s[1] for s in states])), **CLOSE)


@pytest.mark.parametrize("length", [1, 2, 8, 64])
@pytest.mark.parametrize("spec", [SPECS["mamba"], SPECS["mamba2, groups"]])
def test_chunks_do_not_change_the_result(spec, length, monkeypatch):
    """Nor the gradient: the length of the chunks in which a scan works is its own affair."""
    mixer, x = make(spec), numbers(BATCH, TIME, DIM).requires_grad_()
    found = []
    for lengths in (None, length):
        if lengths is not None:
            monkeypatch.setattr(scan_chunks, "chunk_length", lambda *_: length)
            monkeypatch.setattr(chunks, "chunk_length", lambda *_: length)
        y = mixer(x, context())
        found.append([y, *torch.autograd.grad((y * numbers(*y.shape, seed=3)).sum(), [x, *mixer.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_the_dual_form():
    """y = (L o C B^T) (d x), the matrix of Dao and Gu 2024, section 3: L_ij = exp(A (d_(j+1) + … + d_i))."""
    T, H, P, N = 13, 3, 4, 5
    x, B, C = numbers(1, T, H, P), numbers(1, T, 1, N, seed=2), numbers(1, T, 1, N, seed=3)
    d, A = numbers(1, T, H, seed=4).exp(), -numbers(H, seed=5).exp()
    y, _ = ssd(x, d, A, B, C)
    for head in range(H):
        total = (d[0, :, head] * A[head]).cumsum(0)
        mask = torch.exp(total[:, None] - total).tril() * (C[0, :, 0] @ B[0, :, 0].T)  # (T, T)
        torch.testing.assert_close(y[0, :, head], mask @ (d[0, :, head, None] * x[0, :, head]), **CLOSE)


def test_impulse_response():
    """With constant step, B and C, one 1 at the start gives C exp(d A)^k d B: by the scan, and by S4D's convolution."""
    T, E, N = 12, 3, 4
    A, B, C, d = -numbers(E, N).exp(), numbers(N, seed=2), numbers(N, seed=3), numbers(E, seed=4).exp()
    u = torch.zeros(1, T, E, dtype=torch.float64)
    u[:, 0] = 1
    y, _ = selective_scan(u, d.expand(1, T, E).contiguous(), A, B.expand(1, T, N).contiguous(), C.expand(1, T, N).contiguous())
    powers = torch.stack([torch.exp(d[:, None] * A) ** k for k in range(T)])  # (T, E, N)
    torch.testing.assert_close(y[0], (powers * d[:, None] * B * C).sum(-1), **CLOSE)
    mixer = build(f"s4d:expand=1:state={N}", SSM, "mixer", E).double()
    with torch.no_grad():
        mixer.A_log.copy_((-A).log())
        mixer.B.copy_(B.expand(E, N))
        mixer.C.copy_(C.expand(E, N))
        mixer.dt_bias.copy_(torch.log(torch.expm1(d)))
        torch.testing.assert_close(mixer.convolve(u, None)[0], y, **CLOSE)


def test_a_gated_rnn_is_a_case_of_it():
    """Theorem 1 of Gu and Dao 2023: N = 1, A = -1, B = 1, zero-order hold: h_t = (1 - g_t) h_(t-1) + g_t x_t.

    The zero-order hold of B is (1 - exp(-d)) x where Euler's rule, which the scan follows, has d x: the input is rescaled.
    """
    x, logits = numbers(2, 30, 5), numbers(2, 30, 5, seed=2)
    d, one = torch.nn.functional.softplus(logits), torch.ones(2, 30, 1, dtype=torch.float64)
    y, _ = selective_scan(x * -torch.expm1(-d) / d, logits, -torch.ones(5, 1), one, one, delta_softplus=True)
    h, gate = torch.zeros(2, 5, dtype=torch.float64), torch.sigmoid(logits)
    for t in range(30):
        h = (1 - gate[:, t]) * h + gate[:, t] * x[:, t]
        torch.testing.assert_close(y[:, t], h, rtol=0, atol=1e-14)


# What is learned, how it begins, who moves it


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("mixer", ["mamba", "mamba2:state=8", "s4d", "bimamba"])
def test_initial_values(mixer, init):
    """What belongs to the equation stays whatever the initialisation of the matrices, and comes from the seed alone."""
    config = Config.of(model="mamba", vocab_size=11, depth=1, dim=1024, init=init, mixer=mixer)
    model = build_model(config, seed=3)
    torch.manual_seed(99)
    again, other = build_model(config, seed=3), build_model(config, seed=4)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for part, elsewhere in zip(model.stack[0].modules(), other.stack[0].modules(), strict=True):
        if not hasattr(part, "own_init"):
            continue
        assert not torch.equal(part.dt_bias, elsewhere.dt_bias) and not torch.equal(part.taps, elsewhere.taps)
        steps, decays = torch.nn.functional.softplus(part.dt_bias).log10(), part.A_log.exp()
        assert -3.001 < steps.min() < -2.5 and -1.5 < steps.max() < -0.999 and abs(steps.mean() + 2) < 0.25
        if mixer.startswith("mamba2"):
            assert 1 <= decays.min() < 3 and 12 < decays.max() <= 16 and abs(decays.mean() - 8.5) < 2.5
        else:
            torch.testing.assert_close(decays, torch.arange(1, 17).float().expand_as(decays))
            assert steps.max() > -1.01  # of 1024 or more, the largest is close to 0.1
        assert torch.equal(part.D, torch.ones_like(part.D)) and 0.49 < part.taps.abs().max() <= 0.5
        if hasattr(part, "dt"):
            assert 0.12 < part.dt.weight.abs().max() <= 0.125  # 1 / sqrt of the rank, 64


@pytest.mark.parametrize(
    ("mixer", "matrices"),
    [
        ("mamba", ["up.weight", "select.weight", "dt.weight", "out.weight"]),
        ("mamba2", ["up.weight", "out.weight"]), ("s4d", ["up.weight", "out.weight"]),
    ],
)  # fmt: skip
def test_what_moves_the_parameters(mixer, matrices):
    """Projections go to the optimizer of matrices; taps, A_log, D, step sizes and gains to the other, without decay."""
    split = split_parameters(LanguageModel(Config.of(model="mamba", mixer=mixer, depth=1, dim=64, vocab_size=11)))
    assert [name for name, _ in split.hidden] == [f"stack.0.layer.{name}" for name in matrices]
    moved = {name.removeprefix("stack.0.layer.") for name, _ in split.vector}
    assert {"taps", "taps_bias", "A_log", "D", "dt_bias"} <= moved


def test_both_directions():
    """An encoder's second block reads from the end, of the row and of each document; in a decoder both read ahead."""
    mixer, x = make("bimamba:state=3"), numbers(BATCH, TIME, DIM)
    back = lambda x: mixer.back(x.flip(1), context(x.shape[1])).flip(1)  # noqa: E731
    whole = lambda x: mixer.ahead(x, context(x.shape[1])) + back(x)  # noqa: E731
    torch.testing.assert_close(mixer(x, context(causal=False)), whole(x), **CLOSE)
    documents = torch.tensor([[4] * 5 + [1] * 9 + [4] * 7]).expand(BATCH, -1)
    parts = torch.cat([whole(part) for part in x.split([5, 9, 7], 1)], 1)
    torch.testing.assert_close(mixer(x, context(causal=False, documents=documents)), parts, **CLOSE)
    torch.testing.assert_close(mixer(x, context()), mixer.ahead(x, context()) + mixer.back(x, context()), **CLOSE)
    mirrored = mixer(x.flip(1), context(causal=False)).flip(1)
    assert (mirrored - whole(x)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="^causal: "):
        mixer(x, context(causal=False, state=mixer.init_state(BATCH, 1, dtype=x.dtype)))


@pytest.mark.parametrize("spec", ["mamba", "mamba2", "s4d"])
def test_no_encoder(spec):
    with pytest.raises(ValueError, match="^causal: .* an encoder takes bimamba$"):
        make(spec)(numbers(BATCH, TIME, DIM), context(causal=False))


def test_numbers_remembered():
    """(W - 1 + N) E of Mamba and S4D, (W - 1) (E + 2 G N) + E N of Mamba-2, at any length; the recurrent state in float32."""
    sizes = {
        "mamba": (3 * 32, 16 * 32), "mamba:state=5:expand=3:conv=2": (48, 5 * 48), "s4d:state=2": (3 * 32, 2 * 32),
        "mamba2:state=8:head_dim=4:groups=2": (3 * (32 + 2 * 2 * 8), 8 * 32), "bimamba:state=2": (2 * 3 * 32, 2 * 2 * 32),
    }  # fmt: skip
    for spec, (inputs, h) in sizes.items():
        mixer = make(spec)
        for length in (1, 1000):
            assert mixer.state_bytes(3, length, torch.bfloat16) == 3 * (2 * inputs + 4 * h)
            assert mixer.state_bytes(3, length, torch.float64) == 3 * 8 * (inputs + h)


def test_a_state_in_half_precision_keeps_what_it_sums():
    """2000 steps with a slow decay: the sum in bfloat16 would stop growing early on."""
    mixer, x = make("mamba2:state=3:head_dim=8").float(), numbers(1, 2000, DIM).float()
    with torch.no_grad():
        mixer.A_log.fill_(-7)
        state = mixer.init_state(1, 1, dtype=torch.bfloat16)
        for t in range(2000):
            last = mixer(x[:, t : t + 1], context(1, t, 1, state=state))
        whole = mixer(x, context(2000, batch=1))[:, -1:]
    assert (last - whole).norm() / whole.norm() < 0.02


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mixer", ["mamba", "mamba:inner_norm=true", "mamba2:groups=2:head_dim=8:dt_min=0.1", "s4d", "bimamba"])
def test_activation_bytes(mixer, dtype):
    """What `models.describe` says without running anything is what a forward pass keeps."""
    config = Config.of(model="mamba", mixer=mixer, dim=16, depth=2, vocab_size=31)
    model = LanguageModel(config).to(dtype)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    tokens = torch.zeros(1, 48, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    assert activation_bytes(config, 48, dtype) == sum(storage.nbytes() for storage in kept.values())


def mamba_count(vocab: int, depth: int, dim: int, state: int = 16) -> int:
    inner, rank = 2 * dim, math.ceil(dim / 16)
    block = dim * 2 * inner + 5 * inner + inner * (rank + 2 * state) + (rank + 1) * inner + inner * state + inner + inner * dim
    return vocab * dim + depth * (block + dim) + dim


def mamba2_count(vocab: int, depth: int, dim: int, state: int = 128) -> int:
    inner, heads = 2 * dim, dim // 32
    mixed = inner + 2 * state
    return vocab * dim + depth * (dim * (inner + mixed + heads) + 5 * mixed + 3 * heads + inner + inner * dim + dim) + dim


PUBLISHED = {
    "mamba-130m": 129_135_360, "mamba-370m": mamba_count(50280, 48, 1024), "mamba-790m": mamba_count(50280, 48, 1536),
    "mamba-1.4b": mamba_count(50280, 48, 2048), "mamba-2.8b": 2_768_345_600, "mamba2-130m": 128_989_632,
    "mamba2-370m": mamba2_count(50288, 48, 1024), "mamba2-780m": mamba2_count(50288, 48, 1536),
    "mamba2-1.3b": mamba2_count(50288, 48, 2048), "mamba2-2.7b": mamba2_count(50288, 64, 2560),
    "mamba": mamba_count(4096, 6, 256), "mamba2": mamba2_count(4096, 6, 256, 64) + 4096 * 256,
}  # fmt: skip


def test_every_preset_has_its_count():
    assert set(PUBLISHED) == {name for name in PRESETS if name.startswith("mamba")} - {"mamba2-hybrid"}
    assert PUBLISHED["mamba-130m"] == mamba_count(50280, 24, 768) and PUBLISHED["mamba-2.8b"] == mamba_count(50280, 64, 2560)
    assert PUBLISHED["mamba2-130m"] == mamba2_count(50288, 24, 768)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_of_the_presets(preset):
    with torch.device("meta"):
        model = LanguageModel(Config.of(model=preset))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[preset]
    named = {"m": 1e6, "b": 1e9}.get(preset[-1])
    assert named is None or abs(PUBLISHED[preset] / named / float(preset.rpartition("-")[2][:-1]) - 1) < 0.04


@pytest.mark.parametrize(
    ("spec", "argument"),
    [
        ("mamba:conv=1", "conv"), ("mamba:conv=9", "conv"), ("mamba:state=0", "state"), ("mamba:dt_rank=0", "dt_rank"),
        ("mamba2:head_dim=5", "head_dim"), ("mamba2:head_dim=8:groups=3", "groups"), ("mamba2:dt_min=-1", "dt_min"),
        ("mamba2:dt_min=0.5:dt_max=0.4", "dt_max"), ("mamba2:groups=0", "groups"), ("s4d:expand=0", "expand"),
        ("s4d:conv=1", "conv"), ("bimamba:state=0", "state"),
    ],
)  # fmt: skip
def test_impossible_options(spec, argument):
    with pytest.raises(ValueError, match=f"^{argument}: "):
        build(spec, SSM, "mixer", DIM)
