"""What each of several processes does in tests/models/test_parallel.py: ten steps on a mesh, beside the same by itself.

    torchrun --nproc-per-node 2 -m tests.models.spread_processes dp=2 pp=2@gpipe/gqa+others …
"""

import json
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from models import Config, build_model
from models.auxiliary import after_step
from models.checkpoint import load_weights, model_tensors
from models.parallel import Spread
from nn.parallel.mesh import share_of_rows, sizes_of
from optim import AdamW, Combined, Muon, by_parts, flatten_state, split_parameters
from optim.parallel.whole_state import WholeState

SMALL = dict(dim=32, depth=2, heads=4, vocab_size=50, seq_len=16, stem="", init="gpt2", norm="rmsnorm")
OF_MOE = "width=12:shared=1:scope=global:expert_gradients=sqrt"
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


class Run:
    """A model and its optimizer on a mesh, or by itself."""

    def __init__(
        self,
        name: str,
        sizes: dict[str, int] | None,
        pipeline: str = "1f1b",
        weights: dict | None = None,
        make_optimizer: Callable = optimizer_of,
    ):
        self.model, self.sizes = make(name), sizes
        if weights:
            load_weights(self.model, weights, "test")
        self.whole = WholeState(self.model, model_tensors, make_optimizer)
        self.place, self.places = share_of_rows(dist.get_rank(), sizes) if sizes else (0, 1)
        options = dict(pipeline=pipeline, rows=ROWS // self.places, parts=PARTS)
        self.spread = Spread(self.model, sizes or sizes_of("", 1), **options)
        self.optimizer = self.whole.after(self.spread)

    def step(self, number: int) -> tuple[float, float]:
        """(loss, norm of the gradient) of a step of some parts."""
        rows = zip(*(x.chunk(PARTS) for x in batch(number)), strict=True)
        parts = [tuple(x.chunk(self.places)[self.place] for x in part) for part in rows]
        total = self.spread.step(parts, 1 / (ROWS * 15))
        if self.sizes:
            dist.all_reduce(total)
        norm = self.spread.clip(2.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        after_step(self.model)
        return total.item(), norm

    def everything(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state, whole, on every process."""
        self.spread.rank = 0  # who keeps what is put together
        tensors, tree = flatten_state(self.whole.optimizer_state())
        assert json.loads(json.dumps(tree)) == tree
        return {name: tensor.clone() for name, tensor in (self.whole.weights() | tensors).items()}


def trained(name: str, sizes: dict[str, int] | None, pipeline: str = "1f1b"):
    """(losses and norms of ten steps, what is judged, parameters by name)."""
    run = Run(name, sizes, pipeline)
    numbers = torch.tensor([run.step(number) for number in range(STEPS)], dtype=torch.float64)
    judged = run.spread.judge(*batch(STEPS))[None].double()
    return numbers[:, 0], numbers[:, 1], judged, {n: whole_of(p).detach() for n, p in run.model.named_parameters()}


def handed_over(name: str, first: dict[str, int], second: dict[str, int]) -> tuple[float, float]:
    """How far weights and state differ after a change of mesh, and the losses of the next two steps."""
    before = Run(name, first)
    for number in range(2):
        before.step(number)
    saved = before.everything()
    after = Run(name, second, weights={name: saved[name].clone() for name in before.whole.tensors})
    after.whole.load_optimizer_state(before.whole.optimizer_state())
    found = after.everything()
    assert saved.keys() == found.keys() and len(saved) > len(before.whole.tensors)
    exact = max((saved[key] - found[key]).abs().max().item() for key in saved)
    losses = [[run.step(number)[0] for number in (2, 3)] for run in (before, after)]
    return exact, max(abs(a - b) / a for a, b in zip(*losses, strict=True))


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
        if ">" in words:
            worst = torch.tensor(handed_over("hybrid", *(sizes_of(mesh, world) for mesh in words.split(">"))))
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{words} hybrid {worst[0].item():.1e} {worst[1].item():.1e}", flush=True)
            continue
        mesh, _, names = words.partition("/")
        mesh, _, pipeline = mesh.partition("@")
        for name in names.split("+") if names else ("gqa", "hybrid"):
            alone[name] = alone.get(name) or trained(name, None)
            worst = torch.tensor(differ(trained(name, sizes_of(mesh, world), pipeline or "1f1b"), alone[name]))
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{words} {name} {worst.item():.1e}", flush=True)
    dist.destroy_process_group()
