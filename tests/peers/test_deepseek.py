"""Mixers against those of the `transformers` package, with the same weights."""

import pytest
import torch
from torch import Tensor, nn

from nn.attention import MLA
from nn.context import Context
from nn.position.rope import RoPE

pytest.importorskip("transformers")
from transformers import DeepseekV3Config  # noqa: E402
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding  # noqa: E402

BATCH, TIME, DIM, HEADS, THETA = 2, 11, 24, 3, 500.0
SIZES = dict(kv_rank=10, nope_dim=6, rope_dim=4, value_dim=5)


def theirs(q_rank: int, interleaved: bool) -> tuple[nn.Module, DeepseekV3Config]:
    config = DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        q_lora_rank=q_rank or None,
        kv_lora_rank=SIZES["kv_rank"],
        qk_nope_head_dim=SIZES["nope_dim"],
        qk_rope_head_dim=SIZES["rope_dim"],
        v_head_dim=SIZES["value_dim"],
        rope_interleave=interleaved,
        rope_parameters=dict(rope_type="default", rope_theta=THETA),
        attention_bias=False,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    attention = DeepseekV3Attention(config, layer_idx=0).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, std=0.4)
    return attention, config


def ours(attention: nn.Module, q_rank: int, interleaved: bool) -> MLA:
    position = RoPE(theta=THETA, interleaved=interleaved)
    mixer = MLA(DIM, position, heads=HEADS, q_rank=q_rank, **SIZES)
    names = {"down": "kv_a_proj_with_mqa", "norm": "kv_a_layernorm", "up": "kv_b_proj", "out": "o_proj"}
    names |= {"query_down": "q_a_proj", "query_norm": "q_a_layernorm", "query": "q_b_proj"} if q_rank else {"query": "q_proj"}
    weights = attention.state_dict()
    mixer.load_state_dict({f"{mine}.weight": weights[f"{its}.weight"] for mine, its in names.items()})
    return mixer


def context(start: int, end: int, state: object = None) -> Context:
    return Context(torch.zeros(BATCH, end - start, dtype=torch.int64), torch.arange(start, end), state=state)


@pytest.mark.parametrize("q_rank", [0, 7])
@pytest.mark.parametrize("interleaved", [True, False])
@torch.no_grad()
def test_mla_is_that_of_deepseek_v3(q_rank, interleaved):
    """In training's form and in decoding's. DeepSeek's checkpoints turn neighbours: `--position rope:interleaved=true`."""
    attention, config = theirs(q_rank, interleaved)
    mixer, x = ours(attention, q_rank, interleaved), torch.randn(BATCH, TIME, DIM)
    tables = DeepseekV3RotaryEmbedding(config)(x, torch.arange(TIME)[None])
    hidden: Tensor = torch.full((TIME, TIME), -torch.inf).triu(1)[None, None]
    expected, _ = attention(x, tables, hidden)
    torch.testing.assert_close(mixer(x, context(0, TIME)), expected, rtol=0, atol=1e-5)
    state = mixer.init_state(BATCH, TIME, dtype=torch.float32)
    parts = [mixer(x[:, a:b], context(a, b, state)) for a, b in ((0, 4), (4, 5), (5, 6), (6, TIME))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.5 and state.length == TIME
