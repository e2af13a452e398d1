"""The loader: every window once an epoch, the same rows however they are shared out, resumed at any batch."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data import IGNORE, Loader, Tokens, windows
from data.token_files import Stream


def numbered(length, starts=(0,), shards=1):
    """A stream whose ids are their own positions, so that a row says where it came from."""
    ids = np.arange(length, dtype=np.uint16)
    return Tokens(ids if shards == 1 else Stream(np.array_split(ids, shards)), np.array(sorted({0, *starts})))


def rows(loader, batches):
    return [row.tolist() for _ in range(batches) for row in next(loader).inputs]


sizes = st.tuples(st.integers(2, 200), st.integers(1, 12), st.integers(0, 5)).filter(lambda s: s[0] > s[1])


@given(sizes, st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_each_epoch_visits_every_window_once(size, shards):
    length, seq_len, seed = size
    loader = Loader(numbered(length, shards=shards), batch_size=1, seq_len=seq_len, seed=seed)
    offsets = set()
    for epoch in range(3):
        seen, first = [], next(loader)
        while True:
            seen += [(first.inputs[0].tolist(), first.targets[0].tolist())]
            if loader.state_dict()["position"] == len(loader.order):
                break
            first = next(loader)
        assert loader.state_dict()["epoch"] == epoch
        seen.sort()
        offset = seen[0][0][0]
        offsets.add(offset)
        assert 0 <= offset < seq_len
        targets = [token for _, target in seen for token in target]
        # As targets: every token after the offset exactly once, up to a rest shorter than a window.
        assert targets == list(range(offset + 1, offset + 1 + len(targets)))
        assert length - seq_len <= offset + 1 + len(targets) <= length
        assert all([token + 1 for token in inputs] == target for inputs, target in seen)


@pytest.mark.parametrize("length", range(9, 18))
def test_even_the_shortest_stream_has_a_window_in_every_epoch(length):
    for seed in range(10):
        loader = Loader(numbered(length), batch_size=1, seq_len=8, seed=seed)
        for epoch in range(5):
            loader._begin(epoch)
            assert len(loader.order) >= 1


def test_order_and_offset_depend_on_seed_and_epoch():
    def order(seed, epochs):
        loader = Loader(numbered(2000), batch_size=1, seq_len=10, seed=seed)
        while loader.epoch < epochs:
            next(loader)
        return loader.order.tolist()

    orders = [order(seed, epochs) for seed in (0, 1) for epochs in (0, 1)]
    assert len({tuple(o) for o in orders}) == 4 and len({min(o) for o in orders}) > 1
    assert order(0, 1) == orders[1]
    assert all(o != sorted(o) for o in orders)


@given(sizes, st.integers(1, 4), st.integers(0, 30), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_resumes_at_any_point_with_any_batch_size(size, batch_size, batches, new_batch_size):
    length, seq_len, seed = size
    options = {"seq_len": seq_len, "seed": seed}
    straight = rows(Loader(numbered(length), batch_size=1, **options), batches * batch_size + 3 * new_batch_size)
    first = Loader(numbered(length), batch_size=batch_size, **options)
    before = rows(first, batches)
    state = json.loads(json.dumps(first.state_dict()))
    second = Loader(numbered(length), batch_size=new_batch_size, **options)
    next(second)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert before + rows(second, 3) == straight


@given(sizes, st.integers(1, 3), st.sampled_from([1, 2, 3, 4]), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_ranks_together_are_one_loader(size, batch_size, world_size, batches):
    length, seq_len, seed = size
    options = {"seq_len": seq_len, "seed": seed}
    alone = Loader(numbered(length), batch_size=batch_size * world_size, **options)
    ranks = [
        Loader(numbered(length), batch_size=batch_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    for _ in range(batches):
        whole, parts = next(alone), [next(rank) for rank in ranks]
        for field in whole._fields:
            assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts]))
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def documents_by_hand(begin, seq_len, length, starts):
    return [sum(begin < start <= position for start in starts) for position in range(begin, begin + seq_len)]


@given(sizes, st.sets(st.integers(1, 199)), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_documents_number_what_begins_inside_a_row(size, starts, shards):
    length, seq_len, seed = size
    starts = {start for start in starts if start < length}
    tokens = numbered(length, starts, shards)
    for batch in [next(Loader(tokens, batch_size=5, seq_len=seq_len, seed=seed)),
                  *windows(tokens, batch_size=3, seq_len=seq_len)]:  # fmt: skip
        for inputs, documents in zip(batch.inputs.tolist(), batch.documents.tolist(), strict=True):
            assert documents == documents_by_hand(inputs[0], seq_len, length, starts)


def test_dtypes_and_shapes():
    batch = next(Loader(numbered(100), batch_size=3, seq_len=8, seed=0))
    assert [tensor.dtype for tensor in batch] == [torch.int64, torch.int64, torch.int32]
    assert {tensor.shape for tensor in batch} == {(3, 8)} and all(tensor.is_contiguous() for tensor in batch)


def test_kinds_of_text_are_told_apart():
    """Beside what is in a batch anyway: of each input, after which of the positions where a kind begins it stands."""
    options = dict(batch_size=3, seq_len=8, seed=0)
    batch, kinds = (next(Loader(replace(numbered(100), domains=d), **options)) for d in (None, np.array([0, 30, 60])))
    assert all(torch.equal(*pair) for pair in zip(batch, kinds[:3], strict=True))
    assert torch.equal(kinds.domains, (kinds.inputs >= 30).long() + (kinds.inputs >= 60)) and kinds.domains.unique().numel() > 1
    assert {*batch.told(packed=False)} == set() and {*kinds.told(packed=False)} == {"domains"}
    assert {*batch.told(packed=True)} == {"documents"} and {*kinds.told(packed=True)} == {"documents", "domains"}


@given(st.integers(2, 150), st.integers(1, 12), st.integers(1, 5))
@settings(max_examples=150, deadline=None)
def test_windows_make_every_token_a_target_once(length, seq_len, batch_size):
    targets, predicted = [], []
    batches = list(windows(numbered(length), batch_size=batch_size, seq_len=seq_len))
    for batch in batches:
        assert batch.inputs.shape[0] <= batch_size and batch.inputs.min() >= 0
        real = batch.targets != IGNORE
        targets += batch.targets[real].tolist()
        predicted += (batch.inputs[real] + 1).tolist()
    assert targets == predicted == list(range(1, length))
    assert all(len(batch.inputs) == batch_size for batch in batches[:-1])


@given(st.integers(2, 400), st.integers(1, 12), st.integers(1, 5), st.integers(1, 500))
@settings(max_examples=150, deadline=None)
def test_a_limit_is_spread_over_the_stream(length, seq_len, batch_size, limit):
    every = [row for b in windows(numbered(length), batch_size=1, seq_len=seq_len) for row in b.targets.tolist()]
    batches = windows(numbered(length), batch_size=batch_size, seq_len=seq_len, limit=limit)
    some = [row for batch in batches for row in batch.targets.tolist()]
    assert len(some) == min(len(every), -(-limit // seq_len))
    places = [every.index(row) for row in some]
    gaps = np.diff([*places, len(every)])
    assert places[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


def test_bad_arguments():
    good = {"batch_size": 1, "seq_len": 4, "seed": 0}
    for change, message in [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"rank": 1}, "rank is 1; with world_size 1"),
        ({"rank": -1, "world_size": 2}, "rank is -1"),
        ({"seq_len": 10}, "tokens: the stream has 10, a window of seq_len 10 needs 11"),
    ]:
        with pytest.raises(ValueError, match=message):
            Loader(numbered(10), **good | change)
    with pytest.raises(ValueError, match="the stream has 1, .* needs 2"):
        windows(numbered(1), batch_size=1, seq_len=4)
    with pytest.raises(ValueError, match="limit is 0"):
        windows(numbered(9), batch_size=1, seq_len=4, limit=0)


@given(st.data())
def test_states_of_other_runs_are_refused(data):
    loader = Loader(numbered(50), batch_size=1, seq_len=4, seed=0)
    before = loader.state_dict()
    name = data.draw(st.sampled_from(sorted(before)))
    value = data.draw(st.none() | st.integers(max_value=-1) | st.integers(60, 1000) | st.text())
    assume((name, value) != ("epoch", value) or not isinstance(value, int) or value < 0)
    with pytest.raises(ValueError, match=f"loader state: .*{name}"):
        loader.load_state_dict(before | {name: value})


def test_fast_enough():
    """Well under a millisecond for 16 x 256; the bound leaves room for a loaded machine."""
    ids = np.random.default_rng(0).integers(0, 4096, 1_000_000).astype(np.uint16)
    loader = Loader(Tokens(ids, np.arange(0, len(ids), 5000)), batch_size=16, seq_len=256, seed=0)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        next(loader)
        times.append(time.perf_counter() - start)
    assert np.median(times) < 1e-3
