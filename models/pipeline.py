"""Pipeline parallelism: each process has some of the layers, and the parts of a step's batch go through them like a train.

The schedules are those of torch.distributed.pipelining; optim/parallel/schedules.py shows when each of them works and waits.
With fsdp, a rank gathers the weights of a stage once for all parts of a step, or of more than three stages twice, for the
forward and the backward passes, and sums gradients once.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from kernels.shards import local
from models.auxiliary import auxiliary_loss
from models.backprop import Plain, backprop
from models.language_model import LanguageModel
from nn.checks import at_least
from nn.objective import IGNORED


def gpipe() -> tuple[str, int]:
    """All forward passes, then all backward passes. Huang et al. 2018, "GPipe" (arXiv:1811.06965)."""
    return "ScheduleGPipe", 1


def one_f_one_b() -> tuple[str, int]:
    """Forward and backward passes in turns, so that few parts are held. Narayanan et al. 2019, "PipeDream" (SOSP)."""
    return "Schedule1F1B", 1


def interleaved(*, stages: int = 2) -> tuple[str, int]:
    """The same, each process having several runs of layers. Narayanan et al. 2021 (arXiv:2104.04473)."""
    at_least(1, stages=stages)
    return "ScheduleInterleaved1F1B", stages


def looped(*, stages: int = 2) -> tuple[str, int]:
    """Every run of layers for all parts before the next. Lamy-Poirier 2021 (arXiv:2106.02679), 2022 (arXiv:2211.05953)."""
    at_least(1, stages=stages)
    return "ScheduleLoopedBFS", stages


PIPELINES: dict[str, Callable] = {"gpipe": gpipe, "1f1b": one_f_one_b, "interleaved": interleaved, "looped": looped}


class Stage(nn.Module):
    """One run of a model's sublayers, with the embedding before the first and the loss behind the last.

    x: the tokens (B, T) of the first stage, the stream (B, T, C) of the others -> the stream, or of the last the loss (1,),
    a sum over targets, times `scale`.
    """

    def __init__(self, model: LanguageModel, sublayers: list[int], *, first: bool, last: bool, autocast: Callable):
        super().__init__()
        self.stack = nn.ModuleDict({str(number): model.stack[number] for number in sublayers})
        self.position, self.whole, self.first, self.last = model.position, [model], first, last  # in a list: no submodule
        self.before = nn.ModuleList([model.embedding, model.embedding_norm] if first else [])
        self.behind = nn.ModuleList([model.final_norm, model.transform, model.head] if last else [])
        if last and model.config.tie:
            self.behind.append(model.embedding)  # the same parameter
        self.autocast, self.scale = autocast, 1.0

    def forward(self, x: Tensor, *, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        (model,) = self.whole
        with self.autocast():
            context = model.context(tokens, documents, None)
            x = model.embedded(context) if self.first else x
            through = backprop(model.config.backprop) if torch.is_grad_enabled() else Plain()
            for sublayer in self.stack.values():
                x = through(sublayer, x, context)
            if self.last:
                return model.loss(x, targets)[None] * self.scale
            auxiliary = auxiliary_loss(self.stack.values(), no_costs)
        if auxiliary is None or not torch.is_grad_enabled():
            return x
        for sequence in model.sequences:
            targets = sequence.part(targets)
        return Beside.apply(x, auxiliary, self.scale * (targets >= 0).sum())


class Beside(torch.autograd.Function):
    """x as it is; a loss beside it gets the gradient that the last stage would give it."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight.to(loss.dtype)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, Tensor, None]:
        return dx, ctx.weight, None


def no_costs() -> Tensor:
    raise ValueError("mesh: a router that learns by reward needs the loss, which only the last process of a pipeline knows")


def runs(sublayers: int, stages: int) -> list[list[int]]:
    """The numbers of the sublayers of each stage, as evenly as possible. ValueError where there are too few."""
    if sublayers < stages:
        raise ValueError(f"mesh: {sublayers} sublayers cannot be shared among {stages} stages of a pipeline")
    return [part.tolist() for part in np.array_split(np.arange(sublayers), stages)]


class Pipeline:
    """The stages r, r + P, r + 2 P, … of all, on rank r of P, and the schedule by which all work together.

    In place: of the model, parameters that the rank's stages do not use are left away. Of those that several ranks have each
    holds a summand of the gradient; all but the first of them are `counted_elsewhere`. `shard` is done to each stage first.
    """

    def __init__(
        self,
        model: LanguageModel,
        mesh: DeviceMesh,
        schedule: tuple[str, int],
        device: torch.device,
        *,
        rows: int,
        parts: int,
        shard: Callable[[Stage], nn.Module],
        autocast: Callable,
    ):
        from torch.distributed import pipelining  # which imports the compiler: only who has a pipeline waits for that

        name, many = schedule
        size, rank = mesh.size(), mesh.get_local_rank()
        if parts < size:
            raise ValueError(f"accumulate: a pipeline of {size} processes needs at least {size} parts of a step, not {parts}")
        total = size * many
        ends = [dict(first=s == 0, last=s == total - 1, autocast=autocast) for s in range(total)]
        stages = [Stage(model, numbers, **end) for numbers, end in zip(runs(len(model.stack), total), ends, strict=True)]
        users: dict[int, set[int]] = {}
        for number, stage in enumerate(stages):
            for tensor in stage.parameters():
                users.setdefault(id(tensor), set()).add(number % size)
        shared = {name: tuple(sorted(users[id(p)])) for name, p in model.named_parameters() if len(users[id(p)]) > 1}
        self.counted_elsewhere = {name for name, ranks in shared.items() if rank in ranks[1:]}
        self.groups = {name: group for name, ranks in shared.items() if (group := group_within(mesh, ranks))}
        self.stages = stages[rank::size]
        keep_only(model, {module for stage in self.stages for module in stage.modules()})
        self.rows, self.first, self.last = rows, rank == 0, rank == size - 1
        made = [pipelining.PipelineStage(shard(stage), rank + i * size, total, device, group=mesh.get_group())
                for i, stage in enumerate(self.stages)]  # fmt: skip
        options = dict(loss_fn=lambda loss, _: loss.sum(), scale_grads=False)
        several = name not in ("ScheduleGPipe", "Schedule1F1B")
        self.schedule = getattr(pipelining, name)(made if several else made[0], parts, **options)

    def step(self, inputs: Tensor, targets: Tensor, documents: Tensor | None, scale: float) -> Tensor:
        """Forward and backward passes of all rows of a step, (B, T): `scale` times the loss on the last process, else 0."""
        return self.run(self.schedule.step, inputs, targets, documents, scale)

    def add_up(self, model: LanguageModel) -> None:
        """The gradients of parameters that several ranks have."""
        for name, group in self.groups.items():
            parameter = model.get_parameter(name)
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(local(parameter.grad), group=group)

    def judge(self, inputs: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """The loss of some rows, without gradients, in portions of as many as a step has: what is sent has one shape."""
        given = [inputs, targets] if documents is None else [inputs, targets, documents]
        total = 0
        for portion in zip(*(x.split(self.rows) for x in given), strict=True):
            missing = self.rows - len(portion[0])
            fills = zip(portion, (0, IGNORED, 0), strict=False)
            filled = [torch.cat([x, x.new_full((missing, *x.shape[1:]), fill)]) for x, fill in fills]
            total = total + self.run(self.schedule.eval, *filled, *[None] * (documents is None), 1.0)
        return total

    def run(self, act: Callable, inputs: Tensor, targets: Tensor, documents: Tensor | None, scale: float) -> Tensor:
        losses = []
        for stage in self.stages:
            stage.scale = scale
        given = dict(tokens=inputs, targets=targets) | ({} if documents is None else dict(documents=documents))
        ending = dict(target=targets, losses=losses) if self.last else {}
        act(*((inputs,) if self.first else ()), **ending, **given)
        wide = torch.promote_types(next(self.stages[0].parameters()).dtype, torch.float32)
        return sum((loss.detach() for loss in losses), torch.zeros((), device=inputs.device, dtype=wide))


def group_within(mesh: DeviceMesh, places: tuple[int, ...]) -> dist.ProcessGroup | None:
    """The processes at these places of each line of a mesh of one axis; None for one that is not among them."""
    lines, mine = torch.zeros(dist.get_world_size(), mesh.size(), dtype=torch.int64, device=mesh.device_type), None
    lines[dist.get_rank()] = mesh.mesh
    dist.all_reduce(lines)  # the line of every process
    for line in lines.unique(dim=0).tolist():
        ranks = [line[place] for place in places]
        group = dist.new_group(ranks)
        mine = group if dist.get_rank() in ranks else mine
    return mine


def keep_only(model: nn.Module, wanted: set[nn.Module]) -> None:
    """In place: parameters and buffers of other modules than these are None."""
    for module in (module for module in model.modules() if module not in wanted):
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            setattr(module, name, None)
