"""Optimizer state as tensors and JSON: the round trip is exact for everything a state_dict may hold."""

import json
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optim import flatten_state, unflatten_state

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def make_tensor(data, dtype, shape):
    """Any bit pattern, NaNs with payloads among them: bytes seen as a dtype (bools as 0 and 1)."""
    count = math.prod(shape) * dtype.itemsize
    raw = torch.tensor([data[i % len(data)] for i in range(count)], dtype=torch.uint8)
    return (raw % 2 == 1 if dtype is torch.bool else raw.view(dtype)).reshape(shape)


shape_lists = st.lists(st.integers(0, 3), max_size=3)
tensors = st.builds(make_tensor, st.binary(min_size=1, max_size=16), st.sampled_from(DTYPES), shape_lists)
text = st.text(st.characters(codec="utf-8"), max_size=4) | st.sampled_from(["0", "a/b", "a", "tensor", "dict", "tuple"])
plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
values = st.recursive(
    plain | tensors,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers(0, 5) | text, inner, max_size=3)
    ),
    max_leaves=12,
)


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.contiguous().flatten().view(torch.uint8).equal(b.contiguous().flatten().view(torch.uint8))
    elif isinstance(a, dict):
        assert list(a) == list(b) and list(map(type, a)) == list(map(type, b))
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for item, other in zip(a, b, strict=True):
            assert_same(item, other)
    else:
        assert a == b and math.copysign(1, a or 0.0) == math.copysign(1, b or 0.0) if isinstance(a, float) else a == b


@settings(max_examples=150, deadline=None)
@given(state=st.dictionaries(st.integers(0, 5) | text, values, max_size=4))
def test_round_trip_through_json_is_exact(state):
    flat, tree = flatten_state(state)
    back = unflatten_state(dict(reversed(flat.items())), json.loads(json.dumps(tree)))
    assert_same(back, state)


def test_names_are_paths_and_clashes_are_kept_apart():
    state = {"state": {3: {"mean": torch.ones(2), "step": torch.tensor(5)}}, "betas": (0.9, torch.zeros(()))}
    assert list(flatten_state(state)[0]) == ["state/3/mean", "state/3/step", "betas/1"]
    clash = {"a/b": torch.ones(1), "a": {"b": torch.zeros(1)}}
    flat, tree = flatten_state(clash)
    assert list(flat) == ["a/b", "a/b'"]
    assert_same(unflatten_state(flat, tree), clash)


def test_names_are_the_same_in_another_process():
    script = (
        "import torch; from optim import *\n"
        "layers = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4))\n"
        "split = split_parameters(layers)\n"
        "both = Combined([Muon(split.hidden), AdamW(split.embedding + split.vector)])\n"
        "layers(torch.arange(5)).sum().backward(); both.step(); print(*flatten_state(both.state_dict())[0])"
    )
    names = [
        subprocess.run([sys.executable, "-c", script], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True)
        for seed in "12"
    ]
    assert names[0].stdout == names[1].stdout and "optimizers/0/state/0/mean" in names[0].stdout, names[0].stderr


@pytest.mark.parametrize("bad", [{"x": {1, 2}}, {"x": object()}, {"x": [b"bytes"]}, {"x": 1j}, {"x": torch.float32}])
def test_what_needs_pickle_is_named(bad):
    with pytest.raises(ValueError, match="^x[^\n]* must be"):
        flatten_state(bad)


def test_bad_keys_missing_and_left_over_tensors_and_malformed_trees_are_named():
    with pytest.raises(ValueError, match="^x must be"):
        flatten_state({"x": {(1, 2): 3}})
    flat, tree = flatten_state({"x": torch.ones(2)})
    with pytest.raises(ValueError, match="^tensors must be with 'x'"):
        unflatten_state({}, tree)
    with pytest.raises(ValueError, match="^tensors must be all named in the tree, not \\['y'\\]"):
        unflatten_state(flat | {"y": torch.ones(1)}, tree)
    for malformed in ({}, {"tuple": [], "dict": []}, {"set": []}):
        with pytest.raises(ValueError, match="^tree must"):
            unflatten_state({}, malformed)
