from typing import Literal

import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.context import Context
from nn.linear import Linear
from nn.moe import losses
from nn.moe.bias_balanced import BiasBalanced
from nn.moe.capacity import drop, reroute, room
from nn.moe.compressed import modulated
from nn.moe.expert_choice import ExpertChoice
from nn.moe.experts import Activation, Experts
from nn.moe.hashed import HashRouter
from nn.moe.host_experts import HostLinear
from nn.moe.noisy import NoisyTopK
from nn.moe.recurrent import RecurrentRouter
from nn.moe.rl import RLRouter
from nn.moe.routing import Router, Routing
from nn.moe.sinkhorn import SinkhornRouter
from nn.moe.topk import Switch, TopK
from nn.spec import build, resolve

ROUTERS = {
    "topk": TopK,
    "switch": Switch,
    "noisy": NoisyTopK,
    "bias": BiasBalanced,
    "hash": HashRouter,
    "sinkhorn": SinkhornRouter,
    "rl": RLRouter,
    "recurrent": RecurrentRouter,
    "expert_choice": ExpertChoice,
}


def make_router(spec: str, dim: int, *, top_k: int | None, **offered) -> Router:
    """The router that `spec` names, its options behind slashes. ValueError where it cannot make `top_k` choices."""
    spec, offered = spec.replace("/", ":"), offered | ({} if top_k is None else dict(top_k=top_k))
    try:
        resolve(spec, ROUTERS, "router")
    except ValueError as error:
        raise ValueError(f"router: {error}") from None
    router = build(spec, ROUTERS, "router", dim, **offered)
    if top_k not in (None, router.top_k):
        raise ValueError(f"top_k: the router {spec.partition(':')[0]} makes {router.top_k} choices, not {top_k}")
    return router


class MoE(nn.Module):
    """A mixture of experts: a router sends each token to a few of many feed-forward layers, and adds up what they say.

    Shazeer et al. 2017 (arXiv:1701.06538); as Mixtral has it (arXiv:2401.04088) unless told otherwise. Beside the router:

    router      one of ROUTERS, its own options behind slashes: `router=topk/over=all`. `top_k` is that of the router
    width       of an expert; by default that of `swiglu`, of `mlp` where the experts are not `gated`
    shared      that many experts' width more for every token (DeepSeekMoE, Dai et al. 2024, arXiv:2401.06066), or
                `shared_width` in all; `shared_gate` weighs them by a sigmoid of the token (Qwen2-MoE, arXiv:2407.10671)
    balance     coefficient of the balance loss, and `scope` over which it is counted; `z` that of the z-loss (losses.py)
    capacity    in training an expert takes `capacity` times its share at most, in the order of the tokens, and drops the rest;
                0: no bound. `eval_capacity`, `overflow` and `metric` are the same for inference (capacity.py)
    scaling     of what the routed experts say
    main        of the choices that many are asked; each of the others is one learned vector (compressed.py), at first ones
    expert_gradients   `sqrt`: those of the E routed experts' matrices are divided by sqrt(E), and no others (Artetxe et al.
                2021, arXiv:2112.10684). It tells where lengths of gradients count, as in --clip: Adam and Muon forget them
    host        the routed experts stay in the host's memory, and those that a batch asks visit the device (host_experts.py)

    Auxiliary losses are in nats a token; a pass that learns leaves their sum in `auxiliary`. `routing` is what the router
    decided in the last pass, after the bounds. Shapes: (B, T, dim) -> (B, T, dim).
    """

    elementwise = ("vectors",)
    auxiliary: Tensor | None = None
    routing: Routing | None = None

    def __init__(
        self,
        dim: int,
        vocab_size: int | None = None,
        layer: int = 1,
        *,
        experts: int = 8,
        top_k: int | None = None,
        width: int | None = None,
        router: str = "topk",
        activation: Activation = "silu",
        gated: bool = True,
        shared: int = 0,
        shared_gate: bool = False,
        shared_width: int | None = None,
        scaling: float = 1.0,
        balance: float = 0.01,
        scope: Literal["sequence", "micro", "global", "buffer"] = "micro",
        z: float = 0.001,
        capacity: float = 0.0,
        eval_capacity: float = 0.0,
        overflow: Literal["drop", "reroute"] = "drop",
        metric: Literal["score", "order", "reverse", "random"] = "score",
        main: int | None = None,
        expert_gradients: Literal["sum", "sqrt"] = "sum",
        host: bool = False,
    ):
        super().__init__()
        at_least(1, width=width, shared_width=shared_width, main=main)
        at_least(0, shared=shared, balance=balance, z=z, capacity=capacity, eval_capacity=eval_capacity)
        self.router = make_router(router, dim, experts=experts, top_k=top_k, vocab_size=vocab_size, layer=layer)
        self.top_k = self.router.top_k
        width = width or (-(-8 * dim // (3 * 64)) * 64 if gated else 4 * dim)
        options = dict(activation=activation, gated=gated)
        self.main = main or self.top_k
        if self.main > self.top_k:
            raise ValueError(f"main: {main} of {self.top_k} choices")
        self.vectors = None if main is None else nn.Parameter(torch.ones(experts, dim))
        special = dict(linear=HostLinear) if host else {}
        special |= dict(gradient=experts**-0.5) if expert_gradients == "sqrt" else {}
        self.experts = Experts(dim, experts, width, uses=self.main, **special, **options)
        self.shared = Experts(dim, 1, shared_width or shared * width, **options) if shared else None
        if not shared and (shared_gate or shared_width):
            raise ValueError(f"{'shared_gate' if shared_gate else 'shared_width'}: there are no shared experts")
        self.shared_gate = Linear(dim, 1, bias=False) if shared_gate else None
        self.scaling, self.balance, self.z = scaling, balance, z
        self.capacity, self.eval_capacity, self.overflow, self.metric = capacity, eval_capacity, overflow, metric
        self.balance_loss = losses.Balance(scope, experts)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        flat = x.flatten(0, 1)  # (N, dim)
        routing = self.router(flat, context)
        if self.router.learns():
            weights = dict(balance=self.balance, z=self.z)
            self.auxiliary = losses.auxiliary(self.router, routing, self.balance_loss, sequences=x.shape[0], **weights)
        routing = self.bounded(routing)
        self.routing = routing.detached()
        experts, weights, read = routing.experts, routing.weights * self.scaling, flat
        if self.vectors is not None:
            read, experts, weights = modulated(flat, experts, weights, self.vectors, self.main)
        y = self.dispatch(read, experts, weights)
        return (y if self.shared is None else y + self.of_all(flat)).to(x.dtype).view_as(x)

    def dispatch(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """(N, dim): what the chosen experts (N, K) say of x (N, dim), weighted. Expert parallelism takes its place."""
        return self.experts(x, experts, weights)

    def of_all(self, x: Tensor) -> Tensor:
        """(N, dim): what the shared experts say."""
        N = len(x)
        everyone, whole = x.new_zeros(N, 1, dtype=torch.int64), torch.ones(N, 1, device=x.device)
        y = self.shared(x, everyone, whole)
        return y if self.shared_gate is None else y * self.shared_gate(x).sigmoid()

    def bounded(self, routing: Routing) -> Routing:
        """The routing with what no expert has room for dropped or sent elsewhere."""
        experts, weights, many = routing.experts, routing.weights, self.router.experts
        learns = self.router.learns()
        factor = self.capacity if learns else self.eval_capacity
        if not factor:
            return routing
        capacity = room(factor, experts.numel(), many)
        if learns or self.overflow == "drop":
            experts = drop(experts, weights.detach(), many, capacity, "order" if learns else self.metric)
        else:
            if routing.scores is None:
                raise ValueError("overflow: a router that has no scores knows no next best expert; drop is what remains")
            experts, weights = reroute(experts, weights, routing.scores, capacity, self.metric)
        return Routing(experts, weights, routing.scores, routing.logits)

    def after_step(self) -> None:
        """What is done once a step, after all its parts: its counts begin anew."""
        self.balance_loss.after_step()
