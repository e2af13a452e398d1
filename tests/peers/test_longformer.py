"""Longformer's attention, BigBird's and the parallel block against the `transformers` package, with copied weights."""

import pytest
import torch
from torch import nn

from models import Config, LanguageModel
from nn.attention import ATTENTION
from nn.context import Context
from nn.spec import build

transformers = pytest.importorskip("transformers")
DIM, HEADS, TIME = 24, 3, 32


def shaken(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def context(length: int) -> Context:
    return Context(torch.zeros(2, length, dtype=torch.int64), torch.arange(length), causal=False)


@pytest.mark.parametrize("reach", [2, 8])
@torch.no_grad()
def test_longformer(reach):
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = transformers.LongformerConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_window=[2 * reach], attention_probs_dropout_prob=0.0
    )
    theirs = shaken(LongformerSelfAttention(config, 0))
    mixer = build(f"longformer:window={reach + 1}:global_tokens=3:bias=true", ATTENTION, "mixer", DIM, heads=HEADS)
    mixer.load_state_dict(theirs.state_dict(), strict=False)
    mixer.out = nn.Identity()
    x, mask = torch.randn(2, TIME, DIM), torch.zeros(2, TIME)
    mask[:, :3] = 10000
    expected = theirs(
        x, mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=True
    )[0]  # fmt: skip
    torch.testing.assert_close(mixer(x, context(TIME)), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_bigbird_where_its_blocks_are_everything():
    from transformers.models.big_bird.modeling_big_bird import BigBirdSelfAttention

    config = transformers.BigBirdConfig(
        hidden_size=DIM, num_attention_heads=HEADS, attention_type="original_full", attention_probs_dropout_prob=0.0
    )
    theirs = shaken(BigBirdSelfAttention(config))
    mixer = build("bigbird:block=16:bias=true", ATTENTION, "mixer", DIM, heads=HEADS)
    mixer.load_state_dict(theirs.state_dict(), strict=False)
    mixer.out = nn.Identity()
    x = torch.randn(2, TIME, DIM)
    torch.testing.assert_close(mixer(x, context(TIME)), theirs(x)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_parallel_block_of_gptj():
    """One norm, attention and MLP side by side; rotary positions in neighbouring pairs of a part of each head."""
    peer = shaken(transformers.GPTJForCausalLM(transformers.GPTJConfig(
        vocab_size=61, n_embd=DIM, n_layer=2, n_head=HEADS, rotary_dim=4, n_positions=64, bos_token_id=0, eos_token_id=0,
    )))  # fmt: skip
    model = LanguageModel(Config.of(
        model="gpt2", vocab_size=61, dim=DIM, depth=2, heads=HEADS, seq_len=64, tie=False, ffn="none",
        mixer="gqa+mlp:bias=true:activation=gelu_tanh", position="rope:interleaved=true:fraction=0.5",
    ))  # fmt: skip
    theirs, ours = peer.state_dict(), model.state_dict()
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    for i in range(2):
        block, mine = f"transformer.h.{i}", f"stack.{i}"
        for kind in ("weight", "bias"):
            ours[f"{mine}.norm.{kind}"] = theirs[f"{block}.ln_1.{kind}"]
            ours[f"{mine}.layer.branches.1.up.{kind}"] = theirs[f"{block}.mlp.fc_in.{kind}"]
            ours[f"{mine}.layer.branches.1.down.{kind}"] = theirs[f"{block}.mlp.fc_out.{kind}"]
            ours[f"final_norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for name, own in names.items():
            ours[f"{mine}.layer.branches.0.{own}.weight"] = theirs[f"{block}.attn.{name}.weight"]
    ours["embedding.weight"], ours["head.weight"] = theirs["transformer.wte.weight"], theirs["lm_head.weight"]
    model.load_state_dict(ours)
    peer.lm_head.bias.zero_()
    tokens = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    logits = peer(tokens).logits
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-5 * logits.abs().max().item())


@torch.no_grad()
def test_the_sinks_of_gpt_oss():
    """A learned logit a head, on full layers and on those with a window."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

    config = transformers.GptOssConfig(
        hidden_size=DIM, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=2, sliding_window=5,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0),
    )  # fmt: skip
    config._attn_implementation = "eager"
    x, places = torch.randn(2, TIME, DIM), torch.arange(TIME)[None]
    turned = GptOssRotaryEmbedding(config)(x, places)
    from nn.position import RoPE

    for layer, kind in enumerate(config.layer_types):
        theirs = shaken(GptOssAttention(config, layer))
        window = 5 if kind == "sliding_attention" else None
        spec = "gqa:heads=4:kv_heads=2:head_dim=8:bias=true:sinks=true" + (f":window={window}" if window else "")
        mixer = build(spec, ATTENTION, "mixer", DIM, position=RoPE())
        ours = {"sinks": theirs.sinks}
        for name, own in {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out"}.items():
            for part in ("weight", "bias"):
                ours[f"{own}.{part}"] = getattr(getattr(theirs, name), part)
        mixer.load_state_dict(ours)
        apart = torch.arange(TIME)[:, None] - torch.arange(TIME)
        hidden = (apart < 0) | (apart >= (window or TIME))
        mask = torch.zeros(TIME, TIME).masked_fill(hidden, -torch.inf)[None, None]
        expected = theirs(x, position_embeddings=turned, attention_mask=mask)[0]
        found = mixer(x, Context(torch.zeros(2, TIME, dtype=torch.int64), torch.arange(TIME)))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
