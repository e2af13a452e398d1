"""Initialisation of a model's weights, by the part a matrix plays.

Each takes a model, those of its modules that are to be initialised, and a generator: so a model of which no process has all
can be drawn a part at a time (models/draw.py), and begins with the same numbers.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn

from nn.moe.experts import StackedLinear

MATRICES = (nn.Linear, StackedLinear)


def fan_in(model: nn.Module, modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Matrices of variance 1/4 of 1/fan_in, residual outputs and head zero, token embeddings of variance 1.

    Each sublayer begins as the identity and the model as a uniform guess, at any width and depth (as in Zhang et al.
    2019, "Fixup", arXiv:1901.09321, section 3). Tables that are added to something (positions, values, n-grams) are zero.
    A head that is tied to the embedding has its variance 1/dim: logits of variance 1. Matrices are uniform, so that no
    weight starts far out.
    """
    tied = model.config.tie
    for module in modules:
        if isinstance(module, MATRICES) and not (tied and module is model.head):
            zero = module is model.head or getattr(module, "writes_residual", False)
            bound = 0 if zero else 0.5 * math.sqrt(3 / module.in_features)
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            std = 0.0 if module is not model.embedding else module.embedding_dim**-0.5 if tied else 1.0
            nn.init.normal_(module.weight, std=std, generator=generator)


def gpt2(model: nn.Module, modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Normal of standard deviation 0.02; residual outputs 0.02 / sqrt(number of sublayers).

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """
    outputs = sum(getattr(m, "writes_residual", False) for m in model.modules())
    for module in modules:
        if isinstance(module, (*MATRICES, nn.Embedding)):
            std = 0.02 / math.sqrt(outputs) if getattr(module, "writes_residual", False) else 0.02
            nn.init.normal_(module.weight, std=std, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def deepnorm(model: nn.Module, modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Xavier normal; what values, outputs and ffns are made of smaller by (4 n)^(-1/4) for n sublayers; to `deepnorm`.

    Wang et al. 2022, "DeepNet: Scaling Transformers to 1,000 Layers" (arXiv:2203.00555), figure 2: (8 N)^(-1/4) for N
    layers of two sublayers. Embeddings are of standard deviation 0.02.
    """
    sublayers = sum(getattr(m, "writes_residual", False) for m in model.modules())
    modules = list(modules)
    scores = {m for layer in modules for name, m in layer.named_children() if name in ("query", "key")}
    for module in modules:
        if isinstance(module, MATRICES):
            gain = 1.0 if module in scores or module is model.head else (4 * sublayers) ** -0.25
            for matrix in module.weight.view(-1, *module.weight.shape[-2:]):  # one, or one an expert
                nn.init.xavier_normal_(matrix, gain, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02, generator=generator)


def own_values(modules: Iterable[nn.Module], generator: torch.Generator) -> None:
    """The initial values that are part of a layer's equation, as Mamba's step sizes are: after any of the above.

    A module that has such values sets them in its method `own_init(generator)`.
    """
    for module in modules:
        if hasattr(module, "own_init"):
            module.own_init(generator)


INITS = {"fan_in": fan_in, "gpt2": gpt2, "deepnorm": deepnorm}
