"""Initialisation of a model's weights, by the part a matrix plays."""

import math

import torch
from torch import nn


def fan_in(model: nn.Module, generator: torch.Generator) -> None:
    """Variance 1/4 of 1/fan_in, residual outputs and head zero, embeddings of unit variance.

    Each sublayer begins as the identity and the model as a uniform guess, at any width and depth (as in Zhang et al.
    2019, "Fixup", arXiv:1901.09321, section 3). Uniform numbers, so that no weight starts far out.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            zero = getattr(module, "writes_residual", False) or module is getattr(model, "head", None)
            bound = 0 if zero else 0.5 * math.sqrt(3 / module.in_features)
            _uniform(module, bound, generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=1.0, generator=generator)


def gpt2(model: nn.Module, generator: torch.Generator) -> None:
    """Normal of standard deviation 0.02; residual outputs 0.02 / sqrt(number of sublayers).

    Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """
    outputs = [m for m in model.modules() if getattr(m, "writes_residual", False)]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = 0.02 / math.sqrt(len(outputs)) if module in outputs else 0.02
            nn.init.normal_(module.weight, std=std, generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def _uniform(linear: nn.Linear, bound: float, generator: torch.Generator) -> None:
    nn.init.uniform_(linear.weight, -bound, bound, generator=generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


INITS = {"fan_in": fan_in, "gpt2": gpt2}
