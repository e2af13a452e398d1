"""Against `transformers`: a Llama made a mixture here is a Mixtral there, one grown here a larger Llama; logits stay."""

import pytest
import torch
from torch import nn

from models import Config, build_model
from models.grow import grow
from models.huggingface import export
from models.upcycle import upcycle

transformers = pytest.importorskip("transformers")

TINY = dict(model="llama-1m", vocab_size=61, dim=24, heads=4, depth=3, seq_len=32, tie=False, ffn="swiglu:width=40")


def trained():
    model = build_model(Config.of(**TINY), seed=1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def test_the_same_logits_before_and_after(tmp_path):
    model, tokens = trained(), torch.randint(61, (2, 20))
    made = {
        "dense": (model, transformers.LlamaForCausalLM),
        "upcycled": (upcycle(model, experts=4, router_std=0.3), transformers.MixtralForCausalLM),
        "wider": (grow(model, width=36), transformers.LlamaForCausalLM),
        "both, and deeper": (upcycle(grow(model, width=48, depth=6), experts=4), transformers.MixtralForCausalLM),
    }
    logits = {}
    for name, (ours, theirs) in made.items():
        export(ours, tmp_path / name)
        logits[name] = theirs.from_pretrained(tmp_path / name).eval()(tokens).logits
        torch.testing.assert_close(logits[name], ours(tokens), rtol=1e-4, atol=1e-5)
    for name in ("upcycled", "wider"):
        torch.testing.assert_close(logits[name], logits["dense"], rtol=1e-4, atol=1e-5)
    assert (logits["both, and deeper"] - logits["dense"]).abs().max() > 0.1
