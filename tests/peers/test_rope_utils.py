"""Position encodings against the `transformers` package: stretched frequencies, ALiBi's slopes, T5's relative biases."""

import pytest
import torch

from nn.context import Context
from nn.position import RoPE, T5Bias
from nn.position.alibi import ALiBi

transformers = pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.bloom.modeling_bloom import build_alibi_tensor  # noqa: E402
from transformers.models.t5.modeling_t5 import T5Attention  # noqa: E402

THEIRS = {"llama3": dict(low="low_freq_factor", high="high_freq_factor"), "yarn": dict(low="beta_slow", high="beta_fast")}


def theirs(kind: str, rope: RoPE, head_dim: int) -> tuple[torch.Tensor, float]:
    """Their frequencies and what they multiply cos and sin by."""
    parameters = dict(rope_type=kind, rope_theta=rope.theta, factor=rope.factor)
    parameters |= {theirs: getattr(rope, ours) for ours, theirs in THEIRS.get(kind, {}).items()}
    if kind in THEIRS:
        parameters["original_max_position_embeddings"] = rope.original
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=rope.original, rope_parameters=parameters
    )
    return ROPE_INIT_FUNCTIONS[kind](config, "cpu")


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(
    "options",
    [
        dict(factor=8.0, original=4096),
        dict(factor=2.5, original=512, theta=500.0),
        dict(factor=32.0, original=8192, theta=500000.0, low=2.0, high=20.0),
    ],
)
@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_frequencies(kind, head_dim, options):
    rope = RoPE(scaling=kind, **options)
    expected, gain = theirs(kind, rope, head_dim)
    torch.testing.assert_close(rope.frequencies(head_dim).float(), expected, rtol=3e-6, atol=0)
    assert rope.gain == pytest.approx(gain, abs=1e-12)


@pytest.mark.parametrize("length", [512, 1024, 5000])
@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_dynamic_is_ntk_at_the_factor_of_a_length(length, factor):
    config = transformers.LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=512,
        rope_parameters=dict(rope_type="dynamic", rope_theta=10000.0, factor=factor),
    )  # fmt: skip
    expected, gain = ROPE_INIT_FUNCTIONS["dynamic"](config, "cpu", seq_len=length)
    found = RoPE(scaling="ntk", factor=factor * length / 512 - (factor - 1)).frequencies(64)
    torch.testing.assert_close(found.float(), expected, rtol=3e-6, atol=0)
    assert gain == 1


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 16, 20, 71])
def test_slopes(heads):
    """Theirs add slope * j, which differs from - slope * (i - j) by a number for each query: the softmax is the same."""
    added = build_alibi_tensor(torch.ones(1, 5, dtype=torch.int64), heads, torch.float32)  # (heads, 1, 5)
    torch.testing.assert_close(ALiBi().slopes(heads), added[:, 0, 1], rtol=1e-6, atol=0)
    torch.testing.assert_close(ALiBi().slopes(heads)[:, None] * torch.arange(5), added[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 256), (8, 20), (64, 777)])
def test_relative_bias(causal, buckets, max_distance):
    config = transformers.T5Config(
        d_model=24, d_kv=8, num_heads=3, is_decoder=causal, relative_attention_num_buckets=buckets,
        relative_attention_max_distance=max_distance,
    )  # fmt: skip
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    ours = T5Bias(buckets=buckets, max_distance=max_distance, heads=3)
    ours.table.load_state_dict(layer.relative_attention_bias.state_dict())
    distances = torch.arange(-3000, 3000)
    expected = T5Attention._relative_position_bucket(distances, not causal, buckets, max_distance)
    assert torch.equal(ours.bucket(distances, causal), expected)
    context = Context(torch.zeros(1, 300), torch.arange(300), causal=causal)
    assert torch.equal(ours.bias(context, 3, 300, 300), layer.compute_bias(300, 300))
    assert torch.equal(ours.bias(context, 3, 7, 300), layer.compute_bias(7, 300, past_seen_tokens=293))
