"""A small model for tests of what is done to models: all its numbers are drawn, so that none is 0, 1 or like another."""

import torch
from torch import nn

from models import Config, LanguageModel, build_model

TINY = dict(vocab_size=40, dim=16, heads=2, depth=2, seq_len=24, stem="", mixer="gqa", ffn="swiglu:width=24", norm="rmsnorm")


def drawn(*, std: float = 0.3, **options) -> LanguageModel:
    """In float64; `options` are fields of its configuration."""
    model = build_model(Config.of(**TINY | options), seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return model.double()


def tokens() -> torch.Tensor:
    return torch.randint(40, (3, 20), generator=torch.Generator().manual_seed(0))
