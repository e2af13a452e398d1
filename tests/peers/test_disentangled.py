"""Disentangled attention against the `transformers` package's DeBERTa, version 1 and version 2, with copied weights."""

import pytest
import torch
from torch import nn

from nn.attention import ATTENTION
from nn.context import Context
from nn.position import POSITIONS
from nn.spec import build

transformers = pytest.importorskip("transformers")
DIM, HEADS, TIME = 24, 3, 21


def ours(spec: str, position: str):
    encoding = build(position, POSITIONS, "position", dim=DIM)
    return build(spec, ATTENTION, "mixer", DIM, heads=HEADS, position=encoding), encoding


def copy(linear: nn.Linear, weight, bias=None) -> None:
    linear.weight.copy_(weight)
    linear.bias.copy_(torch.zeros_like(linear.bias) if bias is None else bias)


@pytest.mark.parametrize("length", [5, TIME])
@torch.no_grad()
def test_version_1(length):
    """q, k and v lie in one matrix, head by head; the key has no bias."""
    from transformers.models.deberta.modeling_deberta import DisentangledSelfAttention, build_relative_position

    torch.manual_seed(0)
    config = transformers.DebertaConfig(
        hidden_size=DIM, num_attention_heads=HEADS, relative_attention=True, max_relative_positions=8,
        pos_att_type=["c2p", "p2c"], attention_probs_dropout_prob=0, hidden_dropout_prob=0,
    )  # fmt: skip
    theirs = DisentangledSelfAttention(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    mixer, encoding = ours("deberta", "relative:span=8")
    nn.init.normal_(encoding.table.weight)
    q, k, v = theirs.in_proj.weight.view(HEADS, 3, DIM // HEADS, DIM).transpose(0, 1).flatten(1, 2)
    copy(mixer.query, q, theirs.q_bias)
    copy(mixer.key, k)
    copy(mixer.value, v, theirs.v_bias)
    mixer.distance_key.weight.copy_(theirs.pos_proj.weight)
    copy(mixer.distance_query, theirs.pos_q_proj.weight, theirs.pos_q_proj.bias)
    mixer.out = nn.Identity()
    x = torch.randn(2, length, DIM)
    places = build_relative_position(x, x)
    expected = theirs(x, torch.ones(2, 1, length, length), relative_pos=places, rel_embeddings=encoding.table.weight)[0]
    found = mixer(x, Context(torch.zeros(2, length, dtype=torch.int64), torch.arange(length), causal=False))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_version_2(shared):
    """Logarithmic buckets; distances may pass through the projections of the content."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention, build_relative_position

    torch.manual_seed(0)
    config = transformers.DebertaV2Config(
        hidden_size=DIM, num_attention_heads=HEADS, relative_attention=True, max_relative_positions=32, position_buckets=8,
        pos_att_type=["c2p", "p2c"], share_att_key=shared, attention_probs_dropout_prob=0, hidden_dropout_prob=0,
    )  # fmt: skip
    theirs = DisentangledSelfAttention(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    mixer, encoding = ours(f"deberta:shared={shared}", "relative:span=32:buckets=8")
    nn.init.normal_(encoding.table.weight)
    for mine, peer in ((mixer.query, theirs.query_proj), (mixer.key, theirs.key_proj), (mixer.value, theirs.value_proj)):
        copy(mine, peer.weight, peer.bias)
    if not shared:
        mixer.distance_key.weight.copy_(theirs.pos_key_proj.weight)
        theirs.pos_key_proj.bias.zero_()  # ours has none: it adds to all scores of a query alike
        copy(mixer.distance_query, theirs.pos_query_proj.weight, theirs.pos_query_proj.bias)
    mixer.out = nn.Identity()
    x = torch.randn(2, TIME, DIM)
    places = build_relative_position(x, x, 8, 32)
    expected = theirs(x, torch.ones(2, 1, TIME, TIME), relative_pos=places, rel_embeddings=encoding.table.weight)[0]
    found = mixer(x, Context(torch.zeros(2, TIME, dtype=torch.int64), torch.arange(TIME), causal=False))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
