"""LoLCATs' mixer against its equation, written as loops, and where it is softmax attention or linear attention exactly."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import Config, build_model
from nn.attention import GQA
from nn.context import Context
from nn.linear_attention import LolCats, lolcats
from nn.position import ALiBi, NoPosition, RoPE
from optim import split_parameters

BATCH, TIME, DIM, HEADS = 2, 21, 12, 3
CLOSE = dict(rtol=0, atol=1e-12)


def make(window: int, position: NoPosition | None = None, **options) -> LolCats:
    torch.manual_seed(0)
    mixer = LolCats(DIM, position, **dict(heads=HEADS, window=window) | options).double()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.6)
    return mixer


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


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def turned(x):
    """Rotary positions of pairs (i, i + D / 2), as complex numbers, of x (T, heads, D)."""
    T, _, D = x.shape
    z = x[..., : D // 2] + 1j * x[..., D // 2 :]
    z = z * np.exp(1j * np.arange(T)[:, None, None] * 10000.0 ** (-2 * np.arange(D // 2) / D))
    return np.concatenate([z.real, z.imag], -1)


def naive(mixer: LolCats, x: np.ndarray, *, rotate: bool, slopes=(0,) * 4) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (T, C) and the weights (H, T, T) of the equation, one query and one key after the other."""
    w = {name: tensor.detach().numpy() for name, tensor in mixer.state_dict().items()}
    D, H, T = mixer.head_dim, mixer.heads, len(x)
    q, k, v = ((x @ w[f"{name}.weight"].T).reshape(T, -1, D) for name in ("query", "key", "value"))
    if rotate:
        q, k = turned(q), turned(k)
    y, weights = np.zeros((T, H, D)), np.zeros((H, T, T))
    for h in range(H):
        shared = h * k.shape[1] // H

        def feature(u, name, h=h):
            z = u @ w[f"{name}_map"][h] + w[f"{name}_shift"][h]
            return np.maximum(z, 0) if mixer.feature == "t2r" else np.concatenate([softmax(z), softmax(-z)])

        g = 1 / (1 + np.exp(-w["mix"][h])) if mixer.window else 0
        for n in range(T):
            score = {
                i: q[n, h] @ k[i, shared] / math.sqrt(D) - slopes[h] * (n - i) for i in range(n + 1) if n - i < mixer.window
            }
            highest = max(score.values(), default=0)
            for i in range(n + 1):
                if i in score:
                    weights[h, n, i] = g * np.exp(score[i] - highest)
                else:
                    weights[h, n, i] = feature(q[n, h], "query") @ feature(k[i, shared], "key")
            weights[h, n] /= weights[h, n].sum() or 1
            y[n, h] = weights[h, n] @ v[:, shared]
    return y.reshape(T, -1) @ w["out.weight"].T, weights


@pytest.mark.parametrize("window", [0, 1, 2, 6, TIME - 1, TIME, TIME + 5])
@pytest.mark.parametrize("options", [{}, dict(feature="t2r"), dict(width=5), dict(heads=4, kv_heads=2, head_dim=6)], ids=str)
@torch.no_grad()
def test_against_the_equation(window, options):
    """Whole, one by one and in pieces, with rotary positions."""
    mixer, x = make(window, RoPE(), **options), numbers(BATCH, TIME, DIM)
    expected, weights = (
        torch.from_numpy(np.stack(u)) for u in zip(*(naive(mixer, row, rotate=True) for row in x.numpy()), strict=True)
    )
    torch.testing.assert_close(mixer(x, context()), expected, **CLOSE)
    torch.testing.assert_close(mixer.matrix(x, context()), weights, **CLOSE)
    for lengths in ([TIME], [1] * TIME, [0, 8, 0, 1, 12]):
        torch.testing.assert_close(decoded(mixer, x, *lengths)[0], expected, **CLOSE)


@torch.no_grad()
def test_a_bias_by_distance_counts_in_the_window():
    mixer, x = make(6, ALiBi()), numbers(BATCH, TIME, DIM)
    slopes = [2.0**-4, 2.0**-8, 2.0**-2]  # as ALiBi has them for 3 heads: those of 2, and the first of 4
    expected = torch.from_numpy(np.stack([naive(mixer, row, rotate=False, slopes=slopes)[0] for row in x.numpy()]))
    torch.testing.assert_close(mixer(x, context()), expected, **CLOSE)


@pytest.mark.parametrize("window", [0, 1, 6])
@torch.no_grad()
def test_documents(window):
    """Of lengths below, at and above the window; equal numbers apart are two documents."""
    mixer, x, lengths = make(window), numbers(1, TIME, DIM), [1, 6, 7, 5, 2]
    documents = torch.repeat_interleave(torch.tensor([4, 2, 4, 0, 4]), torch.tensor(lengths))[None]
    found = mixer(x, context(batch=1, documents=documents))
    parts = [naive(mixer, part.numpy(), rotate=False)[0] for part in x[0].split(lengths)]
    torch.testing.assert_close(found[0], torch.from_numpy(np.concatenate(parts)), **CLOSE)


@pytest.mark.parametrize("mix", [-80.0, -2.0, 0.0, 5.0, 80.0])
@torch.no_grad()
def test_a_window_over_all_is_softmax_attention(mix):
    """Whatever g; and in a longer text the first `window` tokens have it too. PyTorch's own function is the witness."""
    x = numbers(BATCH, TIME, DIM)
    for window in (TIME + 9, TIME, 8):
        mixer = make(window, kv_heads=1)
        mixer.mix.fill_(mix)
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        expected, length = mixer.out(y.transpose(1, 2).flatten(2)), min(window, TIME)
        found = mixer(x, context())
        torch.testing.assert_close(found[:, :length], expected[:, :length], rtol=0, atol=1e-14)
        assert window == TIME + 9 or window == TIME or (found - expected)[:, length:].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("options", [dict(qk_norm="head", bias=True), dict(qk_norm="all", kv_heads=1), dict(qk_norm="unit")])
@torch.no_grad()
def test_the_weights_of_gqa_fit(options):
    """All of them, under the same names; and with them it is the same function up to the window."""
    torch.manual_seed(0)
    theirs = GQA(DIM, RoPE(), heads=HEADS, **options).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.6)
    for window in (TIME, 9):
        ours = LolCats(DIM, RoPE(), heads=HEADS, window=window, **options).double()
        missing = ours.load_state_dict(theirs.state_dict(), strict=False)
        assert not missing.unexpected_keys
        assert {*missing.missing_keys} == {"query_map", "query_shift", "key_map", "key_shift", "mix"}
        x = numbers(BATCH, TIME, DIM)
        found, expected = ours(x, context()), theirs(x, context())
        torch.testing.assert_close(found[:, :window], expected[:, :window], rtol=0, atol=1e-14)


@torch.no_grad()
def test_no_window_is_a_running_state():
    """S_n = S_{n-1} + f'(k_n) [v_n, 1]^T, and nothing else is remembered."""
    mixer, x = make(0), numbers(BATCH, TIME, DIM)
    assert mixer.mix is None
    q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (mixer.query, mixer.key, mixer.value))
    q, k = mixer.mapped(q, mixer.query_map, mixer.query_shift), mixer.mapped(k, mixer.key_map, mixer.key_shift)
    S, z, outs = 0, 0, []
    for n in range(TIME):
        S, z = S + k[:, :, n, :, None] * v[:, :, n, None], z + k[:, :, n]
        outs.append((q[:, :, n, :, None] * S).sum(2) / (q[:, :, n] * z).sum(-1, keepdim=True))
    found, state = decoded(mixer, x, 5, 1, 15)
    torch.testing.assert_close(found, mixer.out(torch.stack(outs, 1).flatten(2)), **CLOSE)
    torch.testing.assert_close(state.h, torch.cat([S, z[..., None]], -1), **CLOSE)


@torch.no_grad()
def test_the_state_holds_what_the_window_left():
    mixer, x = make(4), numbers(BATCH, TIME, DIM)
    _, state = decoded(mixer, x, 2, 9, 1)
    k, v = (layer(x[:, :12]).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (mixer.key, mixer.value))
    torch.testing.assert_close(state.recent.keys, k[:, :, 8:], **CLOSE)
    torch.testing.assert_close(state.recent.values, v[:, :, 8:], **CLOSE)
    gone = mixer.mapped(k[:, :, :8], mixer.key_map, mixer.key_shift)
    torch.testing.assert_close(state.h, gone.mT @ F.pad(v[:, :, :8], (0, 1), value=1.0), **CLOSE)


def test_what_decoding_remembers():
    mixer = LolCats(32, heads=4, kv_heads=2, window=16)  # D = 8, F = 16
    for max_len in (16, 1000, 100_000):
        state = mixer.init_state(3, max_len, dtype=torch.bfloat16)
        assert state.h.dtype == torch.float32 and state.recent.keys.dtype == torch.bfloat16
        assert state.bytes() == 3 * (2 * 2 * 16 * 2 * 8 + 4 * 4 * 16 * 9)


def test_the_length_of_blocks_changes_nothing(monkeypatch):
    """Neither the output nor a gradient."""
    mixer, x, found = make(5, RoPE()), numbers(BATCH, TIME, DIM).requires_grad_(), []
    for block in (128, 4, 1):
        monkeypatch.setattr(lolcats, "BLOCK", block)
        y = mixer(x, context())
        torch.testing.assert_close(mixer.matrix(x, context()).sum(-1), torch.ones(BATCH, HEADS, TIME).double(), **CLOSE)
        found.append([y, *torch.autograd.grad((y * numbers(*y.shape, seed=3)).sum(), [x, *mixer.parameters()])])
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, another, **CLOSE)


def test_no_square_of_scores_is_kept():
    """Of T queries in blocks, forward and backward hold no tensor of T x T, and of all together a share."""
    mixer, x, kept = LolCats(8, heads=1, window=16), torch.randn(1, 1024, 8), {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mixer(x, context(1024, batch=1))
    assert max(kept.values()) <= 4 * 128 * (128 + 16)
    assert sum(kept.values()) < 4 * 1024 * 1024


def test_what_it_begins_with_and_what_moves_it():
    """f is the softmax of queries as they are, and g 0.1, in a model too; matrices and numbers go to their optimizers."""
    fields = dict(
        vocab_size=11, dim=DIM, heads=HEADS, depth=1, seq_len=24, stem="", mixer="lolcats:window=4:width=4", ffn="none"
    )
    model = build_model(Config.of(**fields))
    layer = model.stack[0].layer
    u = torch.randn(1, HEADS, 5, 4)
    expected = torch.cat([u.softmax(-1), (-u).softmax(-1)], -1)
    for matrix, shift in ((layer.query_map, layer.query_shift), (layer.key_map, layer.key_shift)):
        torch.testing.assert_close(layer.mapped(u, matrix, shift), expected)
    torch.testing.assert_close(layer.mix.sigmoid(), torch.full((HEADS,), 0.1))
    split = split_parameters(model)
    maps = {name.rpartition(".")[2] for name, _ in split.hidden}, {name.rpartition(".")[2] for name, _ in split.vector}
    assert {"query_map", "key_map"} <= maps[0] and {"query_shift", "key_shift", "mix"} <= maps[1]


def test_options_that_do_not_fit():
    for options, message in (
        (dict(window=-1), "window: -1"), (dict(width=0), "width: 0"), (dict(kv_heads=2), "kv_heads: 3"),
        (dict(width=129), "width: 258 features of heads of 4;"), (dict(head_dim=256, width=8), "width: 16 features of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}"):
            make(**dict(window=3) | options)
    with pytest.raises(ValueError, match="^causal: "):
        make(3)(numbers(1, 4, DIM), context(4, batch=1, causal=False))
