"""A model on a mesh of processes: every axis of nn/parallel/mesh.py put to work, the strategies one inside the other.

Whatever the mesh, a step gives the gradients that one process would have found, so that nothing else of training changes.
Within a process's rows: its positions (ring, ulysses, tp), its heads and neurons (tp), its experts (ep). Weights, gradients and
optimizer state: whole, or a share each (fsdp), and of the matrices that tp or ep cut a share anyway.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kernels.shards import cuts, local, sum_of_squares
from models.language_model import LanguageModel
from models.pipeline import PIPELINES, Pipeline
from nn.moe.expert_parallel import share_experts
from nn.moe.hashed import domains_of
from nn.moe.host_experts import HostLinear
from nn.parallel.mixers import share_sequence
from nn.parallel.tensor import share_layers
from nn.spec import build

WITH_EXPERTS = ("dp", "ring", "ulysses")  # axes that go together with ep


class Spread:
    """A model spread over the processes of a mesh, in place, and what then stands for its forward and backward passes.

    sizes: of all axes, as `sizes_of` gives them; all 1: one process, for which nothing changes. At first each process has all
    of the model, or a skeleton of it on the meta device: of that it then has its share on `device`, with any numbers
    (models/weights.py fills them in). A process's `rows` of a step go through a `pipeline` in `parts`; `autocast()` is the
    context of forward passes. `forward` is what gives the loss in the model's place (dp alone). `tp_overlap`: as
    nn/parallel/overlap.py has it. ValueError for what the mesh cannot share out.
    """

    def __init__(
        self,
        model: LanguageModel,
        sizes: dict[str, int],
        device: torch.device | str = "cpu",
        *,
        forward: nn.Module | None = None,
        pipeline: str = "1f1b",
        rows: int = 1,
        parts: int = 1,
        tp_overlap: bool = False,
        autocast: Callable = nullcontext,
    ):
        check(sizes, forward is not None and forward is not model, model)
        schedule = build(pipeline, PIPELINES, "pipeline")
        self.model, self.sizes, self.autocast, self.forward = model, sizes, autocast, forward or model
        self.pipeline = None
        self.device = device = torch.device(device)
        device_type = device.type
        pp, dp, ep, fsdp, ring, ulysses, tp = (sizes[name] for name in ("pp", "dp", "ep", "fsdp", "ring", "ulysses", "tp"))
        self.averaged = averaged(sizes)
        if self.is_alone:
            return
        if device_type != "cpu" and any(isinstance(module, HostLinear) for module in model.modules()):
            raise ValueError("mesh: experts on the host (moe:host=true) visit one device; with several, ep shares them out")
        shape, names = (pp, dp * ep, fsdp * ring * ulysses, tp), ("pp", "copies", "shards", "tp")
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        self.stage, self.tensor, data = mesh["pp"], mesh["tp"], mesh["copies", "shards"]
        self.same_layers = mesh_along(sizes, device_type, *(name for name in sizes if name != "pp")).get_group()
        self.of_a_row = mesh_along(sizes, device_type, "pp", "ring", "ulysses", "tp").get_group()
        if ring * ulysses > 1:
            share_sequence(model, mesh_along(sizes, device_type, "ring", "ulysses").get_group(), ring=ring)
        if ep > 1:
            share_experts(model, mesh_along(sizes, device_type, "ep"))
            self.same_experts = mesh_along(sizes, device_type, *WITH_EXPERTS).get_group()
        if tp > 1:
            share_layers(model, self.tensor, tp_overlap)
        for module in model.modules():  # statistics of routing are those of all who have the same layers
            for part in (module, getattr(module, "balance_loss", None)):
                if hasattr(part, "counted_over"):
                    part.counted_over = self.same_layers
        self.kept = {name for name, parameter in model.named_parameters() if cuts(parameter)}  # by tp or ep: none has all
        shard = partial(sharded, mesh=data, kept=pp > 1) if shards(sizes) else None
        if pp > 1:
            options = dict(rows=rows, parts=parts, shard=shard or (lambda stage: stage), autocast=autocast)
            self.pipeline = Pipeline(model, self.stage, schedule, device, **options)
        elif shard:
            shard(model)
        for module in self.pipeline.stages if self.pipeline else [model]:
            give_room(module, device)
        if self.averaged > 1 and not (shard or self.pipeline):
            self.forward = replicated(self.forward, self.kept, find_unused_parameters=self.forward is not model)

    @property
    def is_alone(self) -> bool:
        return all(size == 1 for size in self.sizes.values())

    @property
    def is_whole(self) -> bool:
        return keeps_whole(self.sizes)

    def step(self, parts: list[tuple[Tensor, Tensor, dict[str, Tensor]]], scale: float) -> Tensor:
        """Gradients of `scale` times the loss of all parts of all processes: inputs, targets, and what else the model is given.

        Its value here: the sum over all processes is the loss.
        """
        factor = scale * self.averaged
        to = partial(torch.Tensor.to, device=self.device, non_blocking=True)
        parts = [(to(inputs), to(targets), {name: to(x) for name, x in given.items()}) for inputs, targets, given in parts]
        if self.pipeline:
            inputs, targets, given = zip(*parts, strict=True)
            documents = torch.cat([each["documents"] for each in given]) if "documents" in given[0] else None
            total = self.pipeline.step(torch.cat(inputs), torch.cat(targets), documents, factor) / factor
        else:
            total = torch.zeros((), device=parts[0][0].device)
            for inputs, targets, given in parts:
                with self.autocast():
                    loss = self.forward(inputs, targets, **given)
                (loss * factor).backward()
                total = total + loss.detach()
        self.add_up()
        return total

    @torch.no_grad()
    def add_up(self) -> None:
        """Add up what the engine's mean has left apart."""
        grads = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        if self.sizes["tp"] > 1:
            all_reduce([grad for name, grad in grads if name not in self.kept], self.tensor.get_group())
        if self.sizes["ep"] > 1:
            own = [grad for name, grad in grads if name in self.kept]
            all_reduce(own, self.same_experts)
            for grad in own:
                local(grad).div_(self.averaged)
        if self.pipeline:
            self.pipeline.add_up(self.model)

    @torch.no_grad()
    def clip(self, largest: float) -> Tensor:
        """Scale all gradients so that their norm is at most `largest`; the norm before."""
        grads = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        counted_elsewhere = self.pipeline.counted_elsewhere if self.pipeline else ()
        square = sum_of_squares([grad for name, grad in grads.items() if name not in counted_elsewhere])
        if self.pipeline:
            dist.all_reduce(square, group=self.stage.get_group())
        norm = square.sqrt()
        factor = (largest / (norm + 1e-6)).clamp(max=1.0)
        for grad in map(local, grads.values()):
            grad.mul_(factor.to(grad.device))
        return norm

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """(B, T, V) of rows (B, T) that are the same on all processes. ValueError in a pipeline."""
        if self.pipeline:
            raise ValueError("mesh: logits are on the last process of a pipeline only")
        with self.autocast():
            logits = self.model(inputs)
        for sequence in reversed(self.model.sequences):
            logits = sequence.whole(logits)
        return logits

    @torch.no_grad()
    def judge(self, inputs: Tensor, targets: Tensor, **given: Tensor) -> Tensor:
        """The loss of some rows, which are the same on all processes; as is the result."""
        if self.pipeline:
            loss = self.pipeline.judge(inputs, targets, given.get("documents"))
        else:
            with self.autocast():
                loss = self.model(inputs, targets, **given)
        if not self.is_whole:
            dist.all_reduce(loss, group=self.of_a_row)
        return loss


def keeps_whole(sizes: dict[str, int]) -> bool:
    """Whether each process of a mesh has all parameters, whole, and computes all positions."""
    return all(size == 1 for name, size in sizes.items() if name != "dp")


def averaged(sizes: dict[str, int]) -> int:
    """The number of processes over which the engine takes the mean of gradients."""
    return math.prod(sizes[name] for name in ("dp", "ep", "fsdp", "ring", "ulysses"))


def shards(sizes: dict[str, int]) -> bool:
    """Whether the engine is the one that cuts weights."""
    return sizes["fsdp"] > 1 or sizes["tp"] * sizes["pp"] > 1 and averaged(sizes) > 1


def give_room(module: nn.Module, device: torch.device) -> None:
    """Memory on a device, in place, for what is on the meta device; what is elsewhere moves there."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # so that what is tied stays one
    try:
        module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def check(sizes: dict[str, int], wrapped: bool, model: nn.Module) -> None:
    """ValueError for axes that do not go together, with a model that is `wrapped`, or with what this one is made of."""
    more = [f"{name}={size}" for name, size in sizes.items() if size > 1 and name != "dp"]
    if wrapped and more:
        raise ValueError(f"mesh: a teacher or a compiled model goes together with dp only, not with {', '.join(more)}")
    others = [f"{name}={size}" for name, size in sizes.items() if size > 1 and name not in ("ep", *WITH_EXPERTS)]
    shared = [name for module in model.modules() for name in getattr(module, "shared_by_layers", ())]
    if shared and (shards(sizes) or sizes["pp"] > 1):
        raise ValueError(f"mesh: layers that share parameters ({', '.join(dict.fromkeys(shared))}) go neither with pp nor with "
                         "weights that are cut: fsdp, or tp beside rows that are shared out")  # fmt: skip
    if sizes["pp"] > 1 and domains_of(model) > 1:
        raise ValueError("mesh: experts of domains go with any axis but pp, whose stages are not told the domain")
    if sizes["ep"] > 1 and others:
        raise ValueError(f"mesh: ep goes together with {', '.join(WITH_EXPERTS)}, not with {', '.join(others)}")


def sharded(model: nn.Module, mesh: DeviceMesh, *, kept: bool = False) -> nn.Module:
    """ZeRO-3 by PyTorch's engine: each sublayer's parameters are gathered for its use and dropped behind it.

    `kept`: those of a stage of a pipeline, which lets go of them when the schedule turns to other stages: in the backward
    passes of its parts PyTorch keeps all of them anyway, so that nothing is saved by dropping them in between.
    """
    for residual in model.stack.values() if isinstance(model.stack, nn.ModuleDict) else model.stack:
        fully_shard(residual, mesh=mesh, reshard_after_forward=not kept)
    return fully_shard(model, mesh=mesh, reshard_after_forward=False)


def replicated(model: nn.Module, apart: set[str], **options) -> nn.Module:
    """Data parallelism by PyTorch's engine; parameters named in `apart` are not those of all processes."""
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(apart))
    return DistributedDataParallel(model, **options)


def all_reduce(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """The sum over a group of each tensor's part here, in place, in one message a dtype."""
    parts: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        parts.setdefault(tensor.dtype, []).append(local(tensor))
    for same in parts.values():
        flat = torch.cat([part.flatten() for part in same])
        dist.all_reduce(flat, group=group)
        for part, summed in zip(same, flat.split([part.numel() for part in same]), strict=True):
            part.copy_(summed.view_as(part))


def mesh_along(sizes: dict[str, int], device_type: str, *names: str) -> DeviceMesh:
    """A mesh of one axis: the processes that differ from this one along the named axes only."""
    ranks = torch.arange(math.prod(sizes.values())).view(*sizes.values())
    last = [list(sizes).index(name) for name in names]
    first = [axis for axis in range(len(sizes)) if axis not in last]
    ranks = ranks.permute(*first, *last).reshape(-1, math.prod(sizes[name] for name in names))
    return DeviceMesh(device_type, ranks, mesh_dim_names=("outside", "along"))["along"]
