"""What each of several processes does in tests/models/test_plan_of_processes.py: a step, and what it has sent.

torchrun --nproc-per-node 2 -m tests.models.plan_processes
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from models import Config, build_model
from models.parts import parts_of
from models.plan import Run, plan
from nn.parallel.collectives import sent
from nn.parallel.mesh import parse_mesh
from nn.parallel.mixers import share_sequence
from nn.parallel.tensor import share_layers

NAMES = {"all-gather": "gather", "reduce-scatter": "scatter_sum", "all-to-all": "exchange", "send": "pass"}
TINY = dict(vocab_size=64, dim=32, heads=4, depth=3, seq_len=16, norm="rmsnorm", position="rope", init="fan_in", stem="")
MODELS = {
    "gqa": dict(mixer="gqa:kv_heads=2", ffn="swiglu:width=48,moe:experts=4:width=16:top_k=2"),
    "one head": dict(mixer="gqa:kv_heads=1", ffn="swiglu:width=48"),
    "hybrid": dict(mixer="mamba2:state=8:head_dim=16,gqa:kv_heads=2,linear", ffn="mlp:bias=true"),
    "hidden rank": dict(mixer="mla:kv_rank=8", ffn="swiglu:width=48"),
}


def main() -> None:
    dist.init_process_group("gloo")
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
            model(tokens, tokens).backward()
            sizes = parse_mesh(f"{axis}={world}")
            (stage,) = plan(parts_of(config, sizes), Run(sizes, 32, 16, rows=3))
            planned: dict[str, float] = {}
            for message, size in stage.sent.items():
                collective = message.partition(" ")[2]
                if collective != "all-reduce":  # of gradients, which are not a layer's
                    planned[NAMES[collective]] = planned.get(NAMES[collective], 0) + size
            counted = {kind: size for kind, size in sent.items() if size}
            assert planned == counted, (name, axis, planned, counted)
            if dist.get_rank() == 0:
                print(f"{name}, {axis}: {sum(planned.values()):.0f} bytes", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
