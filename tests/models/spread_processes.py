"""What each of several processes does in tests/models/test_parallel.py: ten steps on a mesh, beside the same by itself.

    torchrun --nproc-per-node 2 -m tests.models.spread_processes dp=2 pp=2@gpipe/gqa+others …
"""

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from threading import Event

import torch
import torch.distributed as dist

from kernels.shards import local, part
from models import Config, build_model
from models.auxiliary import after_step
from models.checkpoint import model_tensors, read_json, write_json
from models.parallel import Spread
from models.saver import Saver
from models.sharded import kind_of, on_meta, read_all, read_parts
from models.weights import fill, save_config, skeleton, tensors_of
from nn.parallel.mesh import share_of_rows, sizes_of
from optim import AdamW, Combined, Muon, by_parts, split_parameters
from optim.parallel.processes import leave_processes
from optim.parallel.run_state import RunState

SMALL = dict(dim=32, depth=2, heads=4, vocab_size=50, seq_len=16, stem="", init="gpt2", norm="rmsnorm")
OF_MOE = "width=12:shared=1:scope=global:expert_gradients=sqrt"
MODELS = {
    "gqa": SMALL | dict(mixer="gqa:kv_heads=2:qk_norm=head:bias=true", ffn="swiglu:width=40", tie=True),
    "hybrid": SMALL | dict(mixer="mamba2:state=8:head_dim=16,gqa:sinks=true:gate=true", ffn="mlp:bias=true", position="alibi"),
    "experts": SMALL | dict(mixer="gqa:window=5,mamba2:state=8:head_dim=8:groups=2", ffn=f"moe:experts=4:{OF_MOE}"),
    "others": SMALL | dict(stem="ngram:rows=60", mixer="retention,gqa:value_embedding=true", ffn="mlp", position="t5"),
}
MODELS["router"] = MODELS["experts"] | dict(ffn="moe:experts=4:width=12:router=recurrent")  # which layers share a part of
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
    """A model and its optimizer on a mesh, or by itself; what a folder says, if one is given."""

    def __init__(
        self,
        name: str,
        sizes: dict[str, int] | None,
        pipeline: str = "1f1b",
        folder: Path | None = None,
        make_optimizer: Callable = optimizer_of,
    ):
        self.model, self.sizes = skeleton(Config.of(**MODELS[name])).double() if folder else make(name), sizes
        self.state = RunState(self.model, model_tensors, make_optimizer)
        self.place, self.places = share_of_rows(dist.get_rank(), sizes) if sizes else (0, 1)
        options = dict(pipeline=pipeline, rows=ROWS // self.places, parts=PARTS)
        self.spread = Spread(self.model, sizes or sizes_of("", 1), **options)
        self.optimizer = self.state.after(self.spread)
        if folder:
            read_parts(folder, self.state.weights())
            there = tensors_of(folder, "optimizer") if self.spread.is_whole else on_meta(folder, "optimizer")
            self.state.load_optimizer(read_json(folder / "progress.json"), there, partial(read_parts, folder))

    def step(self, number: int) -> tuple[float, float]:
        """(loss, norm of the gradient) of a step of some parts."""
        rows = zip(*(x.chunk(PARTS) for x in batch(number)), strict=True)
        parts = [[x.chunk(self.places)[self.place] for x in part] for part in rows]
        parts = [(inputs, targets, dict(documents=documents)) for inputs, targets, documents in parts]
        total = self.spread.step(parts, 1 / (ROWS * 15))
        if self.sizes:
            dist.all_reduce(total)
        norm = self.spread.clip(2.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        after_step(self.model)
        return total.item(), norm

    def saved(self, *, behind: bool = False) -> Path:
        """The folder of a checkpoint."""
        (run,) = shared([tempfile.mkdtemp()])
        saver = LateSaver(Path(run), keep=1, rank=dist.get_rank(), parts=not self.spread.is_whole, behind=behind)
        tensors, tree = self.state.optimizer()

        def write(folder: Path) -> None:
            save_config(self.model.config, folder)
            write_json(folder / "progress.json", tree)

        folder = saver.save(1, dict(model=self.state.weights(), optimizer=tensors), write)
        if behind:
            self.step(STEPS)  # is not what is saved
        saver.may_write.set()
        saver.finish()
        dist.barrier()
        return folder


class LateSaver(Saver):
    """One that begins to write behind the run's back when it is told to."""

    def __init__(self, run: Path, **options):
        super().__init__(run, **options)
        self.may_write = Event()

    def work(self, tensors: dict) -> None:
        if self.behind:
            self.may_write.wait()
        super().work(tensors)


def shared(values: list) -> list:
    """The values of the first process, on all of them."""
    dist.broadcast_object_list(values)
    return values


def trained(name: str, sizes: dict[str, int] | None, pipeline: str = "1f1b"):
    """(losses and norms of ten steps, what is judged, parameters by name)."""
    run = Run(name, sizes, pipeline)
    numbers = torch.tensor([run.step(number) for number in range(STEPS)], dtype=torch.float64)
    inputs, targets, documents = batch(STEPS)
    judged = run.spread.judge(inputs, targets, documents=documents)[None].double()
    return numbers[:, 0], numbers[:, 1], judged, {n: whole_of(p).detach() for n, p in run.model.named_parameters()}


def handed_over(name: str, first: dict[str, int], second: dict[str, int]) -> tuple[float, float]:
    """How far weights and state differ after a change of mesh, and the losses of the next two steps."""
    before = Run(name, first)
    for number in range(2):
        before.step(number)
    after = Run(name, second, folder=(folder := before.saved()))
    saved, found = (read_all(place) for place in (folder, after.saved()))
    assert saved.keys() == found.keys() and {*map(kind_of, saved)} == {"model", "optimizer"}
    exact = max((saved[key] - found[key]).abs().max().item() for key in saved)
    losses = [[run.step(number)[0] for number in (2, 3)] for run in (before, after)]
    return exact, max(abs(a - b) / a for a, b in zip(*losses, strict=True))


def saved_behind(name: str, sizes: dict[str, int]) -> float:
    """How far what is written while a step changes everything differs from what is written at once."""
    run = Run(name, sizes)
    run.step(0)
    at_once, behind = (read_all(run.saved(behind=behind)) for behind in (False, True))
    assert at_once.keys() == behind.keys()
    return max((at_once[key] - behind[key]).abs().max().item() for key in at_once)


def drawn(name: str, sizes: dict[str, int]) -> float:
    """How far first weights that no process has all of differ from those of one process."""
    config = Config.of(**MODELS[name])
    model = skeleton(config)
    state = RunState(model, model_tensors, optimizer_of)
    state.after(Spread(model, sizes, rows=2, parts=2))
    fill(state.weights(), config, None)
    expected = model_tensors(build_model(config, seed=config.seed))
    assert len(state.weights()) > 5 and (not config.tie or model.head.weight is model.embedding.weight)
    pairs = ((local(tensor), part(expected[name], like=tensor)) for name, tensor in state.weights().items())
    return max(((a.double() - b.double()).abs().max() if a.numel() else 0 * b.sum()).item() for a, b in pairs)


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
        check, _, rest = words.rpartition(":")
        if check:
            mesh, _, name = rest.partition("/")
            worst = torch.tensor(dict(behind=saved_behind, drawn=drawn)[check](name, sizes_of(mesh, world)))
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{words} {worst.item():.1e}", flush=True)
            continue
        if ">" in words:
            meshes, _, name = words.partition("/")
            worst = torch.tensor(handed_over(name or "hybrid", *(sizes_of(mesh, world) for mesh in meshes.split(">"))))
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{words} {worst[0].item():.1e} {worst[1].item():.1e}", flush=True)
            continue
        mesh, _, names = words.partition("/")
        mesh, _, pipeline = mesh.partition("@")
        for name in names.split("+") if names else ("gqa", "hybrid"):
            alone[name] = alone.get(name) or trained(name, None)
            worst = torch.tensor(differ(trained(name, sizes_of(mesh, world), pipeline or "1f1b"), alone[name]))
            dist.all_reduce(worst, dist.ReduceOp.MAX)
            if rank == 0:
                print(f"{words} {name} {worst.item():.1e}", flush=True)
    leave_processes()
