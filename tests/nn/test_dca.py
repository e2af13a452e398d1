"""Dual chunk attention: its positions against the paper's, its output against one softmax in NumPy, its state."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nn.attention import GQA
from nn.attention.dca import DCA
from nn.context import Context
from nn.position import POSITIONS
from nn.spec import build

BATCH, DIM, HEADS = 2, 16, 4
SIZES = [(6, 10, 20), (3, 5, 11), (3, 4, 9), (2, 9, 7), (1, 2, 5), (4, 7, 8), (8, 9, 8)]  # chunk, original, tokens
each_size = pytest.mark.parametrize(("chunk", "original", "time"), SIZES)


def make(chunk: int, original: int, position: str = "rope:theta=100", kind: type = DCA, **options):
    torch.manual_seed(0)
    encoding = build(position, POSITIONS, "position", dim=DIM, heads=HEADS)
    sizes = dict(chunk=chunk, original=original) if kind is DCA else {}
    mixer = kind(DIM, encoding, heads=HEADS, kv_heads=2, **options, **sizes).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def numbers(time: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(BATCH, time, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def context(time: int, start: int = 0, **given) -> Context:
    return Context(torch.zeros(BATCH, time, dtype=torch.int64), torch.arange(start, start + time), **given)


def relative(chunk: int, original: int, time: int) -> np.ndarray:
    """(T, T): how far apart the paper lets query i and key j <= i stand, case by case."""
    apart = np.zeros((time, time), dtype=int)
    for i in range(time):
        for j in range(i + 1):
            back = i // chunk - j // chunk
            at = [i % chunk, min(chunk + i % chunk, original - 1), original - 1][min(back, 2)]
            apart[i, j] = at - j % chunk
    return apart


@each_size
def test_positions(chunk, original, time):
    """Each key belongs to one part; distances are true up to min(s, c - s), and none is more than c - 1."""
    expected = relative(chunk, original, time)
    parts, found = make(chunk, original).parts(numbers(time), context(time), 0), np.full((time, time), -1)
    for place, (low, high) in parts:
        for i in range(time):
            for j in range(low[0, i], high[0, i]):
                assert found[i, j] == -1
                found[i, j] = place.positions[i] - j % chunk
    np.testing.assert_array_equal(np.tril(found), expected)
    assert (found[np.triu_indices(time, 1)] == -1).all() and 0 <= expected.min() and expected.max() <= original - 1
    distance = np.arange(time)[:, None] - np.arange(time)
    near = (distance >= 0) & (distance <= min(chunk, original - chunk))
    np.testing.assert_array_equal(expected[near], distance[near])


def test_the_example_of_the_paper():
    """c = 10, s = 6: to the keys of the chunk before, queries stand at 6, 7, 8, 9, 9, 9; to earlier ones at 9."""
    own, previous, earlier = (place.positions.tolist() for place, _ in make(6, 10).parts(numbers(18), context(18), 0))
    assert own == [*range(6)] * 3 and previous == [6, 7, 8, 9, 9, 9] * 3 and earlier == [9] * 18


@each_size
@pytest.mark.parametrize("position", ["rope:theta=100", "rope:scaling=yarn:factor=4:original=8:theta=50:fraction=0.5"])
def test_one_softmax_over_all_keys(chunk, original, time, position):
    mixer, x = make(chunk, original, position, qk_norm="head"), numbers(time)
    projected = mixer.projected(x, context(time))
    q, k, v = (part.detach().numpy().repeat(HEADS // part.shape[2], axis=2) for part in projected)
    rope = mixer.rotate.__self__
    frequencies, apart = rope.frequencies(DIM // HEADS).numpy(), relative(chunk, original, time)
    half = len(frequencies)
    scores = np.einsum("bihd,bjhd->bhij", q[..., 2 * half :], k[..., 2 * half :])
    for n, frequency in enumerate(frequencies):  # Re(q conj(k) e^(i distance frequency)), pair by pair
        a, b = (u[..., n] + 1j * u[..., n + half] for u in (q, k))
        products = np.einsum("bih,bjh->bhij", a, b.conj()) * np.exp(1j * apart * frequency)
        scores = scores + products.real * rope.gain**2
    weights = np.exp(scores / 2) * np.tri(time)
    mixed = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v).reshape(BATCH, time, DIM)
    y = mixer(x, context(time)).detach().numpy()
    np.testing.assert_allclose(y, mixed @ mixer.out.weight.detach().numpy().T, atol=1e-10)


@pytest.mark.parametrize("position", [*POSITIONS, "rope:scaling=yarn:factor=4:original=8"])
@torch.no_grad()
def test_weights_of_gqa_fit(position):
    """Up to a chunk it is gqa bit for bit, as it is at any length where nothing is turned; beyond, it is another matter."""
    dca, gqa, x = make(6, 8, position), make(6, 8, position, GQA), numbers(13)
    dca.load_state_dict(gqa.state_dict())
    packed = Context(torch.zeros(BATCH, 6), torch.tensor([0, 1, 0, 1, 2, 3]), torch.tensor([[0, 0, 1, 1, 1, 1]] * BATCH))
    for where in (context(6), packed):
        assert torch.equal(dca(x[:, :6], where), gqa(x[:, :6], where))
    difference = (dca(x, context(13)) - gqa(x, context(13))).abs().amax((0, 2))
    assert difference[:6].max() < 1e-12
    assert difference[8:].min() > 1e-3 if position.startswith("rope") else difference.max() == 0
    assert gqa.is_plain() and not dca.is_plain()


@each_size
@torch.no_grad()
def test_prefill_and_steps_equal_the_whole(chunk, original, time):
    mixer, x = make(chunk, original), numbers(time)
    whole = mixer(x, context(time))
    for lengths in ([1] * time, [time // 2, time - time // 2], [2, 0, time - 3, 1]):
        state, parts, start = mixer.init_state(BATCH, time, dtype=torch.float64), [], 0
        for length in lengths:
            parts.append(mixer(x[:, start : start + length], context(length, start, state=state)))
            start += length
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)
    keys = mixer.projected(x, context(time))[1]
    turned = mixer.rotate(keys, replace(context(time), positions=torch.arange(time) % chunk))
    torch.testing.assert_close(state.keys, turned.transpose(1, 2))  # the cache holds keys turned to j mod s


@each_size
@torch.no_grad()
def test_packed_documents_equal_each_alone(chunk, original, time):
    mixer, x = make(chunk, original), numbers(time + 9)
    lengths = [[2, time, 3, 4], [time, 1, 1, 7]]
    documents = torch.stack([torch.repeat_interleave(torch.tensor([3, 1, 2, 8]), torch.tensor(row)) for row in lengths])
    y = mixer(x, context(time + 9, documents=documents))
    for row, sizes in enumerate(lengths):
        alone = [mixer(part[None], context(part.shape[0]))[0] for part in x[row].split(sizes)]
        torch.testing.assert_close(y[row], torch.cat(alone), rtol=0, atol=1e-10)


@torch.no_grad()
def test_layers_of_one_model_may_differ():
    shared, x = context(9), numbers(9)
    for mixer in (make(6, 8), make(4, 8), make(4, 6)):
        assert torch.equal(mixer(x, shared), mixer(x, context(9)))


def test_gradients():
    mixer, x = make(2, 4, bias=True), numbers(7).requires_grad_()
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    call = lambda x, *values: torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x, context(7)))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


def test_refusals():
    with pytest.raises(ValueError, match="^chunk: 8 tokens are not less than the original context of 8$"):
        make(8, 8)
    with pytest.raises(ValueError, match="^chunk: "):
        make(0, 8)
    with pytest.raises(ValueError, match="^causal: "):
        make(3, 8)(numbers(4), context(4, causal=False))
    mixer, documents = make(3, 8), torch.zeros(BATCH, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="^documents: "):
        mixer(numbers(4), context(4, documents=documents, state=mixer.init_state(BATCH, 4, dtype=torch.float64)))
