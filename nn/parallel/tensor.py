"""Tensor parallelism: the heads of a mixer and the neurons of an ffn, shared out; the positions between them too.

Shoeybi et al. 2019, "Megatron-LM" (arXiv:1909.08053), section 3; Korthikanti et al. 2022 (arXiv:2205.05198), section 4.2.2. A
layer f is a sum of n parts, each with its own heads or neurons: matrices that read the stream are cut by rows (of W, which
maps x to x W^T), those that write it by columns.

    x of a rank's positions -- gather --> x of the row -- its part of f --> a summand -- scatter_sum --> y of its positions

Norms, residual sums, embedding and head then run on the rank's own positions, T / n of them. They are whole on every rank, and
the sum of the ranks' gradients is theirs. A layer without such parts is computed whole by all, each keeping its positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.func import functional_call

from nn.attention.gqa import GQA
from nn.context import Context
from nn.ffn import GLU, MLP
from nn.linear import cast_once
from nn.moe.moe import MoE
from nn.parallel.collectives import add_up
from nn.parallel.mixers import WholeRow
from nn.parallel.overlap import overlap
from nn.parallel.sequence import Sequence
from nn.position.none import NoPosition
from nn.ssm.mamba2 import Mamba2


@dataclass
class Cut:
    """How the parameters of a layer are shared out, by their names in it; those not named are whole everywhere."""

    along: dict[str, int] = field(default_factory=dict)  # a rank keeps its share along this axis
    rows: dict[str, Tensor] = field(default_factory=dict)  # whole, but a rank's part of the layer reads these rows
    once: tuple[str, ...] = ()  # biases of the sum over ranks: each adds its n-th part


def cut_glu(layer: GLU | MLP, rank: int, n: int, group: dist.ProcessGroup) -> Cut:
    read = [f"{name}.{kind}" for name in ("gate", "up") for kind in ("weight", "bias")]
    return Cut(dict.fromkeys(read, 0) | {"down.weight": 1}, once=("down.bias",))


def cut_moe(layer: MoE, rank: int, n: int, group: dist.ProcessGroup) -> Cut:
    """Every expert's neurons are shared out; the router, whole, sends the same tokens the same way on all ranks."""
    read = {f"{kind}.{name}.weight": 1 for kind in ("experts", "shared") for name in ("gate", "up")}
    return Cut(read | {f"{kind}.down.weight": 2 for kind in ("experts", "shared")})


def cut_gqa(layer: GQA, rank: int, n: int, group: dist.ProcessGroup) -> Cut | None:
    if layer.bias.__func__ is not NoPosition.bias or layer.qk_norm == "all":
        return None  # a learned bias of all heads, or a norm over them
    for name, heads in (("heads", layer.heads), ("kv_heads", layer.kv_heads)):
        if heads % n:
            raise ValueError(f"mesh: tp={n} cannot share out {heads} {name} evenly")
    layer.heads, layer.kv_heads = layer.heads // n, layer.kv_heads // n
    layer.slopes = None if layer.slopes is None else layer.slopes.chunk(n)[rank]
    read = [f"{name}.{kind}" for name in ("query", "key", "value", "gate") for kind in ("weight", "bias")]
    along = dict.fromkeys(read, 0) | {"sinks": 0, "value_table.weight": 1, "out.weight": 1}
    return Cut(along, once=("out.bias",))


def cut_mamba2(layer: Mamba2, rank: int, n: int, group: dist.ProcessGroup) -> Cut:
    """By heads. B and C are those of the rank's groups, or of the one group there is, by all ranks; the norm is over all."""
    E, H, G, N = layer.inner, layer.heads, layer.groups, layer.state
    if H % n or G > 1 and G % n:
        raise ValueError(f"mesh: tp={n} cannot share out {H} heads in {G} groups evenly")
    if G == 1 and n > 1:
        layer.normed = lambda y: rms_norm_over(group, y, layer.gain, E, layer.eps)
    at = torch.arange(2 * E + 2 * G * N + H)
    z, X, B, C, d = at.split([E, E, G * N, G * N, H])
    z, X, d = (rows.chunk(n)[rank] for rows in (z, X, d))
    B, C = (rows.chunk(n)[rank] if G > 1 else rows for rows in (B, C))
    layer.inner, layer.heads, layer.groups = E // n, H // n, max(1, G // n)
    layer.mixed = layer.inner + 2 * layer.groups * N
    up, mixed = torch.cat([z, X, B, C, d]), torch.cat([X, B, C]) - E
    rows = {"up.weight": up, "up.bias": up, "taps": mixed, "taps_bias": mixed}
    return Cut({"dt_bias": 0, "A_log": 0, "D": 0, "gain": 0, "out.weight": 1}, rows, once=("out.bias",))


CUTS: dict[type[nn.Module], Callable] = {GQA: cut_gqa, GLU: cut_glu, MLP: cut_glu, MoE: cut_moe, Mamba2: cut_mamba2}


class TensorParallel:
    """The branch of a residual sublayer, its layer shared out among the ranks of a mesh of one axis."""

    def __init__(self, layer: nn.Module, cut: Cut, mesh: DeviceMesh, sequence: Sequence, overlapped: bool = False):
        self.layer, self.sequence, self.size = layer, sequence, mesh.size()
        self.overlapped = overlapped and overlap(layer, sequence.group)
        parameters = dict(layer.named_parameters())
        self.along = {name: axis for name, axis in cut.along.items() if name in parameters}
        self.rows = {name: rows for name, rows in cut.rows.items() if name in parameters}
        self.once = [] if self.overlapped else [name for name in cut.once if name in parameters]
        for name, axis in self.along.items():
            path, _, last = name.rpartition(".")
            parameter = parameters[name]
            share = distribute_tensor(parameter.detach(), mesh, [Shard(axis)], src_data_rank=None)
            setattr(layer.get_submodule(path), last, nn.Parameter(share, requires_grad=parameter.requires_grad))

    def __call__(self, x: Tensor, context: Context) -> Tensor:
        if self.overlapped:
            return functional_call(self.layer, self.own(), (x, context.whole))
        x = self.sequence.whole(cast_once(x))  # (B, T, C)
        return self.sequence.summed(functional_call(self.layer, self.own(), (x, context.whole)))

    def own(self) -> dict[str, Tensor]:
        """The parameters as this rank's part of the layer reads them."""
        given = dict(self.layer.named_parameters())
        own = {name: given[name].to_local() for name in self.along}
        own |= {name: given[name].index_select(0, rows.to(given[name].device)) for name, rows in self.rows.items()}
        return own | {name: given[name] / self.size for name in self.once}


def share_layers(model: nn.Module, mesh: DeviceMesh, overlapped: bool = False) -> None:
    """In place: every sublayer of the model's stack, and the positions of a row, shared out among the ranks of `mesh`.

    `overlapped`: layers that can (nn/parallel/overlap.py) compute while their messages travel.
    """
    group = mesh.get_group()
    sequence = Sequence(group)
    for residual in model.stack:
        residual.branch = shared_branch(residual, mesh, sequence, overlapped)
    model.sequences.append(sequence)


def shared_branch(residual: nn.Module, mesh: DeviceMesh, sequence: Sequence, overlapped: bool) -> Callable:
    layers = {"": residual.layer}
    if hasattr(residual.layer, "branches"):
        layers = {f"branches.{i}.": branch for i, branch in enumerate(residual.layer.branches)}
    cutters = {prefix: cutter_of(layer) for prefix, layer in layers.items()}
    made = Cut()
    for prefix, cutter in cutters.items():
        cut = cutter(layers[prefix], sequence.rank, sequence.size, sequence.group) if all(cutters.values()) else None
        if cut is None:
            return WholeRow(residual.branch, sequence)
        made.along |= {prefix + name: axis for name, axis in cut.along.items()}
        made.rows |= {prefix + name: rows for name, rows in cut.rows.items()}
        made.once += tuple(prefix + name for name in cut.once)
    return TensorParallel(residual.layer, made, mesh, sequence, overlapped)


def cutter_of(layer: nn.Module) -> Callable | None:
    """How to cut a layer of this class, or of one that computes in the same way."""
    alike = (kind for kind in CUTS if isinstance(layer, kind) and type(layer).forward is kind.forward)
    return CUTS.get(next(alike, None))


class SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' x, which each of them uses in its own way: so the gradient is a sum over ranks too."""

    @staticmethod
    def forward(ctx, x: Tensor, group) -> Tensor:
        ctx.group = group
        y = x.clone()
        add_up(y, group)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.clone()
        add_up(dx, ctx.group)
        return dx, None


def rms_norm_over(group: dist.ProcessGroup, y: Tensor, gain: Tensor, width: int, eps: float) -> Tensor:
    """RMSNorm over `width` channels, of which this rank has those of y (B, T, E / n) and of gain (E / n,)."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    square = SumOverRanks.apply(wide.square().sum(-1, keepdim=True), group)
    return (wide * torch.rsqrt(square / width + eps)).to(y.dtype) * gain
