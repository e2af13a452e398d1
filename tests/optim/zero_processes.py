"""What each of several processes does in tests/optim/test_zero.py: ten steps of ZeRO beside the same steps of one process.

torchrun --nproc-per-node 4 -m tests.optim.zero_processes
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from models import Config, LanguageModel, build_model
from optim import AdamW
from optim.parallel.processes import leave_processes
from optim.parallel.zero import Zero

STEPS = 10
FIELDS = dict(vocab_size=37, dim=18, heads=3, seq_len=12, stem="", norm="rmsnorm")
MODELS = {
    "gqa": dict(stack="gqa:kv_heads=1:sinks=true mlp", tie=True),
    "hybrid": dict(stack="mamba2:state=4 gqa:sinks=true mlp", backprop="checkpoint"),
    "streamed": dict(stack="mamba2:state=4 gqa:sinks=true mlp", backprop="stream:chunks=3"),
}
OPTIONS = dict(lr=0.01, betas=(0.8, 0.95), eps=1e-6)


def grouped(model: LanguageModel) -> list[dict]:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [dict(params=matrices, weight_decay=0.1), dict(params=[p for p in model.parameters() if p.ndim < 2], lr=0.03)]


def batch(step: int, world: int) -> torch.Tensor:
    return torch.randint(37, (2 * world, 12), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, tokens: torch.Tensor, world: int) -> torch.Tensor:
    return model(tokens, tokens.roll(-1, 1)) / tokens.numel()


def alone(fields: dict, world: int) -> dict[str, torch.Tensor]:
    """The parameters after the steps of one process on the whole batch."""
    model = build_model(Config.of(**FIELDS | fields))
    optimizer = AdamW(grouped(model), **OPTIONS)
    for step in range(STEPS):
        loss_of(model, batch(step, world), world).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def shared(fields: dict, stage: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """The same of all, each with its rows of the batch; what is held and sent is asserted on the way."""
    model = build_model(Config.of(**FIELDS | fields))
    zero = Zero(model, partial(AdamW, **OPTIONS), stage=stage, units=model.stack, groups=grouped(model))
    learned = sum(p.numel() for p in model.parameters())
    total = sum(flat.bytes for flat in zero.flats)  # Psi numbers of 4 bytes, with what is added to divide by the ranks
    assert 0 < total - 4 * learned < 4 * world * len(zero.flats) and total % world == 0
    part = total // world
    for step in range(STEPS):
        before = dict(zero.sent)
        loss_of(model, batch(step, world)[2 * rank : 2 * rank + 2], world).backward()
        held = zero.held()
        assert held["weights"] == (part if stage == 3 else total), (stage, held)
        assert held["gradients"] == (part if stage >= 2 else 4 * learned), (stage, held)
        zero.clip(0.5)
        zero.step()
        assert zero.held()["state"] == 2 * part, (stage, held)
        sent = {name: count - before.get(name, 0) for name, count in zero.sent.items()}
        gathers = 2 if stage == 3 else 1
        assert sent == {"all_gather": gathers * total * (world - 1) // world, "reduce_scatter": total * (world - 1) // world}
    with torch.no_grad():  # a pass that learns nothing leaves nothing behind
        loss_of(model, batch(0, world), world)
    assert zero.held()["weights"] == (part if stage == 3 else total)
    with zero.whole():
        return {name: p.detach().clone() for name, p in model.named_parameters()}


def check(name: str, stages: tuple[int, ...], rank: int, world: int) -> None:
    expected, found = alone(MODELS[name], world), [shared(MODELS[name], stage, rank, world) for stage in stages]
    worst = max((found[0][key] - value).abs().max().item() for key, value in expected.items())
    assert worst < 1e-5, (name, worst)
    assert all(torch.equal(found[0][key], other[key]) for other in found[1:] for key in expected), name
    for key, value in found[0].items():
        first = value.clone()
        dist.broadcast(first, 0)
        assert torch.equal(first, value), (name, key)


def check_peer(rank: int, world: int) -> None:
    """Stage 1 gives the parameters that PyTorch's own gives."""
    fields, options = FIELDS | MODELS["gqa"], OPTIONS | dict(weight_decay=0.1)
    ours, theirs = build_model(Config.of(**fields)), build_model(Config.of(**fields))
    zero, wrapped = Zero(ours, partial(AdamW, **options), stage=1), DistributedDataParallel(theirs)
    optimizer = ZeroRedundancyOptimizer(theirs.parameters(), optimizer_class=torch.optim.AdamW, **options)
    for step in range(3):
        tokens = batch(step, world)[2 * rank : 2 * rank + 2]
        loss_of(ours, tokens, world).backward()
        loss_of(wrapped, tokens, world).backward()
        zero.step()
        optimizer.step()
        optimizer.zero_grad()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (one - other).abs().max() < 1e-5, name


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if world == 2:
        check("hybrid", (1, 2, 3), rank, world)
        check("streamed", (3,), rank, world)
        check_peer(rank, world)
    else:
        check("gqa", (1, 2, 3), rank, world)
    if rank == 0:
        print(f"{world} ranks", flush=True)
    leave_processes()
