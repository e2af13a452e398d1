"""What each of several processes does in tests/optim/test_loss_scale.py: an overflow on one of them, on several meshes.

torchrun --nproc-per-node 2 -m tests.optim.scale_processes FOLDER fsdp=2 tp=2 …
"""

import sys
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist

import train
from kernels.shards import local
from models import Config, build_model
from models.machine import autocast
from models.parallel import Spread
from nn.parallel.mesh import sizes_of
from optim import AdamW
from optim.loss_scale import LossScale
from optim.parallel.processes import join_processes, leave_processes

SHAPE = dict(dim=32, depth=2, heads=4, seq_len=16, stem="", mixer="gqa", ffn="mlp", norm="rmsnorm")
WORDS = dict(tokenizer="byte", batch_size=8, accumulate=2, dtype="float16", device="cpu", optimizer="adamw:lr=0.01", steps=6)
FLAGS = [word for name, value in (SHAPE | WORDS | dict(eval_every=0, eval_tokens=200, sample=1)).items()
         for word in ("--" + name.replace("_", "-"), str(value))]  # fmt: skip


def overflow(mesh: str, world: int) -> None:
    """Four steps of which the second has an infinity among the gradients of the last process only."""
    model = build_model(Config.of(**SHAPE, vocab_size=50, init="gpt2"), seed=1)
    half = partial(autocast, torch.device("cpu"), torch.float16)
    spread = Spread(model, sizes_of(mesh, world), rows=4, parts=2, autocast=half)
    optimizer = AdamW([p for p in model.parameters()], lr=0.01)
    scaler = LossScale(interval=2)
    tokens = torch.randint(50, (2, 2, 17), generator=torch.Generator().manual_seed(0))
    parts = [(part[:, :-1], part[:, 1:], {}) for part in tokens]
    changed, scales = [], []
    for step in range(4):
        before = [local(p).detach().clone() for p in model.parameters()]
        spread.step(parts, scaler.scale(torch.ones(())).item() / 64)
        if step == 1 and dist.get_rank() == world - 1:
            grads = [local(p.grad) for p in model.parameters() if p.grad is not None and local(p.grad).numel()]
            grads[len(grads) // 2].view(-1)[-1] = torch.inf
        scaler.unscale_(optimizer)
        spread.clip(1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        changed.append(any(not torch.equal(local(p), b) for p, b in zip(model.parameters(), before, strict=True)))
        scales.append(scaler.factor)
        assert all(local(p).isfinite().all() for p in model.parameters()), (mesh, step)
    assert changed == [True, False, True, True], (mesh, dist.get_rank(), changed)
    assert scales == [2.0**16, 2.0**15, 2.0**15, 2.0**16], (mesh, dist.get_rank(), scales)


def main(folder: str, *meshes: str) -> None:
    joined = join_processes()
    with patch.object(train, "join_processes", lambda: joined):
        for mesh in meshes:
            overflow(mesh, joined[1])
            assert train.main([*FLAGS, "--data", f"{folder}/text", "--mesh", mesh, "--out", f"{folder}/{mesh}"]) == 0, mesh
    leave_processes()


if __name__ == "__main__":
    main(*sys.argv[1:])
