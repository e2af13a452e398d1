"""What each of several processes does in tests/nn/test_sequence_processes.py: its positions of rows, beside the rows by one.

torchrun --nproc-per-node 4 -m tests.nn.sequence_processes
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import nn

from models import Config, build_model
from nn.parallel import collectives
from nn.parallel.mixers import share_sequence
from nn.parallel.sequence import Sequence
from nn.parallel.ulysses import Shares
from optim.parallel.processes import leave_processes
from tests.nn.overlap_processes import check_overlap

B, T, V = 2, 48, 30
SMALL = dict(dim=32, depth=2, heads=4, vocab_size=V, seq_len=T, stem="", norm="rmsnorm", init="fan_in", ffn="mlp", tie=False)
SMALL |= dict(position="rope", softcap=0.0)
MODELS = {
    "gqa": dict(mixer="gqa:kv_heads=2:qk_norm=head,gqa:kv_heads=1:window=7:sinks=true:gate=true"),
    "alibi": dict(mixer="gqa:window=19:global_tokens=3:softcap=2,gqa:kv_heads=1:sinks=true", position="alibi"),
    "encoder": dict(mixer="gqa:window=5:global_tokens=3,mha", objective="masked", position="alibi", ffn="swiglu"),
    "hybrid": dict(mixer="mamba2:state=6:head_dim=16,gqa+mlp,mamba2:state=3:head_dim=8:groups=2:conv_bias=false", depth=3),
    "others": dict(mixer="mla,tpa+mlp,moa:experts=4:top_k=2:balance=0:z=0,mamba:state=3,gla,longformer:window=4,mhe", depth=7,
                   ffn="none,moe:experts=4:top_k=2:width=12:balance=0:z=0"),
    "experts": dict(mixer="gqa:kv_heads=2", ffn="moe:experts=4:top_k=2:width=12:balance=1:z=0.1:scope=global"),
    "small": dict(model="small", dim=32, vocab_size=V, seq_len=T, stem="ngram:n=3:rows=50"),
    "biased": dict(mixer="gqa:kv_heads=2:window=9:sinks=true", position="t5:buckets=8:max_distance=20"),
}  # fmt: skip


ALWAYS = [("gqa", True), ("alibi", False), ("hybrid", True)]
OF_FOUR = {1: ALWAYS, 2: [*ALWAYS, ("encoder", False), ("small", False), ("experts", True)], 4: ALWAYS}  # by the ring's places
OF_TWO = [[("gqa", False), ("alibi", True), ("hybrid", False), ("small", True), ("encoder", False)], [("others", True)]]


def make(name: str = "", **fields):
    fields = MODELS[name] if name else fields
    model = build_model(Config.of(**fields if "model" in fields else SMALL | fields), seed=1).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.25, generator=generator)
    return model


def rows(packed: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(3)
    tokens, targets = (torch.randint(V, (B, T), generator=generator) for _ in range(2))
    documents = (torch.rand(B, T, generator=generator) < 0.08).cumsum(1) if packed else None
    return tokens, targets.masked_fill(torch.rand(B, T, generator=generator) < 0.2, -100), documents


def loss_and_gradients(model, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens, targets, documents = rows(packed)
    loss = model(tokens, targets, documents=documents)
    loss.backward()
    return loss.detach(), {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


@cache
def by_one(name: str, packed: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return loss_and_gradients(make(name), packed)


def check(name: str, packed: bool, group: dist.ProcessGroup, ring: int) -> None:
    """The sum over the group of losses and of gradients is that of one process."""
    model, (expected_loss, expected) = make(name), by_one(name, packed)
    share_sequence(model, group, ring=ring)
    loss, found = loss_and_gradients(model, packed)
    assert expected.keys() == found.keys()
    dist.all_reduce(loss, group=group)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    for key, theirs in expected.items():
        dist.all_reduce(found[key], group=group)
        torch.testing.assert_close(found[key], theirs, rtol=1e-9, atol=1e-9, msg=lambda m, key=key: f"{name}, {key}: {m}")
        assert not key.endswith("weight") or theirs.abs().max() > 1e-6  # so that there is something to see


def check_exchange(ring: int) -> None:
    """An exchange and its inverse change nothing, there or back; so for positions, their parts and their whole."""
    sequence = Sequence(dist.group.WORLD, ring)
    world = sequence.size
    x, y = (torch.randn(2, 3, 4 * world, dtype=torch.float64, requires_grad=True) for _ in range(2))
    shares = Shares(sequence, range(world))
    x_there, y_there = shares.to_shares(x, y)
    assert x_there.shape == (2, 3 * world, 4)
    assert torch.equal(shares.to_own(x_there), x) and torch.equal(shares.to_own(y_there), y)
    weights = torch.randn(x_there.shape, dtype=torch.float64)
    (x_there * weights).sum().backward()
    assert torch.equal(x.grad, shares.to_own(weights))  # its transpose is its inverse
    row = torch.arange(2 * 8 * world).view(2, -1, 1)
    assert torch.equal(sequence.whole(sequence.part(row)), row)
    assert torch.equal(sequence.summed(row), world * sequence.part(row))


def bytes_of(mixer: str, ring: int, length: int) -> tuple[dict, dict]:
    """Bytes sent by this process in a forward pass of one layer, by operation, and in the backward pass."""
    model = make(mixer=mixer, depth=1, ffn="none", seq_len=length)
    share_sequence(model, dist.group.WORLD, ring=ring)
    tokens = torch.zeros(B, length, dtype=torch.int64)
    collectives.sent.clear()
    loss = model(tokens, tokens)
    forward = dict(collectives.sent)
    loss.backward()
    return forward, dict(collectives.sent - collectives.Counter(forward))


def check_bytes(world: int) -> None:
    C, K, D, number = 32, 2, 8, 8
    for length in (T, 2 * T):
        part = B * length // world  # tokens of a process
        forward, backward = bytes_of("gqa:kv_heads=4", 1, length)
        assert forward == backward == {"exchange": 4 * part * C * number * (world - 1) // world}
        forward, backward = bytes_of(f"gqa:kv_heads={K}", world, length)
        assert forward == {"pass": (world - 1) * part * 2 * K * D * number}  # (R - 1) / R of all keys and values
        assert backward == {"pass": 2 * forward["pass"]}  # in float64 gradients are as wide as they
        if world == 4:  # keys and values are sent to two processes, so that each has a head of them to send on
            forward, _ = bytes_of("gqa:kv_heads=1", 2, length)
            assert forward == {"exchange": (2 * C + 2 * 2 * D) * part * number // 2, "pass": 2 * part * 2 * D * number}
        forward, _ = bytes_of("mamba2:state=6:head_dim=8", 1, length)  # E = 64 there and back, B, C to all, d
        assert forward == {"exchange": (2 * 64 + 2 * 6 * world + 8) * part * number * (world - 1) // world}
        forward, backward = bytes_of("gla", 1, length)
        assert forward == {"gather": part * C * number * (world - 1)} and backward == {"scatter_sum": forward["gather"]}


def mistakes() -> list[str]:
    world, found = dist.get_world_size(), []
    for fields, ring, length in (
        (dict(mixer="gqa:heads=1:head_dim=8"), 1, T),
        (dict(mixer="mamba2:head_dim=32"), 1, T),
        (MODELS["biased"], world, T),
        (dict(), 3, T),
        (dict(mixer="gqa"), 1, T + 1),
    ):
        try:
            model = make(**fields)
            share_sequence(model, dist.group.WORLD, ring=ring)
            model(torch.zeros(B, length, dtype=torch.int64))
        except ValueError as error:
            found.append(str(error))
    try:
        model.hidden(torch.zeros(B, world, dtype=torch.int64), state=model.init_state(B, T))
    except ValueError as error:
        found.append(str(error))
    return found


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    for ring, models in OF_FOUR.items():
        check_exchange(ring)
        for name, packed in models:
            check(name, packed, dist.group.WORLD, ring)
    for name, packed in OF_TWO[rank // 2]:
        check(name, packed, halves[rank // 2], ring=1)
        check(name, packed, halves[rank // 2], ring=2)
    check("biased", True, halves[rank // 2], ring=1)
    check_bytes(world)
    check_overlap()
    if rank == 0:
        print("\n".join(mistakes()), flush=True)
    else:
        mistakes()
    leave_processes()
