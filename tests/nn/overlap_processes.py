"""Layers that tensor parallelism shares out, with and without overlap: alike, as tests/nn/sequence_processes.py asks; how long?

torchrun --nproc-per-node 2 -m tests.nn.overlap_processes
"""

import time
from statistics import median

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kernels.shards import cuts, local
from models import Config, build_model
from nn.parallel.collectives import sent, waited
from nn.parallel.tensor import share_layers
from optim.parallel.processes import leave_processes

TINY = dict(vocab_size=50, dim=32, heads=4, depth=2, seq_len=16, norm="rmsnorm", init="gpt2", stem="")
MODELS = {
    "plain": dict(mixer="gqa", ffn="swiglu:width=48"),
    "everything": dict(mixer="gqa:bias=true:gate=true:qk_norm=head:sinks=true", ffn="mlp:bias=true,mlp:activation=star_relu"),
    "beside others": dict(stack="gqa moe:experts=4:width=16:top_k=2 mamba2:state=8:head_dim=16 swiglu:width=48 gqa+mlp"),
    "run again": dict(mixer="gqa:gate=true", ffn="swiglu:width=48", backprop="checkpoint"),
}


def step(options: dict, overlapped: bool, rows: int = 3):
    """(loss, gradients by name, bytes sent, model) of this rank."""
    model = build_model(Config.of(**TINY | options), seed=1)
    model = model if "dtype" in options else model.double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    share_layers(model, init_device_mesh("cpu", (dist.get_world_size(),)), overlapped)
    tokens = torch.randint(50, (rows, model.config.seq_len), generator=generator)
    documents = (torch.rand(tokens.shape, generator=generator) < 0.1).cumsum(1)
    sent.clear()
    loss = model(tokens, tokens, documents=documents)
    loss.backward()
    bytes_sent = sum(sent.values())
    for parameter in model.parameters():
        if not cuts(parameter):  # whole on all ranks, of which each has a summand
            dist.all_reduce(parameter.grad)
    grads = {name: local(p.grad) for name, p in model.named_parameters()}
    return loss, grads, bytes_sent, lambda: model(tokens, tokens)


def check_overlap() -> None:
    """Losses and gradients in float64, and bytes; layers that cannot overlap stay as they are."""
    for name, options in MODELS.items():
        (loss, grads, bytes_sent, _), (other, others, as_many, _) = step(options, False), step(options, True)
        assert ("pass" in sent) and grads.keys() == others.keys()
        pairs = [(grads[key], others[key]) for key in grads] + [(loss, other)]
        worst = torch.stack([(a - b).detach().abs().max() / a.abs().max().clamp(min=1e-3) for a, b in pairs]).max()
        assert worst < 1e-12, (name, worst)
        assert bytes_sent == as_many or "backprop" in options, (name, bytes_sent, as_many)


def clock() -> None:
    options = dict(mixer="gqa", ffn="swiglu", dim=512, heads=8, depth=4, seq_len=512, dtype="float32")
    runs = [step(options, overlapped, rows=2)[3] for overlapped in (False, True)]
    took, stood = [[], []], [[], []]
    for _ in range(12):
        for which, run in enumerate(runs):
            dist.barrier()
            began, before = time.perf_counter(), waited["seconds"]
            run().backward()
            took[which].append(time.perf_counter() - began)
            stood[which].append(waited["seconds"] - before)
    if dist.get_rank() == 0:
        for name, times, waits in zip(("plain", "overlapped"), took, stood, strict=True):
            print(f"{name}: {median(times):.3f} s a step, {median(waits):.3f} s of it waiting", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    clock()
    leave_processes()
