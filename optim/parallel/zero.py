"""ZeRO: data parallelism in which no two ranks hold the same numbers, written out for reading.

Rajbhandari et al. 2019, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv:1910.02054), sections 5
and 7. For Psi parameters, Adam in mixed precision holds 2 Psi bytes of weights, 2 Psi of gradients and 12 Psi of state: 16 Psi
on each of N ranks. What a stage shares out beside the stages before it, and what a rank then holds and sends in a step:

    stage   shared out         bytes held               numbers sent
      0     nothing            16 Psi                   2 Psi (N - 1) / N      gradients: all-reduce
      1     optimizer state    4 Psi + 12 Psi / N       2 Psi (N - 1) / N      gradients: reduce-scatter; weights: all-gather
      2     gradients          2 Psi + 14 Psi / N       2 Psi (N - 1) / N      the same, layer by layer in the backward pass
      3     weights            16 Psi / N               3 Psi (N - 1) / N      weights are gathered twice: forward, backward

What one runs is PyTorch's `fully_shard` (stage 3) and DistributedDataParallel (stage 0); this is what they do.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

STAGES = (1, 2, 3)

# N ranks, n numbers


def held_bytes(parameters: float, ranks: int, stage: int) -> float:
    """What a rank holds of a model of so many parameters: the table above, 16 bytes a parameter at stage 0."""
    return sum(size * parameters / (ranks if stage >= shared else 1) for size, shared in ((2, 3), (2, 2), (12, 1)))


class Ring:
    """Collectives of the N ranks of a group, each of which sends to the next only; `sent` counts bytes by name."""

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.after, self.before = (dist.get_global_rank(group or dist.group.WORLD, (self.rank + step) % self.size)
                                   for step in (1, -1))  # fmt: skip
        self.sent: dict[str, int] = {}

    def pass_on(self, name: str, part: Tensor) -> Tensor:
        """What the rank before passes on, of the same shape."""
        received = torch.empty_like(part)
        sending = dist.P2POp(dist.isend, part.contiguous(), self.after, self.group)
        receiving = dist.P2POp(dist.irecv, received, self.before, self.group)
        for request in dist.batch_isend_irecv([sending, receiving]):
            request.wait()
        self.sent[name] = self.sent.get(name, 0) + part.nbytes
        return received

    def reduce_scatter(self, whole: Tensor) -> Tensor:
        """(N n,) -> (n,): of the sum over all ranks part r on rank r. A sum goes round and comes home when it is whole."""
        parts = whole.view(self.size, -1)
        total = parts[self.rank - 1]
        for step in range(1, self.size):
            total = self.pass_on("reduce_scatter", total) + parts[self.rank - 1 - step]
        return total.clone() if self.size == 1 else total

    def all_gather(self, part: Tensor, whole: Tensor) -> None:
        """Into `whole` (N n,) the parts (n,) of all ranks, that of rank r at r n."""
        parts = whole.view(self.size, -1)
        parts[self.rank] = part
        for step in range(1, self.size):
            parts[self.rank - step] = self.pass_on("all_gather", parts[self.rank - step + 1])


class Flat:
    """Parameters one after the other in one buffer, with zeros behind them until it divides by the number of ranks.

    `whole` is the buffer, `shard` this rank's part of it: a parameter of its own for the optimizer. The parameters are views
    of the buffer, whose memory can be taken away (`free`) and given back (`gather`) under them.
    """

    def __init__(self, parameters: list[nn.Parameter], ring: Ring, stage: int):
        first = parameters[0]
        for parameter in parameters:
            if (parameter.dtype, parameter.device) != (first.dtype, first.device):
                raise ValueError(f"groups: {first.dtype} on {first.device} beside {parameter.dtype} on {parameter.device}")
        self.parameters, self.ring, self.stage = parameters, ring, stage
        self.yielded, self.held = 0, False  # gradients that are there; whether a backward pass is at work
        self.sizes = [parameter.numel() for parameter in parameters]
        self.padding = -sum(self.sizes) % ring.size
        with torch.no_grad():
            self.whole = torch.cat([*(p.flatten() for p in parameters), first.new_zeros(self.padding)])  # (N n,)
            mine = self.whole.view(ring.size, -1)[ring.rank]
            self.shard = nn.Parameter(mine.clone() if stage == 3 else mine)  # (n,)
        for parameter, view in zip(parameters, self.whole.split([*self.sizes, self.padding]), strict=False):
            parameter.data = view.view_as(parameter)
        self.bytes = self.whole.nbytes
        self.free()

    def gather(self) -> None:
        """Give the parameters their numbers, from all ranks."""
        storage = self.whole.untyped_storage()
        if self.stage < 3 or storage.nbytes() == 0:
            storage.resize_(self.bytes)
            self.ring.all_gather(self.shard.detach(), self.whole)

    def hold(self) -> None:
        """Gather, and keep until the gradients are there, also if the forward pass is run again meanwhile."""
        self.gather()
        self.held = True

    def free(self) -> None:
        self.held = False
        if self.stage == 3:
            self.whole.untyped_storage().resize_(0)

    def reduce(self) -> None:
        """Of the mean over ranks of the parameters' gradients this rank's part, added to that of earlier passes; they go."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        whole = torch.cat([*(grad.flatten() for grad in grads), self.shard.new_zeros(self.padding)])  # (N n,)
        part = self.ring.reduce_scatter(whole).div_(self.ring.size)
        self.shard.grad = part if self.shard.grad is None else self.shard.grad.add_(part)
        self.yielded = 0
        for parameter in self.parameters:
            parameter.grad = None


class Zero:
    """A module whose weights, gradients and optimizer state N ranks share out, and the optimizer.

    module: in place; the same weights on every rank, and on all the same parameters take part in a pass.
    make: from groups of parameters to an optimizer of ours that treats each number by itself, as `partial(AdamW, lr=1e-3)`;
        one that looks at matrices (muon) would see flat vectors.
    stage: 1, 2 or 3, as the table above says; units: the modules whose parameters are flattened, reduced and (stage 3)
        gathered together, sublayers say, whose output is a tensor; what is in none of them, or in several, makes one more
        with the module itself.
    groups: parameters and their settings, as torch.optim has them; by default all that learn, in one.

        zero = Zero(model, partial(AdamW, lr=1e-3), stage=3, units=model.stack)
        loss = model(tokens, targets); loss.backward()       the gradients are the mean over ranks: each loss is of the step
        zero.clip(1.0); zero.step()

    `optimizer` is the optimizer, whose parameters are this rank's shards: a schedule sets the rates of its groups, and its
    state_dict is this rank's part of the state. `sent` counts the bytes this rank has sent, by collective.
    ValueError for another stage, or for groups that do not hold each parameter that learns once.
    """

    def __init__(
        self,
        module: nn.Module,
        make: Callable[[list[dict]], torch.optim.Optimizer],
        *,
        stage: int,
        units: Iterable[nn.Module] = (),
        groups: list[dict] | None = None,
        group: dist.ProcessGroup | None = None,
    ):
        if stage not in STAGES:
            raise ValueError(f"stage: 1, 2 or 3, not {stage!r}")
        learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [dict(params=learning)] if groups is None else groups
        number_of = {parameter: number for number, options in enumerate(groups) for parameter in options["params"]}
        if sorted(map(id, learning)) != sorted(id(parameter) for options in groups for parameter in options["params"]):
            raise ValueError(f"groups: they hold {len(number_of)} parameters, not each of the {len(learning)} that learn once")
        self.stage, self.ring = stage, Ring(group)
        self.flats: list[Flat] = []
        shards: list[list[Tensor]] = [[] for _ in groups]
        for unit, parameters in homes(module, list(units), learning):
            own = []
            for number, many in enumerate(shards):
                members = [parameter for parameter in parameters if number_of[parameter] == number]
                if members:
                    own.append(Flat(members, self.ring, stage))
                    many.append(own[-1].shard)
            self.flats += own
            self.watch(unit, own)
        self.optimizer = make([{**options, "params": many} for options, many in zip(groups, shards, strict=True) if many])

    @property
    def sent(self) -> dict[str, int]:
        return self.ring.sent

    def watch(self, unit: nn.Module, flats: list[Flat]) -> None:
        """Stage 2 reduces gradients as soon as they are there; stage 3 gathers weights before a unit needs them."""
        for flat in flats if self.stage >= 2 else []:
            for parameter in flat.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, flat=flat: self.on_gradient(flat))
        if self.stage == 3 and flats:
            unit.register_forward_pre_hook(lambda *_: on_each(flats, Flat.gather))
            unit.register_forward_hook(lambda unit, given, y: after_forward(flats, y))

    def on_gradient(self, flat: Flat) -> None:
        """A parameter's gradient is there. With the last one of a flat its weights have done what they are for."""
        flat.yielded += 1
        if flat.yielded == len(flat.parameters):
            flat.reduce()
            flat.free()

    def reduce(self) -> None:
        """Gradients that no hook has reduced: all of stage 1, and those of parameters that stood beside an unused one."""
        for flat in self.flats:
            if any(parameter.grad is not None for parameter in flat.parameters):
                flat.reduce()
            flat.free()

    def clip(self, most: float) -> float:
        """The norm of the gradient of all parameters, which is then scaled down to `most` where it is more."""
        self.reduce()
        grads = [flat.shard.grad for flat in self.flats if flat.shard.grad is not None]
        total = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2 for grad in grads]).sum()
        dist.all_reduce(total, group=self.ring.group)
        norm = math.sqrt(total.item())
        for grad in grads if norm > most else []:
            grad.mul_(most / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_ has it
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """One step of the optimizer on this rank's part; then, before stage 3, each rank has all weights again."""
        self.reduce()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for flat in self.flats if self.stage < 3 else []:
            flat.gather()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In it the module has all its weights on every rank, at any stage: to be saved, say. They are not to be changed."""
        on_each(self.flats, Flat.gather)
        try:
            yield
        finally:
            on_each(self.flats, Flat.free)

    def held(self) -> dict[str, int]:
        """Bytes that this rank holds now, of parameters that learn."""
        parameters = [parameter for flat in self.flats for parameter in (*flat.parameters, flat.shard)]
        weights = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in parameters}
        gradients = sum(parameter.grad.nbytes for parameter in parameters if parameter.grad is not None)
        state = [value for state in self.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
        return dict(weights=sum(weights.values()), gradients=gradients, state=sum(value.nbytes for value in state))


def after_forward(flats: list[Flat], y: Tensor) -> None:
    """The weights can go, until the gradient of y is there. A pass that is run again in the backward pass changes nothing."""
    if not any(flat.held for flat in flats):
        on_each(flats, Flat.free)
        if y.requires_grad:
            y.register_hook(lambda gradient: on_each(flats, Flat.hold))


def on_each(flats: list[Flat], do: Callable[[Flat], None]) -> None:
    for flat in flats:
        do(flat)


def homes(
    module: nn.Module, units: list[nn.Module], learning: list[nn.Parameter]
) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Each unit with the parameters that are in it alone, and the module with all others."""
    inside = [set(unit.parameters()) for unit in units]
    users = {parameter: [i for i, own in enumerate(inside) if parameter in own] for parameter in learning}
    for i, unit in enumerate(units):
        yield unit, [parameter for parameter in learning if users[parameter] == [i]]
    yield module, [parameter for parameter in learning if len(users[parameter]) != 1]
