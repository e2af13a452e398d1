"""Losses that keep experts in use, of what a router decided for a batch.

With f_e the share of all choices that expert e has, P_e its mean score, E experts:

    balance    E sum_e f_e P_e          1 where all experts have the same share or the same score
    z          mean_n logsumexp(logits_n)^2

Both f and P have the sum 1. (transformers' load_balancing_loss_func counts f for each of the k choices: k times this value,
and pools the layers before it multiplies.) f has no gradient. Over which tokens f is counted decides what is balanced
(Qiu et al. 2025, "Demons in the Detail", arXiv:2501.11873): the loss is linear in P, so with one f for all micro-batches
their mean is the loss of the whole batch exactly, and experts may specialise on what a micro-batch is made of; with an f
each, every micro-batch must use all experts alike.
"""

import torch
from torch import Tensor

from nn.moe.routing import Router, Routing, counts_of
from nn.parallel.collectives import add_up

SCOPES = ("sequence", "micro", "global", "buffer")


def balance(shares: Tensor, scores: Tensor) -> Tensor:
    """E sum_e f_e P_e of shares (…, E), and scores (…, N, E) averaged over N; the mean over what stands before.

    Shazeer et al. 2017; Fedus et al. 2021 (arXiv:2101.03961), equations 4 to 6; shares of all k choices as in Lepikhin et al.
    2020, "GShard" (arXiv:2006.16668).
    """
    return shares.shape[-1] * (shares * scores.mean(-2)).sum(-1).mean()


def z_loss(logits: Tensor) -> Tensor:
    """The mean square of logsumexp(logits), (N, E), which keeps logits small.

    Zoph et al. 2022, "ST-MoE" (arXiv:2202.08906), equation 5.
    """
    return logits.logsumexp(-1).square().mean()


def shares_of(counts: Tensor) -> Tensor:
    """(…, E) counts as shares with the sum 1; equal ones where nothing was counted."""
    counts = counts.to(torch.float32)
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp(min=1), 1 / counts.shape[-1])


class Balance:
    """The balance loss with f counted over `scope`:

    sequence   each sequence by itself
    micro      what one process sees at once: the batch, or a part of it where gradients are accumulated
    global     the same parts of all processes together; one all-reduce of E numbers
    buffer     all parts of the step so far, of all processes: with accumulated gradients near the whole batch. `after_step`
               empties it

    `counted_over`: the processes that "all" are; None for all of them.
    """

    counted_over: torch.distributed.ProcessGroup | None = None

    def __init__(self, scope: str, experts: int):
        self.scope, self.experts, self.buffer = scope, experts, None

    def __call__(self, experts: Tensor, scores: Tensor, sequences: int) -> Tensor:
        """A scalar, of choices (N, K) and scores (N, E) of N tokens in `sequences` rows of one length."""
        if self.scope == "sequence":
            rows = experts.reshape(sequences, -1)
            counts = torch.stack([counts_of(row, self.experts) for row in rows])
            return balance(shares_of(counts), scores.unflatten(0, (sequences, -1)))
        counts = counts_of(experts, self.experts)
        if self.scope in ("global", "buffer") and torch.distributed.is_initialized():
            add_up(counts, self.counted_over)
        if self.scope == "buffer":
            counts = self.buffer = counts if self.buffer is None else self.buffer + counts
        return balance(shares_of(counts), scores)

    def after_step(self) -> None:
        self.buffer = None


def auxiliary(
    router: Router, routing: Routing, balance_loss: Balance, *, sequences: int, balance: float, z: float
) -> Tensor | None:
    """The auxiliary losses of a pass, those of the router among them, each with its coefficient; None if there are none."""
    parts, router.own_loss = [] if router.own_loss is None else [router.own_loss], None
    if balance and routing.scores is not None and routing.experts.numel():
        parts.append(balance * balance_loss(routing.experts, routing.scores, sequences))
    if z and routing.logits is not None and routing.experts.numel():
        parts.append(z * z_loss(routing.logits))
    return sum(parts) if parts else None
