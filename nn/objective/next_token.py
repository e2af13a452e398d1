"""The next-token objective: cross-entropy of the head's logits, without ever holding all of them.

The logits of a batch (tokens x vocabulary) are by far its largest array. Here they are made for a slice of the tokens at
a time, turned into the loss and at once into the gradients of both inputs, and dropped; the backward pass only scales.
Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models" (arXiv:2411.09009); Hsu et al. 2024, "Liger
Kernel" (arXiv:2410.10989), section 3.2, for gradients made in the forward pass.
"""

import torch
from torch import Tensor

LOGITS_AT_ONCE = 2**22  # entries of one slice: 8 MB in bf16, which stays in a CPU's last-level cache
IGNORED = -100  # a target that does not count


def next_token_loss(x: Tensor, head: Tensor, targets: Tensor, *, softcap: float = 0.0) -> Tensor:
    """Sum over the tokens of -log softmax(x head^T)[target], in nats; targets of -100 count nothing.

    Shapes: x (N, C), head (V, C), targets (N,) int64 -> scalar float32 (float64 for float64 inputs). Under autocast the
    matmuls run in its dtype, the rest in float32. `softcap` c > 0 replaces each logit z by c tanh(z / c).
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and (x.requires_grad or head.requires_grad):
        return LinearCrossEntropy.apply(x, head, targets, softcap)
    head = head.to(x.dtype)
    losses = [slice_loss(x[rows], head, targets[rows], softcap)[0] for rows in slices(x, head)]
    return torch.cat([x.new_zeros(0, dtype=torch.float32), *losses]).sum()


class LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, softcap: float) -> Tensor:
        matrix = head.to(x.dtype)
        dx, dhead, total = torch.empty_like(x), torch.zeros_like(head), torch.zeros((), device=x.device)
        for rows in slices(x, head):
            xs, ts = x[rows], targets[rows]
            losses, logits, lse, capped = slice_loss(xs, matrix, ts, softcap)
            total = total + losses.sum()
            d = (logits - lse[:, None]).exp_()  # softmax; d loss / d logits = softmax - onehot
            d.scatter_add_(1, ts.clamp_min(0)[:, None], d.new_full((len(ts), 1), -1.0))
            if softcap:
                d *= 1 - capped.square()
            d = d.masked_fill_((ts == IGNORED)[:, None], 0).to(x.dtype)
            dx[rows] = d @ matrix
            dhead += d.mT @ xs
        ctx.save_for_backward(dx, dhead)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        dx, dhead = ctx.saved_tensors
        return dx * grad, dhead * grad, None, None


def slices(x: Tensor, head: Tensor) -> list[slice]:
    step = max(1, LOGITS_AT_ONCE // head.shape[0])
    return [slice(start, start + step) for start in range(0, len(x), step)]


def slice_loss(x: Tensor, head: Tensor, targets: Tensor, softcap: float):
    """(n,) losses, and what the gradient needs: the logits (n, V) in float32, their log-sum-exp, tanh of the soft cap."""
    logits = x @ head.mT
    logits = logits if logits.dtype == torch.float64 else logits.float()
    capped = torch.tanh(logits / softcap) if softcap else None
    logits = capped * softcap if softcap else logits
    lse = logits.logsumexp(-1)
    picked = logits.gather(1, targets.clamp_min(0)[:, None])[:, 0]
    return torch.where(targets == IGNORED, 0, lse - picked), logits, lse, capped
