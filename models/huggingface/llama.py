"""Llama checkpoints (2 to 3.2): rotary positions, RMSNorm, SwiGLU, shared key/value heads."""

import re

from models.huggingface.table import Entry, check_options
from models.language_model import LanguageModel
from nn.attention import GQA, MHA, MQA
from nn.ffn import SwiGLU
from nn.norm import RMSNorm
from nn.position import RoPE

PREFIX = "model."
IGNORED = re.compile(r".*rotary_emb\.inv_freq")
STRETCH = dict(factor="factor", low="low_freq_factor", high="high_freq_factor", original="original_max_position_embeddings")


def config_in(published: dict) -> dict:
    """Fields of config.json -> fields of ours."""
    check_options(published, dict(hidden_act="silu", pretraining_tp=1))
    rope = published.get("rope_parameters") or {}  # newer files keep all of rope here
    scaling = published.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: rope_type {kind!r} is not supported, only default and llama3")
    stretch = "".join(f":{ours}={scaling[theirs]}" for ours, theirs in STRETCH.items()) if kind == "llama3" else ""
    theta = published.get("rope_theta", rope.get("rope_theta", 10000.0))
    heads = published["num_attention_heads"]
    kv_heads, head_dim = published.get("num_key_value_heads") or heads, published.get("head_dim")
    mixer = f"gqa:kv_heads={kv_heads}" + (f":head_dim={head_dim}" if head_dim else "")
    return dict(
        model="llama-8b",
        depth=published["num_hidden_layers"],
        heads=heads,
        dim=published["hidden_size"],
        vocab_size=published["vocab_size"],
        seq_len=published.get("max_position_embeddings", 2048),
        norm=f"rmsnorm:eps={published.get('rms_norm_eps', 1e-6)}",
        mixer=mixer + (":bias=true" if published.get("attention_bias") else ""),
        ffn=f"swiglu:width={published['intermediate_size']}" + (":bias=true" if published.get("mlp_bias") else ""),
        position=f"rope:theta={theta}{stretch}",
        tie=published.get("tie_word_embeddings", False),
    )


def fits(model: LanguageModel) -> bool:
    """Whether a Llama checkpoint can hold this model."""
    rope = model.position
    return (
        model.alternates((GQA, MHA, MQA), SwiGLU, RMSNorm)
        and all(s.layer.is_plain() for s in model.stack[0::2])
        and all((s.layer.query.bias is None) == (s.layer.out.bias is None) for s in model.stack[0::2])
        and all(s.norm.weight is not None for s in model.stack)
        and type(rope) is RoPE
        and rope.fraction == 1
        and not rope.interleaved
    )


def config_out(model: LanguageModel) -> dict:
    config, rope, mixer, ffn = model.config, model.position, model.stack[0].layer, model.stack[1].layer
    parameters = dict(rope_type="default", rope_theta=rope.theta)
    if rope.factor != 1:
        stretch = {theirs: getattr(rope, ours) for ours, theirs in STRETCH.items()}
        parameters = dict(rope_type="llama3", rope_theta=rope.theta, **stretch)
    return dict(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=len(model.stack) // 2,
        hidden_size=config.dim,
        intermediate_size=ffn.gate.out_features,
        num_attention_heads=mixer.heads,
        num_key_value_heads=mixer.kv_heads,
        head_dim=mixer.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.seq_len,
        rms_norm_eps=model.stack[0].norm.eps,
        rope_parameters=parameters,
        rope_theta=rope.theta,
        rope_scaling=parameters if rope.factor != 1 else None,
        hidden_act="silu",
        attention_bias=mixer.query.bias is not None,
        mlp_bias=ffn.gate.bias is not None,
        tie_word_embeddings=config.tie,
    )


def table(model: LanguageModel) -> list[Entry]:
    """Their tensors and ours, in the order of the file."""
    entries = [Entry("embed_tokens.weight", "embedding.weight")]
    for i in range(model.config.depth):
        mixer_kinds, ffn_kinds = (
            ("weight",) if linear.bias is None else ("weight", "bias")
            for linear in (model.stack[2 * i].layer.query, model.stack[2 * i + 1].layer.gate)
        )
        block, mixer, ffn = f"layers.{i}", f"stack.{2 * i}", f"stack.{2 * i + 1}"
        entries.append(Entry(f"{block}.input_layernorm.weight", f"{mixer}.norm.weight"))
        for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "out")):
            entries += [Entry(f"{block}.self_attn.{theirs}.{kind}", f"{mixer}.layer.{ours}.{kind}") for kind in mixer_kinds]
        entries.append(Entry(f"{block}.post_attention_layernorm.weight", f"{ffn}.norm.weight"))
        for theirs, ours in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            entries += [Entry(f"{block}.mlp.{theirs}.{kind}", f"{ffn}.layer.{ours}.{kind}") for kind in ffn_kinds]
    entries.append(Entry("norm.weight", "final_norm.weight"))
    return entries + ([] if model.config.tie else [Entry("lm_head.weight", "head.weight", prefixed=False)])
