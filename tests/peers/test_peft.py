"""LoRA against the `peft` package: a published model of `transformers` adapted by both, with the same A and B."""

import pytest
import torch
from torch import nn

from models.weights import adapted, load_model
from nn.adapt.lora import lora, merge
from nn.linear import Linear

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers")

THEIRS = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj", "out": "self_attn.o_proj",
          "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}  # fmt: skip


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert ours.shape == theirs.shape and error < 1e-5, f"{error:.1e}"


@pytest.mark.parametrize(
    ("rank", "alpha", "targets"), [(8, 16, ("query", "key", "value", "out")), (3, 2, ("query", "up", "down")), (1, 5, ("out",))]
)
def test_the_same_matrices_give_the_same(rank, alpha, targets, tmp_path):
    """Outputs, the gradients of A and B, how many numbers learn, and the merged weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=37, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "published")
    ours = adapted(load_model(tmp_path / "published"), f"lora:rank={rank}:alpha={alpha}:targets={'+'.join(targets)}")
    options = dict(r=rank, lora_alpha=alpha, target_modules=[THEIRS[name].rpartition(".")[2] for name in targets])
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**options)).train()

    pairs = []
    for i in range(2):
        for name in targets:
            other = theirs.base_model.model.model.layers[i].get_submodule(THEIRS[name])
            place = 2 * i + (name in ("gate", "up", "down"))
            layer = ours.stack[place].layer.get_submodule(name)
            pairs += [
                (layer.adapter.A.weight, other.lora_A["default"].weight),
                (layer.adapter.B.weight, other.lora_B["default"].weight),
            ]
    for mine, other in pairs:
        assert mine.shape == other.shape
        other.data.normal_(std=0.5)
        mine.data.copy_(other)
    tokens = torch.randint(37, (2, 12))
    z, wanted = ours(tokens), theirs(tokens).logits
    assert_close(z, wanted)
    weights = torch.randn_like(z)
    for logits in (z, wanted):
        (logits * weights).sum().backward()
    for mine, other in pairs:
        assert_close(mine.grad, other.grad)
    learning = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (ours, theirs)]
    assert learning[0] == learning[1] == theirs.get_nb_trainable_parameters()[0]

    merge(ours)
    plain = theirs.merge_and_unload()
    for i in range(2):
        for name in targets:
            layer = ours.stack[2 * i + (name in ("gate", "up", "down"))].layer.get_submodule(name)
            assert_close(layer.weight, plain.model.layers[i].get_submodule(THEIRS[name]).weight)
    assert_close(ours(tokens), plain(tokens).logits)


def test_what_A_and_B_begin_with():
    """A uniform within 1 / sqrt(in), B zero, by both."""
    ours = Linear(400, 300)
    lora(nn.ModuleDict(dict(a=ours)), rank=8, targets=("a",))
    theirs = nn.ModuleDict(dict(a=nn.Linear(400, 300)))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=8, target_modules=["a"])).base_model.model["a"]
    for A, B in ((ours.adapter.A, ours.adapter.B), (theirs.lora_A["default"], theirs.lora_B["default"])):
        assert 0.95 / 20 < A.weight.abs().max() <= 1 / 20 and not B.weight.any()
        assert abs(A.weight.std() * 20 * 3**0.5 - 1) < 0.05
