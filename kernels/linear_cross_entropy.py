"""The head and its loss in one: cross-entropy of x head^T, of which only a slice of rows exists at a time.

    z = c tanh((x head^T) / c)                                 logits (N, V); z = x head^T where the soft cap c is 0
    l = log sum_j exp(z_j)                                     log-sum-exp of each row
    loss = l - (1 - s) z_target - s mean_j z_j + w l^2         s label smoothing, w the weight of the z-loss
    dz_j = (1 + 2 w l) exp(z_j - l) - (1 - s) [j = target] - s / V

The logits are by far the largest array of a training step. Here a slice of them is made, turned into the loss, then in
place into its gradient and at once into those of both inputs, and dropped: Wijmans et al. 2024, "Cut Your Losses in
Large-Vocabulary Language Models" (arXiv:2411.09009); gradients made in the forward pass: Hsu et al. 2024, "Liger
Kernel" (arXiv:2410.10989), section 3.2; chunks of a sequence through the head: Luo et al. 2025, "StreamBP"
(arXiv:2506.03077). Soft cap: Gemma Team 2024 (arXiv:2408.00118); z-loss: Chowdhery et al. 2022 (arXiv:2204.02311).

With N tokens, V words, C dims, b bytes a number: 6 N V C FLOPs (forward 2, gradients 4; 8 where they are made in the
backward pass) and at least (2 N C + 2 V C) b bytes; a slice of n rows of logits is n V b bytes, the plain way N V b.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.launch import Function, apply, launch, on_triton, power_of_2, tanh, tl, triton
from kernels.spec import Cost, Draw, Shape, Spec, bytes_of, require

SLICE_ON_CPU = 2**22  # logits of one slice: 16 MB in float32, which a CPU's last cache holds …
ROWS_ON_CPU = 256  # … but no fewer rows than this, which would make the sums over slices dear
SLICE_ON_GPU = 2**27  # 256 MB in bfloat16: products large enough to run at full speed

# N tokens, V words, C model dim, n tokens of a slice


def reference(x, head, targets, *, ignore_index=-100, softcap=0.0, label_smoothing=0.0, z_loss=0.0, reduction="sum"):
    z = x @ head.T
    z = softcap * np.tanh(z / softcap) if softcap else z
    top = z.max(-1, keepdims=True)
    l = (top + np.log(np.exp(z - top).sum(-1, keepdims=True)))[:, 0]  # noqa: E741
    counts = targets != ignore_index
    picked = z[np.arange(len(z)), np.where(counts, targets, 0)]
    losses = l - (1 - label_smoothing) * picked - label_smoothing * z.mean(-1) + z_loss * l**2
    losses = np.where(counts, losses, 0.0)
    return losses if reduction == "none" else losses.sum()


def reference_backward(
    grads, x, head, targets, *, ignore_index=-100, softcap=0.0, label_smoothing=0.0, z_loss=0.0, reduction="sum"
):
    logits = x @ head.T
    z = softcap * np.tanh(logits / softcap) if softcap else logits
    e = np.exp(z - z.max(-1, keepdims=True))
    l = z.max(-1, keepdims=True) + np.log(e.sum(-1, keepdims=True))  # noqa: E741
    dz = (1 + 2 * z_loss * l) * e / e.sum(-1, keepdims=True) - label_smoothing / z.shape[-1]
    counts = targets != ignore_index
    dz[np.arange(len(z)), np.where(counts, targets, 0)] -= 1 - label_smoothing
    dz *= (counts * grads[0])[:, None]  # one gradient a token, or one for the sum
    d = dz * (1 - (z / softcap) ** 2) if softcap else dz
    return dict(x=d @ head, head=d.T @ x)


@triton.jit
def loss_kernel(
    logits, targets, losses, V, ignore_index, softcap, smoothing, z_loss, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program: its loss in one pass over the logits, and in a second one their gradient in their place."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * V
    target = tl.load(targets + row)
    counts = target != ignore_index
    top = -float("inf")
    total, summed, picked = 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = tl.load(logits + columns, columns < V, -float("inf")).to(tl.float32)
        if softcap is not None:
            z = tl.where(columns < V, softcap * tanh(z / softcap), -float("inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
        summed += tl.sum(tl.where(columns < V, z, 0.0), 0)
        picked += tl.sum(tl.where(columns == target, z, 0.0), 0)
    lse = top + tl.log(total)
    loss = lse - (1 - smoothing) * picked - smoothing * summed / V + z_loss * lse * lse
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            z = tl.load(logits + columns, columns < V, -float("inf")).to(tl.float32)
            slope = tl.full((BLOCK,), 1.0, tl.float32)
            if softcap is not None:
                capped = tanh(z / softcap)
                slope = 1 - capped * capped
                z = softcap * capped
            d = (1 + 2 * z_loss * lse) * tl.exp(z - lse) - smoothing / V - tl.where(columns == target, 1 - smoothing, 0.0)
            tl.store(logits + columns, tl.where(counts, d * slope, 0.0), columns < V)


def slices(x: Tensor, head: Tensor) -> list[slice]:
    """Rows of x whose logits are in memory together."""
    V = max(1, head.shape[0])
    step = max(ROWS_ON_CPU, SLICE_ON_CPU // V) if x.device.type == "cpu" else max(1024, SLICE_ON_GPU // V)
    return [slice(start, start + step) for start in range(0, len(x), step)]


def slice_loss(logits: Tensor, targets: Tensor, options: tuple, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """(n,) losses of a slice and, if wanted, the gradient of its logits (n, V) in their dtype; logits are overwritten.

    Rows of ignored targets have the loss 0, but any gradient.
    """
    ignore_index, softcap, smoothing, z_loss = options
    n, V = logits.shape
    if on_triton(logits):
        losses = logits.new_empty(n, dtype=torch.float32)
        block = min(power_of_2(V), 4096)
        numbers = V, ignore_index, softcap or None, smoothing, z_loss
        launch(loss_kernel, (n,), logits, targets, losses, *numbers, GRADIENT=gradient, BLOCK=block)
        return losses, logits if gradient else None
    wide = torch.promote_types(logits.dtype, torch.float32)
    capped = torch.tanh(logits.to(wide) / softcap) if softcap else None
    z = capped * softcap if softcap else logits
    p = z.to(wide).softmax(-1)
    lse = z.amax(-1).to(wide) - p.amax(-1).log()  # the likeliest word's p is at least 1/V: its logarithm is safe
    ignored = targets == ignore_index
    at = targets.masked_fill(ignored, 0)[:, None]
    losses = lse - (1 - smoothing) * z.gather(1, at)[:, 0].to(wide)
    if smoothing:
        losses -= smoothing * z.mean(-1, dtype=wide)
    if z_loss:
        losses += z_loss * lse.square()
    losses = losses.masked_fill(ignored, 0)
    if not gradient:
        return losses, None
    rows = torch.arange(n, device=logits.device)
    picked = p[rows, at[:, 0]]
    if z_loss:
        factor = 1 + 2 * z_loss * lse
        p, picked = p.mul_(factor[:, None]), picked * factor
    if smoothing:
        p, picked = p.sub_(smoothing / V), picked - smoothing / V
    d = p.to(logits.dtype)
    d[rows, at[:, 0]] = (picked - (1 - smoothing)).to(d.dtype)  # indexing, because scatter would copy all of d
    if softcap:
        d = d.mul_(1 - capped.square_())
    return losses, d


def gradients(x: Tensor, matrix: Tensor, ignored: Tensor, d: Tensor, dx: Tensor, dhead: Tensor) -> None:
    """From the gradient of a slice of logits those of its rows of x, and its share of the head's.

    `ignored` (n,) rows count nothing: zeros in x and dx are cheaper than in d, whose rows are longer.
    """
    torch.mm(d, matrix, out=dx)
    dx.masked_fill_(ignored[:, None], 0)
    x = x.masked_fill(ignored[:, None], 0)
    dhead.addmm_(d.mT, x) if dhead.dtype == x.dtype else dhead.add_(d.mT @ x)


class LinearCrossEntropySum(Function):
    """The sum over all tokens. Its gradients are made with the loss; the backward pass only scales them."""

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, options: tuple, needed: bool) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        matrix, loss = head.to(x.dtype), x.new_zeros((), dtype=wide)
        dx, dhead = (torch.empty_like(x), torch.zeros_like(head, dtype=wide)) if needed else (None, None)
        for rows in slices(x, head):
            losses, d = slice_loss(x[rows] @ matrix.mT, targets[rows], options, gradient=needed)
            loss += losses.sum()
            if needed:
                gradients(x[rows], matrix, targets[rows] == options[0], d, dx[rows], dhead)
        ctx.save_for_backward(dx, dhead)
        ctx.dtype = head.dtype
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dhead = ctx.saved_tensors
        return dx * grad, (dhead * grad).to(ctx.dtype), None, None, None


class LinearCrossEntropy(Function):
    """A loss a token. What the tokens are multiplied by is only known later: the logits are made again in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, options: tuple) -> Tensor:
        matrix = head.to(x.dtype)
        made = [slice_loss(x[rows] @ matrix.mT, targets[rows], options, False)[0] for rows in slices(x, head)]
        ctx.save_for_backward(x, head, targets)
        ctx.options = options
        return torch.cat(made) if made else x.new_zeros(0, dtype=torch.promote_types(x.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, head, targets = ctx.saved_tensors
        matrix = head.to(x.dtype)
        dx, dhead = torch.empty_like(x), torch.zeros_like(head, dtype=grad.dtype)
        for rows in slices(x, head):
            _, d = slice_loss(x[rows] @ matrix.mT, targets[rows], ctx.options, True)
            ignored = targets[rows] == ctx.options[0]
            gradients(x[rows], matrix, ignored, d.mul_(grad[rows, None]), dx[rows], dhead)
        return dx, dhead.to(head.dtype), None, None


def linear_cross_entropy(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
) -> Tensor:
    """-log softmax(x head^T)[target] in nats, summed over the tokens or, with reduction `none`, one a token.

    x (N, C); head (V, C) of any dtype, multiplied in that of x; targets (N,) int64, those equal to `ignore_index` count
    nothing. Returns a scalar, or (N,): float32, or float64 for float64 x. `softcap` c > 0 replaces each logit z by
    c tanh(z / c). With gradients `sum` costs 6 N V C FLOPs, `none` 8. ValueError for an argument that does not fit; a
    target outside the vocabulary is found on a CPU only.
    """
    require(x.ndim == 2 and x.is_floating_point(), "x", f"(N, C) in floating point, not {x.dtype} {tuple(x.shape)}")
    fits = head.ndim == 2 and head.shape[1] == x.shape[1] and head.shape[0] > 0
    require(fits, "head", f"(V, {x.shape[1]}) with V > 0, not {tuple(head.shape)}")
    require(targets.shape == x.shape[:1], "targets", f"one a row of x, ({x.shape[0]},), not {tuple(targets.shape)}")
    require(targets.dtype == torch.int64, "targets", f"int64, not {targets.dtype}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        known = ((targets >= 0) & (targets < head.shape[0])) | (targets == ignore_index)
        require(bool(known.all()), "targets", f"from 0 to {head.shape[0] - 1} or {ignore_index}, which not all are")
    require(softcap >= 0, "softcap", f"at least 0, not {softcap}")
    require(0 <= label_smoothing < 1, "label_smoothing", f"in [0, 1), not {label_smoothing}")
    require(z_loss >= 0, "z_loss", f"at least 0, not {z_loss}")
    require(reduction in ("sum", "none"), "reduction", f"sum or none, not {reduction!r}")
    x, targets, options = x.contiguous(), targets.contiguous(), (ignore_index, softcap, label_smoothing, z_loss)
    if reduction == "none":
        return apply(LinearCrossEntropy, x, head, targets, options)
    needed = torch.is_grad_enabled() and (x.requires_grad or head.requires_grad)
    return apply(LinearCrossEntropySum, x, head, targets, options, needed)


def pytorch(x, head, targets, *, ignore_index=-100, softcap=0.0, label_smoothing=0.0, z_loss=0.0, reduction="sum"):
    logits = x @ head.to(x.dtype).mT
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    options = dict(ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction)
    wide = logits.to(torch.promote_types(x.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(wide, targets, **options)
    penalty = z_loss * wide.logsumexp(-1).square().masked_fill(targets == ignore_index, 0)
    return losses + (penalty if reduction == "none" else penalty.sum())


def inputs(draw: Draw) -> dict:
    N, V, C = draw.one_of(0, 1, 5, 33), draw.one_of(2, 7, 50, 300), draw.one_of(1, 4, 16)
    targets = draw.integers(N, high=V - 1)
    if draw.flag():
        targets[::3] = -100
    return dict(
        x=draw.normal(N, C),
        head=draw.normal(V, C),
        targets=targets,
        softcap=draw.one_of(0.0, 2.0, 30.0),
        label_smoothing=draw.one_of(0.0, 0.1),
        z_loss=draw.one_of(0.0, 0.01),
        reduction=draw.one_of("sum", "none"),
    )


def cost(x, head, targets, **_) -> tuple[Cost, Cost]:
    (N, C), V = x.shape, head.shape[0]
    return Cost(2 * N * V * C, bytes_of(x, head, targets)), Cost(4 * N * V * C, 2 * bytes_of(x, head))


SPEC = Spec(
    op=linear_cross_entropy,
    reference=reference,
    reference_backward=reference_backward,
    pytorch=pytorch,
    inputs=inputs,
    gradients=("x", "head"),
    cost=cost,
    gpu=(
        dict(x=Shape((8192, 4096)), head=Shape((128256, 4096)), targets=Shape((8192,), below=128256)),
        dict(x=Shape((8192, 2048)), head=Shape((50257, 2048)), targets=Shape((8192,), below=50257), softcap=30.0),
    ),
    cpu=(
        dict(x=Shape((4096, 256)), head=Shape((4096, 256)), targets=Shape((4096,), below=4096)),
        dict(x=Shape((2048, 512)), head=Shape((50257, 512)), targets=Shape((2048,), below=50257)),
    ),
)
