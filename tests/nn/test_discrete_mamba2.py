"""Discrete-Mamba-2: its recurrence written as a loop, as a matrix, in chunks and as Mamba-2's own operation are one."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from kernels import chunks
from kernels.ssd import ssd
from models import Config, build_model
from nn.attention import GQA
from nn.context import Context
from nn.init import INITS
from nn.spec import build
from nn.ssm import SSM

BATCH, TIME, DIM = 2, 21, 16
CLOSE = dict(rtol=0, atol=1e-10)
SPECS = ["discrete_mamba2:heads=4", "discrete_mamba2:heads=4:kv_heads=2:head_dim=3:conv=2:bias=true"]
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 9 + [2] * 7, [3] * 20 + [1]])
each = pytest.mark.parametrize("spec", SPECS)
packed = pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["alone", "packed"])


def make(spec: str) -> nn.Module:
    torch.manual_seed(0)
    mixer = build(spec, SSM, "mixer", DIM)
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def numbers(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(length: int = TIME, **given) -> Context:
    return Context(torch.zeros(BATCH, length, dtype=torch.int64), torch.arange(length), **given)


def by_loop(mixer: nn.Module, x: np.ndarray) -> np.ndarray:
    """What the class says, for the numbers x (T, C) of one text, a head and a time after the other."""
    layer = {name: value.detach().numpy() for name, value in mixer.named_parameters()}
    made = {name: x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0) for name in mixer.together}
    T, H, D, W = len(x), mixer.heads, mixer.head_dim, mixer.conv
    u = np.concatenate([made["query"], made["key"], made["value"]], 1)
    convolved = np.zeros_like(u) + layer["taps_bias"]
    for t in range(T):
        for lag in range(min(W, t + 1)):
            convolved[t] += layer["taps"][:, W - 1 - lag] * u[t - lag]
    parts = np.split(convolved, [H * D, (H + mixer.kv_heads) * D], 1)
    C, B, X = (part.reshape(T, -1, D) for part in parts)
    y = np.zeros((T, H, D))
    for h in range(H):
        shared, S = h // (H // mixer.kv_heads), np.zeros((D, D))
        for t in range(T):
            S = S / (1 + np.exp(made["decay"][t, h])) + np.outer(B[t, shared], X[t, shared])
            y[t, h] = S.T @ C[t, h] / math.sqrt(D) + layer["D"][h] * X[t, shared]
    z = made["z"]
    return (y.reshape(T, -1) * z / (1 + np.exp(-z))) @ layer["out.weight"].T + layer.get("out.bias", 0)


@each
@torch.no_grad()
def test_the_equation(spec):
    """Of a text alone, and of documents in a row, each of which begins anew."""
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    wanted = np.stack([by_loop(mixer, row) for row in x.numpy()])
    torch.testing.assert_close(mixer(x, context()), torch.from_numpy(wanted), **CLOSE)
    parts = [[by_loop(mixer, x[i, DOCUMENTS[i] == n].numpy()) for n in DOCUMENTS[i].unique_consecutive()] for i in range(BATCH)]
    wanted = np.stack([np.concatenate(row) for row in parts])
    torch.testing.assert_close(mixer(x, context(documents=DOCUMENTS)), torch.from_numpy(wanted), **CLOSE)


@each
@packed
@torch.no_grad()
def test_recurrence_matrix_and_chunks_are_one(spec, documents, monkeypatch):
    """M X, in float64, is what the mixer multiplies by its gate, whether it goes by steps, by short chunks or by one."""
    mixer, x = make(spec), numbers(BATCH, TIME, DIM)
    where = context(documents=documents)
    X, z = mixer.projected(x, where)[2], mixer.projected(x, where)[4]
    M = mixer.matrix(x, where)
    assert M.shape == (BATCH, 4, TIME, TIME) and not M.triu(1).any()
    by_matrix = mixer.out((M @ X.transpose(1, 2)).transpose(1, 2).flatten(2) * nn.functional.silu(z))
    for length in (1, 4, 64):
        monkeypatch.setattr(chunks, "chunk_length", lambda *_, length=length: length)
        torch.testing.assert_close(mixer(x, where), by_matrix, **CLOSE)
    if documents is None:
        state = mixer.init_state(BATCH, TIME, dtype=torch.float64)
        steps = [mixer(x[:, t : t + 1], Context(x, torch.arange(t, t + 1), state=state)) for t in range(TIME)]
        torch.testing.assert_close(torch.cat(steps, 1), by_matrix, **CLOSE)
    else:
        assert not M[0, :, 5:, :5].any() and M[0, :, 13, 5].all()


@each
@torch.no_grad()
def test_it_is_mamba2_with_steps_of_its_own(spec):
    """ssd with A = -1, steps softplus(decay) and inputs that are divided by them: so does the authors' code call Mamba-2's."""
    mixer, x, where = make(spec), numbers(BATCH, TIME, DIM), context(documents=DOCUMENTS)
    C, B, X, g, z = mixer.projected(x, where)
    A = -torch.ones(mixer.heads, dtype=torch.float64)
    y, _ = ssd(X / -g.unsqueeze(-1), -g, A, B, C / math.sqrt(mixer.head_dim), documents=DOCUMENTS)
    y = (y + mixer.D[:, None] * X).flatten(2)
    torch.testing.assert_close(mixer(x, where), mixer.out(y * nn.functional.silu(z)), **CLOSE)


@torch.no_grad()
def test_it_takes_the_weights_of_attention_and_begins_as_their_plain_product():
    """Convolution, gate and skip begin as nothing: without decay y_t = sum over s of (q_t . k_s / sqrt(D) + [s = t]) v_s."""
    options = dict(heads=4, kv_heads=2, head_dim=6, bias=True, out_bias=False)
    teacher, student = GQA(DIM, **options).double(), SSM["discrete_mamba2"](DIM, **options).double()
    missing = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert {name.split(".")[0] for name in missing.missing_keys} == {"decay", "z", "taps", "taps_bias", "D"}
    student.own_init()  # anew, in float64
    student.decay.weight.zero_()
    student.decay.bias.fill_(-40)
    x = numbers(BATCH, TIME, DIM)
    q, k, v = teacher.projected(x, context())
    k, v = (m.repeat_interleave(2, 2) for m in (k, v))
    weights = torch.einsum("bthd,bshd->bhts", q, k).tril() / math.sqrt(6) + torch.eye(TIME)
    y = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)
    torch.testing.assert_close(student(x, context()), teacher.out(y), **CLOSE)


def test_decays_begin_slow_whatever_the_initialisation():
    fields = dict(vocab_size=11, dim=16, heads=4, depth=2, stem="", mixer="discrete_mamba2", ffn="none", seq_len=8)
    for init in INITS:
        model = build_model(Config.of(**fields, init=init), seed=3)
        for layer in (sublayer.layer for sublayer in model.stack):
            forgotten = nn.functional.softplus(layer.decay.bias.double())
            assert forgotten.min() > 0.9e-3 and forgotten.max() < 1.1e-1 and len({*forgotten.tolist()}) == 4
            assert not layer.z.weight.any() and nn.functional.silu(layer.z.bias.double()).sub(1).abs().max() < 1e-6
            assert torch.equal(layer.taps.sum(0), torch.tensor([0.0, 0, 0, 48])) and not layer.taps_bias.any()


def test_the_state_has_one_size():
    mixer = make("discrete_mamba2:heads=4:kv_heads=2")
    for length in (1, 1000):
        assert mixer.state_bytes(1, length, torch.float32) == 4 * (3 * (4 + 2 * 2) * 4 + 4 * 4**2)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("kv_heads=3", "kv_heads: 4 "),
        ("heads=5", "heads: a dim of 16"),
        ("conv=1", "conv: 2 to 8"),
        ("head_dim=0", "head_dim: 0"),
    ],
)
def test_mistakes(options, part):
    with pytest.raises(ValueError, match=f"^{part}"):
        build(f"discrete_mamba2:{options}", SSM, "mixer", DIM, heads=4)


def test_it_looks_back_only():
    for method in ("forward", "matrix"):
        with pytest.raises(ValueError, match="^causal: "):
            getattr(make(SPECS[0]), method)(numbers(BATCH, TIME, DIM), context(causal=False))
