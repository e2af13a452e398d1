"""What each of several processes does in tests/models/test_parallel.py: ten steps on a mesh, beside the same by itself.

    torchrun --nproc-per-node 2 -m tests.models.spread_processes dp=2 pp=2@gpipe/gqa+others …
"""

import sys

import torch
import torch.distributed as dist

from models import Config, build_model
from models.auxiliary import after_step
from models.parallel import Spread
from optim import AdamW, Combined, Muon, by_parts, split_parameters
from optim.parallel.mesh import sizes_of

SMALL = dict(dim=32, depth=2, heads=4, vocab_size=50, seq_len=16, stem="", init="gpt2", norm="rmsnorm")
OF_MOE = "width=12:shared=1:scope=global"
MODELS = {
    "gqa": SMALL | dict(mixer="gqa:kv_heads=2:qk_norm=head:bias=true", ffn="swiglu:width=40", tie=True),
    "hybrid": SMALL | dict(mixer="mamba2:state=8:head_dim=16,gqa:sinks=true:gate=true", ffn="mlp:bias=true", position="alibi"),
    "experts": SMALL | dict(mixer="gqa:window=5,mamba2:state=8:head_dim=8:groups=2", ffn=f"moe:experts=4:{OF_MOE}"),
    "others": SMALL | dict(stem="ngram:rows=60", mixer="retention,gqa:value_embedding=true", ffn="mlp", position="t5"),
}
ROWS, STEPS, PARTS = 8, 10, 2


def make(name: str):
    model = build_model(Config.of(**MODELS[name]), seed=3).double()
    generator = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def optimizer_of(model) -> Combined:
    split = split_parameters(model)
    rest = [dict(params=split.head + split.embedding), dict(params=split.vector, weight_decay=0.0)]
    rest = [group for group in rest if group["params"]]
    return Combined([Muon(by_parts(model, split.hidden), lr=0.02, dtype="float64"), AdamW(rest, lr=0.01)])


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(50, (ROWS, 17), generator=generator)
    documents = (torch.rand(ROWS, 16, generator=generator) < 0.1).cumsum(1)
    targets = tokens[:, 1:].clone()
    targets[:, 3] = -100  # as many in every row: what a part of the batch says of balance weighs as its targets do
    return tokens[:, :-1], targets, documents


def trained(name: str, sizes: dict[str, int] | None, pipeline: str = "1f1b"):
    """(losses, norms of the gradient, what is judged, parameters by name) of ten steps of some parts each."""
    model = make(name)
    spread = Spread(model, sizes or sizes_of("", 1), pipeline=pipeline, parts=PARTS)
    (place, places), optimizer, losses, norms = spread.rows, optimizer_of(model), [], []
    for step in range(STEPS):
        rows = zip(*(x.chunk(PARTS) for x in batch(step)), strict=True)
        parts = [tuple(x.chunk(places)[place] for x in part) for part in rows]
        total = spread.step(parts, 1 / (ROWS * 15))
        if sizes:
            dist.all_reduce(total)
        losses.append(total.item())
        norms.append(spread.clip(2.0).item())
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)
    judged = spread.judge(*batch(STEPS))[None].double()
    named = {name: whole_of(p).detach() for name, p in model.named_parameters()}
    return torch.tensor(losses), torch.tensor(norms), judged, named


def whole_of(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter


def differ(ours, theirs) -> float:
    """The largest difference of two runs, as a share of the largest number."""
    pairs = [*zip(ours[:3], theirs[:3], strict=True), *((ours[3][name], theirs[3][name]) for name in ours[3])]
    assert ours[3].keys() <= theirs[3].keys()
    return max(((a - b).abs().max() / b.abs().max().clamp(min=1e-3)).item() for a, b in pairs)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    alone = {}
    for words in sys.argv[1:]:
        mesh, _, names = words.partition("/")
        mesh, _, pipeline = mesh.partition("@")
        for name in names.split("+") if names else ("gqa", "hybrid"):
            alone[name] = alone.get(name) or trained(name, None)
            worst = torch.tensor(differ(trained(name, sizes_of(mesh, world), pipeline or "1f1b"), alone[name]))
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{words} {name} {worst.item():.1e}", flush=True)
    dist.destroy_process_group()
