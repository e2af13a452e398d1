"""Bloom checkpoints: ALiBi, a LayerNorm on the embeddings, and queries, keys and values side by side within each head.

BigScience Workshop 2022, "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model" (arXiv:2211.05100).
"""

import re

from models.huggingface.table import Entry, check_options
from models.language_model import LanguageModel
from nn.attention import GQA, MHA
from nn.ffn import MLP
from nn.norm import LayerNorm
from nn.position import ALiBi

PREFIX = "transformer."
IGNORED = re.compile(r"(?!)")  # nothing


def config_in(published: dict) -> dict:
    """Fields of config.json -> fields of ours. How they split matrices over GPUs in training changes nothing here."""
    check_options(published, dict(apply_residual_connection_post_layernorm=False))
    return dict(
        model="gpt2",
        depth=either(published, "n_layer", "num_hidden_layers"),
        heads=either(published, "n_head", "num_attention_heads"),
        dim=either(published, "n_embed", "hidden_size"),
        vocab_size=published["vocab_size"],
        seq_len=published.get("seq_length", 2048),
        norm=f"layernorm:eps={published.get('layer_norm_epsilon', 1e-5)}",
        embedding_norm="extra",
        position="alibi",
        tie=published.get("tie_word_embeddings", True),
    )


def either(published: dict, short: str, long: str) -> int:
    """A size that files write under one of two names, or both."""
    return published[short] if published.get(short) is not None else published[long]


def fits(model: LanguageModel) -> bool:
    """Whether the parts are those that `config_out` asks; that nothing else differs is seen by reading it again."""
    return model.alternates((MHA, GQA), MLP, LayerNorm) and type(model.position) is ALiBi


def config_out(model: LanguageModel) -> dict:
    config = model.config
    return dict(
        architectures=["BloomForCausalLM"],
        n_layer=len(model.stack) // 2,
        n_head=model.stack[0].layer.heads,
        hidden_size=config.dim,
        vocab_size=config.vocab_size,
        seq_length=config.seq_len,
        layer_norm_epsilon=model.stack[0].norm.eps,
        tie_word_embeddings=config.tie,
    )


def table(model: LanguageModel) -> list[Entry]:
    """Their tensors and ours, in the order of the file."""
    entries = [Entry("word_embeddings.weight", "embedding.weight")]
    for kind in ("weight", "bias"):
        entries.append(Entry(f"word_embeddings_layernorm.{kind}", f"embedding_norm.{kind}"))
    for i in range(model.config.depth):
        block, mixer, ffn = f"h.{i}", f"stack.{2 * i}", f"stack.{2 * i + 1}"
        for kind in ("weight", "bias"):
            qkv = [f"{mixer}.layer.{part}.{kind}" for part in ("query", "key", "value")]
            entries += [
                Entry(f"{block}.input_layernorm.{kind}", f"{mixer}.norm.{kind}"),
                Entry(f"{block}.self_attention.query_key_value.{kind}", *qkv, heads=model.stack[2 * i].layer.heads),
                Entry(f"{block}.self_attention.dense.{kind}", f"{mixer}.layer.out.{kind}"),
                Entry(f"{block}.post_attention_layernorm.{kind}", f"{ffn}.norm.{kind}"),
                Entry(f"{block}.mlp.dense_h_to_4h.{kind}", f"{ffn}.layer.up.{kind}"),
                Entry(f"{block}.mlp.dense_4h_to_h.{kind}", f"{ffn}.layer.down.{kind}"),
            ]
    entries += [Entry("ln_f.weight", "final_norm.weight"), Entry("ln_f.bias", "final_norm.bias")]
    return entries + ([] if model.config.tie else [Entry("lm_head.weight", "head.weight", prefixed=False)])
