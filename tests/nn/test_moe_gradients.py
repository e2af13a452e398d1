"""Gradients of experts divided by the root of their number: those, exactly, and no others."""

import pytest
import torch

from models import Config, build_model
from models.stack import FFNS
from nn.context import Context
from nn.spec import build

DIM, E = 12, 6


def passed(words: str, dtype: torch.dtype = torch.float64):
    """Output, and gradients by name, of one pass in training."""
    torch.manual_seed(0)
    moe = build(f"moe:experts={E}:width=10:shared=1:{words}", FFNS, "ffn", DIM).to(dtype)
    x = torch.randn(2, 9, DIM, dtype=dtype).requires_grad_()
    y = moe(x, Context(torch.zeros(2, 9, dtype=torch.int64), torch.arange(9)))
    ((y * torch.randn_like(y)).sum() + moe.auxiliary).backward()
    return y, {"x": x.grad} | {name: parameter.grad for name, parameter in moe.named_parameters()}


@pytest.mark.parametrize("words", ["top_k=2", "top_k=1:gated=false:activation=relu2", "router=topk/over=all:capacity=1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_experts_alone_have_smaller_gradients(words, dtype):
    y, grads = passed(words, dtype)
    scaled_y, scaled = passed(words + ":expert_gradients=sqrt", dtype)
    assert torch.equal(y, scaled_y) and grads.keys() == scaled.keys()
    routed = [name for name in grads if name.startswith("experts.")]
    assert len(routed) == (2 if "gated=false" in words else 3)
    for name, grad in grads.items():
        assert torch.equal(scaled[name], grad * E**-0.5 if name in routed else grad), name


def test_sum_is_the_default():
    assert build("moe", FFNS, "ffn", DIM).experts.up.gradient == 1
    spelled = passed("top_k=2:expert_gradients=sum")[1]
    assert all(torch.equal(grad, spelled[name]) for name, grad in passed("top_k=2")[1].items())


def test_the_norm_that_is_clipped_is_smaller_in_a_model():
    """A model whose ffns are mixtures, as --ffn spells it: only stacks of experts have other gradients."""
    made = {}
    for spelled in ("sum", "sqrt"):
        config = Config.of(mixer="gqa", ffn=f"mlp,moe:experts=4:expert_gradients={spelled}", stem="", depth=2, dim=32, heads=2,
                           vocab_size=50, seq_len=16, init="gpt2")  # fmt: skip
        model = build_model(config)
        tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(0))
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        made[spelled] = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, grad in made["sum"].items():
        assert torch.equal(made["sqrt"][name], grad / 2 if ".experts." in name else grad), name


def test_unknown_spellings_are_one_line():
    with pytest.raises(ValueError, match="expert_gradients='root' is not one of sum, sqrt"):
        build("moe:expert_gradients=root", FFNS, "ffn", DIM)
