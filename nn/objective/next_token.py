"""The next-token objective: cross-entropy of the head's logits, without ever holding all of them.

The logits of a batch (tokens x vocabulary) are by far its largest array. Here they are made for a slice of the tokens at
a time, turned into the loss and at once into the gradients of both inputs, and dropped; the backward pass only scales.
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv:2411.09009); Hsu et al. 2024, "Liger
Kernel" (arXiv:2410.10989), section 3.2, for gradients made in the forward pass.
"""

import torch
from torch import Tensor

from nn.linear import cast_once

LOGITS_AT_ONCE = 2**20  # entries of one slice: 4 MB in float32, which a CPU's caches hold
ROWS_AT_LEAST = 256  # tokens of one slice: fewer would make the sums over slices dear
IGNORED = -100  # a target that does not count


def next_token_loss(x: Tensor, head: Tensor, targets: Tensor, *, softcap: float = 0.0) -> Tensor:
    """Sum over the tokens of -log softmax(x head^T)[target], in nats; targets of -100 count nothing.

    Shapes: x (N, C), head (V, C), targets (N,) int64 -> scalar float32 (float64 for float64 inputs). Under autocast the
    matmuls run in its dtype, the rest in float32. `softcap` c > 0 replaces each logit z by c tanh(z / c).
    """
    x = cast_once(x)
    if torch.is_grad_enabled() and (x.requires_grad or head.requires_grad):
        return LinearCrossEntropy.apply(x, head, targets, softcap)
    head = head.to(x.dtype)
    return torch.cat([slice_loss(x[rows], head, targets[rows], softcap)[0] for rows in slices(x, head)]).sum()


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        matrix = head.to(x.dtype)
        dx, dhead, losses = torch.empty_like(x), torch.zeros_like(head), []
        for rows in slices(x, head):
            xs, ts = x[rows], targets[rows]
            loss, p, capped = slice_loss(xs, matrix, ts, softcap)
            losses.append(loss)
            at = torch.arange(len(ts), device=ts.device), ts.clamp_min(0)
            d = p.to(x.dtype)  # d loss / d logits = softmax - onehot, or 0 where the target is ignored
            d[at] = (p[at] - 1).to(x.dtype)  # indexing, because scatter would copy all of d
            d.masked_fill_((ts == IGNORED)[:, None], 0)
            if softcap:
                d *= 1 - capped.square()
            torch.mm(d, matrix, out=dx[rows])
            dhead += d.mT @ xs
        ctx.save_for_backward(dx, dhead)
        return torch.cat(losses).sum()

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dhead = ctx.saved_tensors
        return dx * grad, dhead * grad, None, None


def slices(x: Tensor, head: Tensor) -> list[slice]:
    step = max(ROWS_AT_LEAST, LOGITS_AT_ONCE // head.shape[0])
    return [slice(start, start + step) for start in range(0, max(1, len(x)), step)]


def slice_loss(x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """(n,) losses, and what the gradient needs: the softmax (n, V), and tanh of the soft cap. Float32 or wider."""
    logits = x @ head.mT  # (n, V)
    wide = torch.promote_types(x.dtype, torch.float32)
    capped = torch.tanh(logits.to(wide) / softcap) if softcap else None
    logits = capped * softcap if softcap else logits
    p = logits.to(wide).softmax(-1)
    log_sum_exp = logits.amax(-1).to(wide) - p.amax(-1).log()  # the likeliest token's p is at least 1/V: its log is safe
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0].to(wide)
    return torch.where(targets == IGNORED, 0, log_sum_exp - picked), p, capped
