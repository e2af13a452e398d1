"""Longformer and BigBird against dense attention with the same mask, in which direction a layer carries, and what it costs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nn.attention import ATTENTION
from nn.attention.bigbird import block_mask
from nn.context import Context
from nn.spec import build

DIM, HEADS = 16, 2


def make(spec: str):
    torch.manual_seed(0)
    mixer = build(spec, ATTENTION, "mixer", DIM, heads=HEADS).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def x_of(length: int) -> Tensor:
    return torch.randn(2, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def context(length: int, **given) -> Context:
    return Context(torch.zeros(2, length, dtype=torch.int64), torch.arange(length), **given)


def dense(mixer, x: Tensor, mask: Tensor, kind: str = "") -> Tensor:
    """(B, H, T, D) of attention with a mask (T, S) or (H, T, S), by the projections whose names end in `kind`."""
    q, k, v = (getattr(mixer, name + kind)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("query", "key", "value"))
    return F.scaled_dot_product_attention(q, k, v, mask)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 4, 100])
@torch.no_grad()
def test_longformer(window, causal):
    T, n = 37, 3
    mixer, x = make(f"longformer:window={window}:global_tokens={n}"), x_of(T)
    i, j = torch.arange(T)[:, None], torch.arange(T)
    past = (i >= j) if causal else torch.ones(T, T, dtype=torch.bool)
    local = dense(mixer, x, past & (((i - j).abs() < window) | (j < n)))
    everywhere = dense(mixer, x, past, "_global")
    expected = mixer.out(torch.cat([everywhere[:, :, :n], local[:, :, n:]], 2).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, context(T, causal=causal)), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_a_window_that_reaches_everything_is_full_attention():
    mixer, x, plain = make("longformer:window=30:global_tokens=1"), x_of(20), make("mha")
    plain.load_state_dict({name: p for name, p in mixer.state_dict().items() if "global" not in name})
    found, full = mixer(x, context(20, causal=False)), plain(x, context(20, causal=False))
    torch.testing.assert_close(found[:, 1:], full[:, 1:])
    assert (found[:, 0] - full[:, 0]).abs().max() > 1e-3  # the global token has weights of its own


def test_the_receptive_field_grows_by_the_window():
    """After L layers a token depends on those at most L (window - 1) away, by its gradient."""
    mixers, x = [make(f"gqa:window=4:kv_heads={HEADS}") for _ in range(3)], x_of(40).requires_grad_()
    y = x
    for depth, mixer in enumerate(mixers, 1):
        y = y + mixer(y, context(40, causal=False))
        (grad,) = torch.autograd.grad(y[:, 20].sum(), x, retain_graph=True)
        reached = grad.abs().amax((0, 2)).gt(0).nonzero()[:, 0]
        assert (reached.min().item(), reached.max().item()) == (20 - 3 * depth, 20 + 3 * depth)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_bigbird(causal):
    T, block = 150, 16
    mixer, x = make(f"bigbird:block={block}:random_blocks=2:seed=3"), x_of(T)
    blocks = block_mask(-(-T // block), HEADS, 1, 1, 2, causal, 3)
    mask = blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :T, :T]
    mask = mask & torch.ones(T, T).tril().bool() if causal else mask
    expected = mixer.out(dense(mixer, x, mask).transpose(1, 2).flatten(2))
    torch.testing.assert_close(mixer(x, context(T, causal=causal)), expected, rtol=1e-10, atol=1e-10)
    assert not torch.equal(mask[0], mask[1]) and not mask.all()


@torch.no_grad()
def test_bigbird_in_pieces_and_packed():
    """Random blocks of a long text are those of a shorter one; blocks begin where a document does."""
    T, mixer, x = 100, make("bigbird:block=16:random_blocks=1:window=0"), x_of(100)
    whole, state, parts, start = mixer(x, context(T)), mixer.init_state(2, T, dtype=torch.float64), [], 0
    for length in (40, 1, 23, 36):
        where = Context(torch.zeros(2, length, dtype=torch.int64), torch.arange(start, start + length), state=state)
        parts.append(mixer(x[:, start : start + length], where))
        start += length
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)
    positions = torch.cat([torch.arange(30), torch.arange(70)])
    documents = (torch.arange(T) >= 30).long().expand(2, T)
    packed = mixer(x, Context(torch.zeros(2, T, dtype=torch.int64), positions.expand(2, T), documents))
    torch.testing.assert_close(packed[:, 30:], mixer(x[:, 30:], context(70)), rtol=1e-10, atol=1e-10)


def test_blocks_of_a_longer_text_only_add_rows():
    short, long = (block_mask(rows, 2, 1, 1, 3, True, 0) for rows in (20, 50))
    assert torch.equal(long[:, :20, :20], short)
    each = long.sum(-1)
    assert each.max() == 6 and (each[:, 10:] == 6).all()  # itself, one before, the first, three at random
    both = block_mask(50, 2, 1, 1, 3, False, 0)
    assert (both[:, 3:-1].sum(-1) == 3 + 1 + 3).all() and both[:, 0].all() and both[:, :, 0].all()
    with pytest.raises(ValueError, match="^block: 16, 32, 64 or 128 tokens, not 24$"):
        make("bigbird:block=24")
