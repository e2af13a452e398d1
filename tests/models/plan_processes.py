"""What each of several processes does in tests/models/test_plan_of_processes.py: a step, and what it has sent.

    torchrun --nproc-per-node 2 -m tests.models.plan_processes layers
    torchrun --nproc-per-node 4 -m tests.models.plan_processes meshes
"""

import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from models import Config, build_model
from models.parallel import Spread
from models.parts import parts_of
from models.plan import Run, plan
from nn.parallel.collectives import sent
from nn.parallel.mesh import parse_mesh, sizes_of
from nn.parallel.mixers import share_sequence
from nn.parallel.tensor import share_layers
from optim.parallel.processes import leave_processes
from tests.models.counted import Counted

NAMES = {"all-gather": "gather", "reduce-scatter": "scatter_sum", "all-to-all": "exchange", "send": "pass"}
TINY = dict(vocab_size=64, dim=32, heads=4, depth=3, seq_len=16, norm="rmsnorm", position="rope", init="fan_in", stem="")
MODELS = {
    "gqa": dict(mixer="gqa:kv_heads=2", ffn="swiglu:width=48,moe:experts=4:width=16:top_k=2"),
    "one head": dict(mixer="gqa:kv_heads=1", ffn="swiglu:width=48"),
    "hybrid": dict(mixer="mamba2:state=8:head_dim=16,gqa:kv_heads=2,linear", ffn="mlp:bias=true"),
    "run again": dict(mixer="gqa:kv_heads=2", ffn="swiglu:width=48", backprop="checkpoint"),
    "hidden rank": dict(mixer="mla:kv_rank=8", ffn="swiglu:width=48"),
}
DENSE = dict(mixer="gqa:kv_heads=2", ffn="swiglu:width=48")
EXPERTS = dict(mixer="gqa:kv_heads=2", ffn="moe:experts=4:width=16:top_k=2:router=hash")  # of even loads
MESHES = {
    "dp=4": DENSE,
    "fsdp=4": DENSE,
    "dp=2,fsdp=2": DENSE,
    "ep=2,dp=2": EXPERTS,
    "pp=4": DENSE | dict(tie=True, init="gpt2"),
    "pp=2,fsdp=2": DENSE,
    "pp=2,fsdp=2@looped": DENSE,
    "pp=2,fsdp=2@looped:stages=4": DENSE | dict(depth=4),
}
PARTS, ROWS = 4, 2  # micro-batches, and the rows of each


def layers() -> None:
    """What the layers of a model send, as nn/parallel counts it itself."""
    group, world = dist.group.WORLD, dist.get_world_size()
    for name, options in MODELS.items():
        for axis in ("tp", "ulysses", "ring"):
            if axis == "tp" and name == "one head":
                continue  # which two cannot share
            config = Config.of(**TINY | options)
            model = build_model(config).bfloat16()  # as plans count
            if axis == "tp":
                share_layers(model, init_device_mesh("cpu", (world,)))
            else:
                share_sequence(model, group, ring=world if axis == "ring" else 1)
            tokens = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
            sent.clear()
            with Counted(torch.bfloat16) as counted:
                model(tokens, tokens).backward()
            sizes = parse_mesh(f"{axis}={world}")
            (stage,) = plan(parts_of(config, sizes), Run(sizes, 32, 16, rows=3, backprop=config.backprop))
            planned: dict[str, float] = {}
            for message, size in stage.sent.items():
                collective = message.partition(" ")[2]
                if collective != "all-reduce":  # of gradients, which are not a layer's
                    planned[NAMES[collective]] = planned.get(NAMES[collective], 0) + size
            ours = {kind: size for kind, size in sent.items() if size}
            assert planned == ours, (name, axis, planned, ours)
            if axis != "ring":  # whose gradients are float32
                seen = {NAMES[kind]: size for kind, size in counted.sent.items() if kind in NAMES}
                assert seen == ours, (name, axis, seen, ours)
            say(f"{name}, {axis}: {sum(planned.values()):.0f} bytes")


def meshes() -> None:
    """What a step sends, whoever sends it."""
    world = dist.get_world_size()
    for words, options in MESHES.items():
        mesh, _, pipeline = words.partition("@")
        sizes, config = sizes_of(mesh, world), Config.of(**TINY | options)
        model = build_model(config).bfloat16()
        spread = Spread(model, sizes, pipeline=pipeline or "1f1b", rows=PARTS * ROWS, parts=PARTS)
        order = torch.Generator().manual_seed(dist.get_rank() // (sizes["ulysses"] * sizes["tp"]))
        tokens = torch.cat([torch.randperm(64, generator=order) for _ in range(2)]).view(PARTS, ROWS, 16)  # each id twice
        parts = [(part, part, {}) for part in tokens]
        spread.step(parts, 1.0)  # in the first one, engines tell each other more than later
        with Counted(torch.bfloat16) as counted:
            spread.step(parts, 1.0)
        stage = spread.stage.get_local_rank()
        planned: dict[str, float] = {}
        for message, size in plan(parts_of(config, sizes), Run(sizes, 32, 16, ROWS, PARTS))[stage].sent.items():
            collective = message.partition(" ")[2]
            planned[collective] = planned.get(collective, 0) + size
        seen = dict(counted.sent)
        if pipeline.startswith(("looped", "interleaved")):  # plans have one stage a rank, which sends its rows once
            assert seen.pop("send") > planned.pop("send")
        if words.endswith("stages=4"):  # other sublayers than in a plan; weights twice, but for the stages at the turn
            numbers = sum(p.numel() for p in model.parameters() if isinstance(p, DTensor))
            planned = {"reduce-scatter": 2 * numbers / 2}
            assert planned["reduce-scatter"] < seen.pop("all-gather") < 2 * planned["reduce-scatter"]
        same = planned.keys() == seen.keys() and all(abs(planned[key] - seen[key]) < 0.5 for key in seen)
        assert same, (words, planned, seen)
        say(f"{words}: {sum(counted.sent.values()):.0f} bytes")


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    dict(layers=layers, meshes=meshes)[sys.argv[1]]()
    leave_processes()
