"""Mixtures of experts as they are published: a tensor for each matrix of each expert, in either direction."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models import Config, LanguageModel, build_model
from models.huggingface import export, load

SMALL = dict(model="llama-1m", vocab_size=31, dim=16, heads=4, depth=2, seq_len=24)
NAMES = dict(gate="gate_proj", up="up_proj", down="down_proj")
FAMILIES = {  # ours; what config.json says; the name of the mixture and of the parts of an expert
    "mixtral": (
        dict(mixer="gqa:kv_heads=2:window=5", ffn="moe:experts=3:width=8"),
        dict(num_local_experts=3, num_experts_per_tok=2, intermediate_size=8, sliding_window=5),
        "block_sparse_moe", dict(gate="w1", up="w3", down="w2"),
    ),
    "olmoe": (
        dict(mixer="mha:qk_norm=all", norm="rmsnorm:eps=1e-6", ffn="moe:experts=4:top_k=3:width=12:router=topk/over=all"),
        dict(num_experts=4, num_experts_per_tok=3, intermediate_size=12, norm_topk_prob=False),
        "mlp", NAMES,
    ),
    "qwen2_moe": (
        dict(mixer="gqa:bias=true:out_bias=false", ffn="moe:experts=4:width=8:shared=3:shared_gate=true"),
        dict(num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=24, norm_topk_prob=True),
        "mlp", NAMES,
    ),
    "qwen3_moe": (
        dict(mixer="gqa:qk_norm=head:head_dim=6", norm="rmsnorm:eps=1e-6", ffn="moe:experts=2:top_k=2:width=4"),
        dict(num_experts=2, num_experts_per_tok=2, moe_intermediate_size=4, head_dim=6, norm_topk_prob=True),
        "mlp", NAMES,
    ),
}  # fmt: skip
each = pytest.mark.parametrize("family", FAMILIES)


def made(family: str) -> LanguageModel:
    model = build_model(Config.of(**SMALL | FAMILIES[family][0]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@each
@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
@torch.no_grad()
def test_out_and_in_again(family, shard_bytes, tmp_path):
    _, said, mixture, parts = FAMILIES[family]
    model, tokens = made(family), torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(1))
    export(model, tmp_path, shard_bytes=shard_bytes)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == family and {key: config[key] for key in said} == said
    files = {name: tensor for path in tmp_path.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert len(files) == len(model.state_dict()) - 2 * 3 - model.config.tie + 2 * 3 * model.stack[1].layer.experts.experts
    for layer in range(2):
        place, experts = f"model.layers.{layer}.{mixture}", model.stack[2 * layer + 1].layer.experts
        for ours, theirs in parts.items():
            for e, matrix in enumerate(getattr(experts, ours).weight):
                assert torch.equal(files[f"{place}.experts.{e}.{theirs}.weight"], matrix)
        assert torch.equal(files[f"{place}.gate.weight"], model.stack[2 * layer + 1].layer.router.gate.weight)
    again = load(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))


@each
def test_a_trained_model_leaves_as_it_came(family, tmp_path):
    """What training has left on the layers, and how it balanced them, is nothing of the model."""
    model = made(family)
    tokens = torch.randint(31, (2, 20), generator=torch.Generator().manual_seed(1))
    for ffn in (sublayer.layer for sublayer in model.stack[1::2]):
        ffn.balance, ffn.z, ffn.capacity = 0.5, 0.0, 1.5
    model(tokens, tokens).backward()
    export(model, tmp_path)
    again = load(tmp_path)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    ffn = again.stack[1].layer
    assert (ffn.balance, ffn.z, ffn.capacity) == (0.01, 0.001, 0)


def test_experts_that_are_missing_left_over_or_misshapen(tmp_path):
    export(made("mixtral"), tmp_path)
    path = tmp_path / "model.safetensors"
    good = load_file(path)
    name = "model.layers.1.block_sparse_moe.experts.{}.w2.weight"
    for tensors, message in (
        ({key: tensor for key, tensor in good.items() if key != name.format(2)}, r"experts\.2\.w2\.weight' is missing$"),
        (
            good | {name.format(3): good[name.format(2)].clone()},
            r"no place for: layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight$",
        ),
        (good | {name.format(0): torch.zeros(16, 9)}, r"^tensor 'layers\.1.*experts\.0\.w2\.weight' gives .*\(16, 9\), not"),
        (good | {name.format(0): torch.zeros(15, 8)}, r"experts\.0\.w2\.weight' has 15 rows, not 16$"),
        (good | {name.format(0): torch.zeros(16)}, r"experts\.0\.w2\.weight' gives .* the shape \(16,\), not \(16, 8\)$"),
    ):
        save_file(tensors, path)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)
    save_file(good, path)
    load(tmp_path)
