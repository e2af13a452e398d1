"""How positions are shared out, and what places on a ring see: numbers alone, without a second process."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import attention, reference
from kernels.intervals import visible
from nn.context import Context
from nn.parallel.ring import Ring, of_pair, pairs, sights
from nn.parallel.sequence import Sequence
from nn.parallel.ulysses import PartOf, Shares

sizes = st.tuples(
    st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3]), st.integers(1, 4)
)  # ring, beside, tokens of a part


def a_sequence(ring: int, beside: int, rank: int = 0) -> Sequence:
    """A process's, as if there were others."""
    sequence = Sequence.__new__(Sequence)
    sequence.__dict__.update(group=None, ring=ring, rank=rank, size=ring * beside)
    return sequence


@given(sizes)
def test_positions_are_shared_out_once_each(sizes):
    ring, beside, part = sizes
    T = 2 * ring * beside * part
    order = a_sequence(ring, beside).order(T)
    assert order.shape == (ring * beside, T // (ring * beside))
    assert sorted(order.flatten().tolist()) == list(range(T))
    places = order.view(ring, -1)
    assert (places.diff() > 0).all()  # those of a place follow each other
    if ring == 1:
        assert torch.equal(order.flatten(), torch.arange(T))
    else:
        pairs_seen = (places + 1).sum(1)  # of queries and keys, under a causal mask
        assert (pairs_seen == T * (T + 1) // (2 * ring)).all()


def test_a_row_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match=r"^seq_len: 12 positions cannot be shared among 4 processes in 8 parts evenly"):
        a_sequence(2, 2).order(12)


@st.composite
def masks(draw):
    places, c = draw(st.sampled_from([2, 3, 4])), draw(st.sampled_from([1, 2, 5]))
    T, causal = 2 * places * c, draw(st.booleans())
    window = draw(st.sampled_from([None, 1, 2, c, 2 * c + 1, T + 3]))
    first = draw(st.sampled_from([0, 1, c + 1])) if window else 0
    packed = draw(st.booleans()) and not (first and not causal)  # an encoder's global tokens are those of a row
    documents = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=T, max_size=T), min_size=2, max_size=2))).cumsum(1)
    return places, c, causal, window, first, documents if packed else None


@settings(deadline=None)
@given(masks())
def test_places_see_together_what_one_process_sees(case):
    places, c, causal, window, first, documents = case
    T = 2 * places * c
    context = Context(torch.zeros(2, T, dtype=torch.int64), torch.arange(T), documents, causal=causal)
    at = torch.arange(T)
    begin = torch.zeros(1, T, dtype=torch.int64)
    if documents is not None:
        begin = torch.where(torch.nn.functional.pad(documents.diff() != 0, (1, 0)), at, 0).cummax(1).values
    expected = visible(at[:, None], at, causal, window, first if documents is None else 0, documents, None, None)
    if documents is not None and first:  # the first tokens of each document
        expected = expected | (visible(at[:, None], at, True, None, 0, documents, None, None) & (at < begin[..., None] + first))
    found = torch.zeros(2, T, T, dtype=torch.int64)
    for rank in range(places):
        ring = Ring(a_sequence(places, 1, rank))
        order = a_sequence(places, 1).order(T)
        seen = sights(context, ring, window, first)
        for place in range(places):
            for _, mine, theirs, (low, high), whole, apart in pairs(ring, place, seen, (2, 1, 2 * c, 1)):
                queries, keys = order[rank][mine], order[place][theirs]
                assert (queries[0] - keys[0]) == apart * c
                assert low.dtype == high.dtype == torch.int32 and (low.diff() >= 0).all() and (high.diff() >= 0).all()
                inside = (torch.arange(c) >= low[..., None]) & (torch.arange(c) < high[..., None])  # (2, c, c)
                assert inside.any() and inside.all() == whole  # others are left out
                found[:, queries[:, None], keys] += inside.long()
    assert torch.equal(found, expected.expand(2, -1, -1).long())


def test_zigzag_places_have_as_many_pairs_of_chunks():
    """Under a causal mask two at each step of the ring, and one more at the first; in order the last would have all."""
    context = Context(torch.zeros(1, 48, dtype=torch.int64), torch.arange(48))
    for rank in range(4):
        ring = Ring(a_sequence(4, 1, rank))
        seen = sights(context, ring, None, 0)
        for place in range(4):
            assert len(list(pairs(ring, place, seen, (1, 1, 12, 1)))) == (3 if place == rank else 2)


@pytest.mark.parametrize("apart", [-3, -1, 0, 1, 2])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_distances_of_chunks_are_those_of_the_row(apart, softcap):
    c, H, K = 5, 4, 2
    generator = torch.Generator().manual_seed(apart)
    q, k, v = (torch.randn(2, heads, c, 6, dtype=torch.float64, generator=generator) for heads in (H, K, K))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)
    low = torch.tensor([[0, 0, 1, 1, 2], [0, 2, 2, 2, 4]], dtype=torch.int32)
    high = torch.tensor([[1, 3, 3, 4, 5], [0, 3, 3, 5, 5]], dtype=torch.int32)  # the first of the second row sees none
    y, lse = of_pair(q, k, v, (low, high), False, apart, 0.7, softcap, slopes)
    at = torch.arange(c)
    scores = 0.7 * q @ k.repeat_interleave(2, 1).mT
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores - slopes[:, None, None] * (at[:, None] + apart * c - at).abs()
    inside = (at >= low[..., None]) & (at < high[..., None])
    scores = scores.masked_fill(~inside[:, None], -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-12, atol=1e-12)
    expected = scores.softmax(-1).nan_to_num() @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_lists_of_ranks_exchange_heads_without_a_difference():
    """Ulysses on lists of arrays, P = 4, H = 8, N = 32: as attention by one, to the last bit."""
    P, H, N, D = 4, 8, 32, 16
    q, k, v = (np.random.default_rng(seed).standard_normal((1, H, N, D)) for seed in range(3))
    ranks = [[np.split(x, P, 2)[p] for x in (q, k, v)] for p in range(P)]  # each has N / P positions of all heads

    def all_to_all(sent):  # sent[p][r] goes from p to r
        return [[sent[p][r] for p in range(P)] for r in range(P)]

    arrived = [all_to_all([np.split(rank[i], P, 1) for rank in ranks]) for i in range(3)]
    y = [reference(*(np.concatenate(arrived[i][r], 2) for i in range(3))) for r in range(P)]
    back = all_to_all([np.split(y[p], P, 2) for p in range(P)])
    found = np.concatenate([np.concatenate(parts, 1) for parts in back], 2)
    assert np.array_equal(found, reference(q, k, v))
    ours = attention(*map(torch.from_numpy, (q, k, v)))
    np.testing.assert_allclose(found, ours.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("heads", "processes", "times"), [(8, 4, 1), (2, 4, 2), (1, 4, 4), (3, 2, 2), (6, 4, 2), (4, 1, 1)])
def test_heads_are_sent_as_often_as_processes_need_them(heads, processes, times):
    shares = Shares(a_sequence(1, processes), range(processes))
    assert shares.repeats(heads) == times
    queries = torch.arange(12 * heads)  # of 12 queries a key head
    for place in range(processes):
        shares.place = place
        own = shares.of(queries)
        keys = shares.of(torch.arange(heads).repeat_interleave(times))
        assert torch.equal(own // 12, keys.repeat_interleave(len(own) // len(keys)))


def test_a_part_of_a_layer_computes_with_its_own_numbers():
    class Layer:
        width, heads = 3, 8

        def both(self):
            return self.width * self.heads

        def twice(self):
            return 2 * self.both()

    layer = Layer()
    part = PartOf(layer, heads=2)
    assert (part.width, part.twice(), layer.twice()) == (3, 12, 48)
    layer.width = 5
    assert part.twice() == 20
    with pytest.raises(AttributeError):
        part.missing  # noqa: B018
    assert PartOf(SimpleNamespace(a=1), b=2).a == 1
