"""A sublayer in the residual stream: where its norm stands, and sublayers side by side."""

import math
import re
from typing import Any

from torch import Tensor, nn

from nn.context import Context
from nn.norm import NORMS
from nn.spec import build

PLACES = ("pre", "scaled", "sandwich", "output", "post", "deepnorm")
BESIDE = re.compile(r"\+(?=[A-Za-z_])")  # in `gqa+mlp`, but not in a value like 0.9+0.95


class Residual(nn.Module):
    """One sublayer f with its norm and its residual connection.

    pre        x + f(norm(x)). Xiong et al. 2020 (arXiv:2002.04745)
    scaled     x + f(norm(x) / sqrt(l)) in layer l, counted from 1: LayerNorm Scaling. Sun et al. 2025, "The Curse of Depth
               in Large Language Models" (arXiv:2502.05795)
    sandwich   x + norm'(f(norm(x))), as in Gemma 2. Ding et al. 2021, "CogView" (arXiv:2105.13290)
    output     x + norm(f(x)), as in OLMo 2. Liu et al. 2021, "Swin Transformer V2" (arXiv:2111.09883)
    post       norm(x + f(x)). Vaswani et al. 2017 (arXiv:1706.03762)
    deepnorm   norm(a x + f(x)), a = n^(1/4) for n sublayers; with `--init deepnorm`. Wang et al. 2022, "DeepNet"
               (arXiv:2203.00555), figure 2: (2N)^(1/4) for N layers of two sublayers
    """

    def __init__(self, layer: nn.Module, dim: int, *, norm: str, place: str = "pre", number: int = 1, sublayers: int = 1):
        super().__init__()
        self.norm = build(norm, NORMS, "norm", dim)
        self.layer = layer
        self.second_norm = build(norm, NORMS, "norm", dim) if place == "sandwich" else None
        self.place = place
        self.shrink, self.stretch = 1 / math.sqrt(number), sublayers**0.25
        self.is_mixer = hasattr(layer, "init_state")

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if self.place == "pre":
            return x + self.branch(self.norm(x), context)
        if self.place == "scaled":
            return x + self.branch(self.norm(x) * self.shrink, context)
        if self.place == "sandwich":
            return x + self.second_norm(self.branch(self.norm(x), context))
        if self.place == "output":
            return x + self.norm(self.branch(x, context))
        if self.place == "deepnorm":
            return self.norm(self.stretch * x + self.branch(x, context))
        return self.norm(x + self.branch(x, context))

    def branch(self, x: Tensor, context: Context) -> Tensor:
        """f(x). Who spreads f over processes puts a function of his own in its place, and the layer stays what it is."""
        return self.layer(x, context)


class Parallel(nn.Module):
    """Sublayers that read the same x, their outputs added: with one norm before them the parallel block of GPT-J and PaLM.

    Chowdhery et al. 2022, "PaLM: Scaling Language Modeling with Pathways" (arXiv:2204.02311), section 2. At most one of them
    is a mixer: its decoding state is the block's.
    """

    def __init__(self, branches: list[nn.Module]):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        mixers = [branch for branch in branches if hasattr(branch, "init_state")]
        if len(mixers) > 1:
            raise ValueError(f"stack: {len(mixers)} mixers side by side; one decoding state serves one mixer")
        if mixers:
            mixer = mixers[0]
            self.init_state, self.state_bytes, self.mixing_flops = mixer.init_state, mixer.state_bytes, mixer.mixing_flops

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return sum(branch(x, context) for branch in self.branches)


def make_sublayer(spec: str, family: dict, dim: int, **offered: Any) -> nn.Module:
    """The module of a sublayer's spec, or those of several with + between them as one."""
    parts = [build(part, family, "sublayer", dim, **offered) for part in BESIDE.split(spec)]
    return parts[0] if len(parts) == 1 else Parallel(parts)


def ends_normed(place: str) -> bool:
    """Whether the stream is normed after the last sublayer, so that the model needs no final norm."""
    return place in ("post", "deepnorm")
