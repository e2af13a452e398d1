"""What the SPEC of linear_attention does not say: errors, decoding, packing, named cases, extreme decays."""

import numpy as np
import pytest
import torch

from kernels import chunks
from kernels.linear_attention import SPEC, linear_attention, pytorch, retention, step
from tests.kernels.contract import arguments, check, evaluate, interpreted, seeded

B, T, H, D, V = 2, 11, 4, 6, 5
GOOD = dict(q=torch.randn(B, T, H, D), k=torch.randn(B, T, H, D), v=torch.randn(B, T, H, V), g=-torch.rand(B, T, H, D))
GATES = {"none": None, "head": (H,), "time": (B, T, H), "channel": (B, T, H, D)}
both_paths = pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=interpreted)])


@pytest.mark.parametrize(
    "name, value",
    [
        ("v", torch.randn(B, T, H)),
        ("v", torch.ones(B, T, H, V, dtype=torch.int64)),
        ("v", torch.randn(B, T, H, 257)),
        ("v", torch.randn(B, T, 0, V)),
        ("q", torch.randn(B, T + 1, H, D)),
        ("q", torch.randn(B, T, 3, D)),
        ("q", torch.randn(B, T, H, 257)),
        ("q", torch.randn(B, T, H, D, dtype=torch.float64)),
        ("k", torch.randn(B, T, H, D + 1)),
        ("k", torch.randn(B, T, H, D, dtype=torch.float64)),
        ("g", torch.randn(H + 1)),
        ("g", torch.randn(B, T, H, D + 1)),
        ("initial_state", torch.randn(B, H, V, D)),
        ("documents", torch.zeros(B, T + 1, dtype=torch.int64)),
        ("documents", torch.zeros(B, T)),
    ],
)
def test_errors_name_the_argument(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        linear_attention(**{**GOOD, name: value})


def test_gates_a_channel_want_a_query_a_head():
    with pytest.raises(ValueError, match="^g: "):
        linear_attention(GOOD["q"][:, :, :1], GOOD["k"][:, :, :1], GOOD["v"], torch.zeros(B, T, H, D))


def test_step_wants_one_time():
    with pytest.raises(ValueError, match="^v: "):
        step(**GOOD, state=torch.zeros(B, H, D, V))


def at(call: dict, when) -> dict:
    return {name: x[:, when] if x is not None and x.ndim > 1 else x for name, x in call.items()}


@pytest.mark.parametrize("gate", GATES)
def test_steps_and_pieces_equal_the_whole(gate):
    call = GOOD | dict(g=GATES[gate] and -torch.rand(GATES[gate]))
    o, final = linear_attention(**call)
    first, state = linear_attention(**at(call, slice(0, 3)))
    parts = [first]
    for t in range(3, T):
        one, state = step(**at(call, t), state=state)
        parts.append(one.unsqueeze(1))
    torch.testing.assert_close(torch.cat(parts, 1), o)
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("gate", GATES)
def test_packed_documents_equal_each_alone(gate):
    call = GOOD | dict(g=GATES[gate] and -torch.rand(GATES[gate]))
    o, final = linear_attention(**call, documents=torch.tensor([[3, 3, 3, 3, 1, 1, 1, 3, 3, 3, 3]] * B))
    alone = [linear_attention(**at(call, slice(*ends))) for ends in ((0, 4), (4, 7), (7, 11))]
    torch.testing.assert_close(o, torch.cat([piece for piece, _ in alone], 1))
    torch.testing.assert_close(final, alone[-1][1])


def test_kinds_of_gates_agree():
    a_head = -torch.rand(H)
    wide = a_head[:, None].expand(B, T, H, D)
    found = [linear_attention(**GOOD | dict(g=g))[0] for g in (a_head, wide[..., 0], wide)]
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    none, zero = (linear_attention(**GOOD | dict(g=g))[0] for g in (None, torch.zeros(B, T, H, D)))
    torch.testing.assert_close(none, zero)


def test_without_decay_it_is_masked_attention_without_softmax():
    o, _ = linear_attention(**GOOD | dict(g=None), scale=1.0)
    q, k, v = (GOOD[name].transpose(1, 2) for name in "qkv")
    torch.testing.assert_close(o.transpose(1, 2), (q @ k.mT).tril() @ v)


def test_retention_forgets_by_head():
    o, _ = retention(GOOD["q"], GOOD["k"], GOOD["v"])
    gamma = 1 - 2.0 ** -(5 + torch.arange(H))
    torch.testing.assert_close(o, pytorch(GOOD["q"], GOOD["k"], GOOD["v"], gamma.log())[0])


def everything(T: int, seed: int, gate: str, high: float) -> dict:
    draw, H = seeded(seed), 1 if gate == "channel" else 2
    shape = {"none": None, "time": (1, T, H), "channel": (1, T, H, 19)}[gate]
    return dict(
        q=draw.normal(1, T, 1, 19),
        k=draw.normal(1, T, 1, 19),
        v=draw.normal(1, T, H, 20 if gate == "channel" else 35),
        g=None if shape is None else -draw.uniform(*shape, high=high),
        initial_state=draw.normal(1, H, 19, 20 if gate == "channel" else 35),
        documents=np.repeat([[4, 2, 7, 4]], [9, 23, 3, T - 35], axis=1),  # one begins where a chunk of 32 does
    )


@pytest.mark.parametrize("gate", ["none", "time", "channel"])
@both_paths
def test_everything_at_once(path, gate):
    check(SPEC, everything(37, 1, gate, 1.0), torch.float32, path)


@pytest.mark.parametrize("gate", ["time", "channel"])
def test_long_sequences_cross_chunks(gate):
    check(SPEC, everything(150, 2, gate, 0.1) | dict(documents=None), torch.float32, "torch")


@pytest.mark.parametrize("gate", ["none", "time", "channel"])
@pytest.mark.parametrize("T", [64, 65, 150])
def test_segments_are_one(gate, T, monkeypatch):
    """A sequence longer than a segment of the PyTorch path, with documents that end where segments do and elsewhere."""
    monkeypatch.setattr(chunks, "SEGMENT", 64)
    case = everything(T, 2, gate, 0.1)
    check(SPEC, case, torch.float64, "torch")
    check(SPEC, case | dict(documents=np.repeat([[4, 2, 7]], [40, 24, T - 64], axis=1)), torch.float64, "torch")


@pytest.mark.parametrize("gate", ["none", "time", "channel"])
def test_autocast_changes_nothing(gate):
    """Its products are of float32, whatever those around it are."""
    call, found = arguments(SPEC, everything(40, 1, gate, 0.5), torch.float32), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(evaluate(linear_attention, SPEC, call)[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("gate", ["time", "channel"])
@both_paths
def test_strong_decay_neither_overflows_nor_loses_digits(path, gate):
    case = everything(36, 3, gate, 1.0) | dict(documents=None)
    case["g"][:, ::5] = -300.0  # exp(300) is beyond float32; the sums near it must keep the digits of the small ones
    check(SPEC, case, torch.float32, path)
