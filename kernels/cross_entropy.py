"""Cross-entropy of rows of logits, with label smoothing, a z-loss and a soft cap.

    z = c tanh(logits / c)                                     z = logits where the soft cap c is 0
    l = log sum_j exp(z_j)                                     log-sum-exp of each row
    loss = l - (1 - s) z_target - s mean_j z_j + w l^2         in nats; s label smoothing, w the weight of the z-loss
    dz_j = (1 + 2 w l) exp(z_j - l) - (1 - s) [j = target] - s / V

Rows whose target is `ignore_index` have loss 0. Label smoothing: Szegedy et al. 2015 (arXiv:1512.00567), section 7; z-loss:
Chowdhery et al. 2022, PaLM (arXiv:2204.02311), section 5; soft cap: Gemma Team 2024 (arXiv:2408.00118), section 2. The sum in
one pass, scaled anew whenever a larger logit comes: Milakov and Gimelshein 2018 (arXiv:1805.02867). Probabilities are never
stored: the backward pass has them from l.

With N rows of V logits of b bytes, and 12 FLOPs more a logit for a soft cap:
    forward    4 N V FLOPs      N V b bytes moved: the logits are read
    backward   5 N V FLOPs      2 N V b bytes moved: the logits are read, their gradient is written
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import INTERPRETED, Function, apply, launch, on_triton, power_of_2, tanh, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

SLICE = 2**19  # logits that a CPU works on at once: 2 MB in float32, which stays in its caches

# N rows, V words


def reference(logits, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0):
    z = softcap * np.tanh(logits / softcap) if softcap else logits
    top = z.max(-1)
    lse = top + np.log(np.exp(z - top[:, None]).sum(-1))
    losses = np.zeros(len(z))
    for n, target in enumerate(targets):
        if target != ignore_index:
            losses[n] = lse[n] - (1 - label_smoothing) * z[n, target] - label_smoothing * z[n].mean() + z_loss * lse[n] ** 2
    return losses, lse


def reference_backward(grads, logits, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0):
    z = softcap * np.tanh(logits / softcap) if softcap else logits
    (dlosses, dlse), V = grads, z.shape[1]
    lse = reference(logits, targets, softcap=softcap, ignore_index=ignore_index)[1]
    p = np.exp(z - lse[:, None])
    dz = dlse[:, None] * p
    for n, target in enumerate(targets):
        if target != ignore_index:
            dz[n] += dlosses[n] * ((1 + 2 * z_loss * lse[n]) * p[n] - label_smoothing / V)
            dz[n, target] -= dlosses[n] * (1 - label_smoothing)
    return dict(logits=dz * (1 - (z / softcap) ** 2) if softcap else dz)


@triton.jit
def forward_kernel(
    logits, targets, losses, lses, V, distance, ignore_index, smoothing, z_loss, softcap, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program, in blocks of columns. Each lane has its own maximum and sum until the end: one exp a logit."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * distance
    target = tl.load(targets + row)
    top = tl.full((BLOCK,), -3e38, tl.float32)  # finite, so that no difference of infinities arises
    total = tl.zeros((BLOCK,), tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, columns < V, -float("inf")).to(tl.float32)
        if softcap is not None:
            z = tl.where(columns < V, softcap * tanh(z / softcap), -float("inf"))
        if smoothing is not None:
            summed += tl.where(columns < V, z, 0.0)
        e = tl.exp(-tl.abs(z - top))  # of the smaller to the larger of the two
        total = tl.where(z > top, total * e + 1, total + e)
        top = tl.maximum(top, z)
    highest = tl.max(top, 0)
    lse = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    picked = tl.load(logits + target, (target >= 0) & (target < V), float("nan")).to(tl.float32)
    if softcap is not None:
        picked = softcap * tanh(picked / softcap)
    loss = lse - picked
    if smoothing is not None:
        loss += smoothing * (picked - tl.sum(summed, 0) / V)
    if z_loss is not None:
        loss += z_loss * lse * lse
    tl.store(losses + row, tl.where(target == ignore_index, 0.0, loss))
    tl.store(lses + row, lse)


@triton.jit
def backward_kernel(
    logits, targets, lses, dlosses, dlses, dlogits, V, distance, ignore_index, smoothing, z_loss, softcap, BLOCK: tl.constexpr
):  # fmt: skip
    """A block of columns of one row a program."""
    blocks = tl.cdiv(V, BLOCK)
    row = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    lse = tl.load(lses + row)
    dloss = tl.where(target == ignore_index, 0.0, tl.load(dlosses + row))
    z = tl.load(logits + row.to(tl.int64) * distance + columns, columns < V, 0).to(tl.float32)
    slope = 1.0
    if softcap is not None:
        capped = tanh(z / softcap)
        slope = 1 - capped * capped
        z = softcap * capped
    scale = dloss + tl.load(dlses + row)
    if z_loss is not None:
        scale += dloss * 2 * z_loss * lse
    d = tl.exp(z - lse) * scale
    hit = dloss
    if smoothing is not None:
        d -= dloss * (smoothing / V)
        hit = dloss * (1 - smoothing)
    d = (d - tl.where(columns == target, hit, 0.0)) * slope
    tl.store(dlogits + row.to(tl.int64) * V + columns, d, columns < V)


def slices(logits: Tensor) -> list[slice]:
    """Rows that a CPU works on at once."""
    step = max(1, SLICE // logits.shape[1])
    return [slice(start, start + step) for start in range(0, len(logits), step)]


def by_slices(
    logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """losses (N,) and lse (N,) by PyTorch."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses, lse = logits.new_empty(len(logits), dtype=wide), logits.new_empty(len(logits), dtype=wide)
    ignored = targets == ignore_index
    at = targets.masked_fill(ignored, 0)[:, None]
    for rows in slices(logits):
        z = logits[rows].to(wide)
        if softcap:
            z = (z / softcap).tanh_().mul_(softcap)
        p = torch.log_softmax(z, -1)
        l = torch.sub(z.amax(-1), p.amax(-1), out=lse[rows])  # noqa: E741
        loss = torch.mul(p.gather(1, at[rows])[:, 0], smoothing - 1, out=losses[rows])
        if smoothing:
            loss.sub_(p.mean(-1), alpha=smoothing)
        if z_loss:
            loss.addcmul_(l, l, value=z_loss)
    return losses.masked_fill_(ignored, 0), lse


def back_by_slices(
    logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, dlse: Tensor,
    ignore_index: int, smoothing: float, z_loss: float, softcap: float,
) -> Tensor:  # fmt: skip
    """The gradient of the logits (N, V) by PyTorch."""
    d = logits.new_empty(logits.shape)
    ignored = targets == ignore_index
    at = targets.masked_fill(ignored, 0)[:, None]
    dlosses = dlosses.masked_fill(ignored, 0)
    scale = (dlosses + dlse).addcmul_(dlosses, lse, value=2 * z_loss)[:, None]
    hit, evenly = (dlosses * (smoothing - 1))[:, None], (dlosses * (smoothing / logits.shape[1]))[:, None]
    for rows in slices(logits):
        z = logits[rows].to(lse.dtype)
        if softcap:
            z = (z / softcap).tanh_()
            slope = 1 - z * z
            z.mul_(softcap)
        own = d[rows] if d.dtype == lse.dtype else torch.empty_like(z)
        torch.softmax(z, -1, out=own).mul_(scale[rows])
        if smoothing:
            own.sub_(evenly[rows])
        own.scatter_add_(1, at[rows], hit[rows])
        if softcap:
            own.mul_(slope)
        if d.dtype != lse.dtype:
            d[rows] = own
    return d


# In a trace the loops over slices are one node each.
traced_by_slices = torch.library.custom_op("rosetta::cross_entropy", by_slices, mutates_args=())
traced_back_by_slices = torch.library.custom_op("rosetta::cross_entropy_backward", back_by_slices, mutates_args=())


@traced_by_slices.register_fake
def _(logits, targets, ignore_index, smoothing, z_loss, softcap):
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(len(logits), dtype=wide), logits.new_empty(len(logits), dtype=wide)


@traced_back_by_slices.register_fake
def _(logits, targets, lse, dlosses, dlse, ignore_index, smoothing, z_loss, softcap):
    return logits.new_empty(logits.shape)


class CrossEntropy(Function):
    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, ignore_index: int, smoothing: float, z_loss: float, softcap: float):
        ctx.options = ignore_index, smoothing, z_loss, softcap
        if on_triton(logits):
            logits = logits if logits.stride(1) == 1 else logits.contiguous()
            targets, (N, V) = targets.contiguous(), logits.shape
            losses, lse = logits.new_empty(N, dtype=torch.float32), logits.new_empty(N, dtype=torch.float32)
            numbers = V, logits.stride(0), ignore_index, smoothing or None, z_loss or None, softcap or None
            launch(forward_kernel, (N,), logits, targets, losses, lse, *numbers, **block(V))
        else:
            compute = traced_by_slices if torch.compiler.is_compiling() else by_slices
            losses, lse = compute(logits, targets, *ctx.options)
        ctx.save_for_backward(logits, targets, lse)
        return losses, lse

    @staticmethod
    def backward(ctx, dlosses: Tensor, dlse: Tensor):
        logits, targets, lse = ctx.saved_tensors
        if on_triton(logits):
            (N, V), d = logits.shape, logits.new_empty(logits.shape)
            numbers = V, logits.stride(0), ctx.options[0], *(option or None for option in ctx.options[1:])
            grid = (N * -(-V // block(V)["BLOCK"]),)
            dlosses, dlse = dlosses.contiguous(), dlse.contiguous()
            launch(backward_kernel, grid, logits, targets, lse, dlosses, dlse, d, *numbers, **block(V))
        else:
            compute = traced_back_by_slices if torch.compiler.is_compiling() else back_by_slices
            d = compute(logits, targets, lse, dlosses, dlse, *ctx.options)
        return d, None, None, None, None, None


def block(V: int) -> dict:
    """Columns that a program works on at once."""
    return dict(BLOCK=min(power_of_2(V), 32 if INTERPRETED else 4096), num_warps=8 if V > 1024 else 4)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The loss of each row of logits, in nats, and the logarithm of its sum of exponentials.

    logits (N, V); targets (N,) int64, each a column or `ignore_index`, whose rows have loss 0 and pass on no gradient of it.
    label_smoothing: the share of the target's probability that goes to all words evenly; z_loss: the weight of lse^2;
    softcap: logits are first kept within ±softcap, 0 for no bound. Returns losses (N,) and lse (N,) in float32 (float64
    for float64); both can be differentiated. ValueError for an argument that does not fit; on a GPU, where looking
    would mean waiting, a target that is no column has the loss NaN.
    """
    require(logits.ndim == 2 and logits.is_floating_point() and logits.shape[1] > 0, "logits",
            f"floating point (N, V) with V > 0, not {logits.dtype} {tuple(logits.shape)}")  # fmt: skip
    N, V = logits.shape
    require(targets.shape == (N,) and targets.dtype == torch.int64, "targets",
            f"int64 ({N},), not {targets.dtype} {tuple(targets.shape)}")  # fmt: skip
    require(0 <= label_smoothing <= 1, "label_smoothing", f"from 0 to 1, not {label_smoothing}")
    require(z_loss >= 0, "z_loss", f"at least 0, not {z_loss}")
    require(softcap >= 0, "softcap", f"at least 0, not {softcap}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = targets[((targets < 0) | (targets >= V)) & (targets != ignore_index)]
        require(len(wrong) == 0, "targets", f"columns from 0 to {V - 1} or {ignore_index}, not {wrong[:1].tolist()}")
    return apply(CrossEntropy, logits, targets, ignore_index, label_smoothing, z_loss, softcap)


def pytorch(logits, targets, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0):
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = softcap * torch.tanh(z / softcap) if softcap else z
    lse = z.logsumexp(-1)
    losses = F.cross_entropy(z, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    return losses + torch.where(targets == ignore_index, 0, z_loss * lse**2), lse


def inputs(draw: Draw) -> dict:
    N, V = draw.one_of(0, 1, 3, 9), draw.one_of(1, 2, 31, 32, 70, 130)
    ignore_index = draw.one_of(-100, -1, 0)
    targets = draw.integers(N, high=V - 1)
    targets[draw.uniform(N) < draw.one_of(0.0, 0.4)] = ignore_index
    return dict(
        logits=draw.normal(N, V, scale=draw.one_of(1.0, 0.1, 20.0)),
        targets=targets,
        ignore_index=ignore_index,
        label_smoothing=draw.one_of(0.0, 0.1, 1.0),
        z_loss=draw.one_of(0.0, 1e-2),
        softcap=draw.one_of(0.0, 3.0, 30.0),
    )


def cost(logits, targets, *, softcap=0.0, **_) -> tuple[Cost, Cost]:
    more = 12 if softcap else 0
    return Cost((4 + more) * logits.numel(), bytes_of(logits)), Cost((5 + more) * logits.numel(), 2 * bytes_of(logits))


EXTRAS = dict(label_smoothing=0.1, z_loss=1e-4, softcap=30.0)
SPEC = Spec(
    op=cross_entropy,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("logits",),
    cost=cost,
    gpu=(
        dict(logits=Shape((8192, 50304)), targets=Shape((8192,), below=50304)),
        dict(logits=Shape((4096, 50257)), targets=Shape((4096,), below=50257)),
        dict(logits=Shape((2048, 262144)), targets=Shape((2048,), below=262144), **EXTRAS),
    ),
    cpu=(
        dict(logits=Shape((4096, 256)), targets=Shape((4096,), below=256)),
        dict(logits=Shape((512, 50257)), targets=Shape((512,), below=50257)),
    ),
)
