"""A model drawn a part at a time begins with the numbers of one that is built whole, bit for bit."""

import pytest
import torch

from models import Config, build_model
from models.draw import draw
from models.language_model import LanguageModel

TINY = dict(dim=32, depth=2, heads=4, vocab_size=50, seq_len=16)
EXPERTS = "moe:experts=4:router="


@pytest.mark.parametrize("fields", [
    dict(), dict(tie=True), dict(init="gpt2", tie=True), dict(init="deepnorm", norm_place="deepnorm", tie=True),
    dict(model="gpt2"), dict(mixer="mamba2:state=8:head_dim=8,gqa", init="gpt2"), dict(mixer="delta,mhe"),
    dict(mixer="atlas", ffn="monarch"), dict(ffn=EXPERTS + "recurrent", init="gpt2"), dict(ffn=EXPERTS + "hash:top_k=1"),
    dict(ffn=EXPERTS + "bias,moe:experts=4:shared=1:main=1"), dict(position="t5", mixer="gqa:value_embedding=true"),
    dict(head="linear:decoder_bias=true", position="learned", embedding_norm="first", norm="layernorm"),
    dict(stack="gqa+mlp mamba:inner_norm=true", norm="powernorm"),
], ids=str)  # fmt: skip
def test_a_model_in_parts_is_the_whole_one(fields):
    config, drawn = Config.of(**TINY | fields), {}
    model = build_model(config, seed=3)
    torch.manual_seed(5)  # is nothing to it
    draw(config, 3, lambda name, tensor: drawn.update({name: tensor.clone()}))
    expected = dict(model.named_parameters()) | dict(model.named_buffers())
    assert drawn.keys() == expected.keys() and len(drawn) > 5
    assert all(torch.equal(drawn[name], tensor.detach()) for name, tensor in expected.items())


def test_no_more_than_a_part_is_there_at_a_time(monkeypatch):
    there, made = [], LanguageModel.make_part

    def watched(model, name):
        real = [p for p in model.parameters() if not p.is_meta]
        there.append((name, sum(p.numel() for p in real)))
        return made(model, name)

    monkeypatch.setattr(LanguageModel, "make_part", watched)
    draw(Config.of(**TINY | dict(depth=3)), 0, lambda name, tensor: None)
    anew = there[len(there) // 2 :]  # after the skeleton
    assert len(anew) > 8 and all(numbers == 0 for _, numbers in anew), there
