"""GPT-2 checkpoints: learned positions, LayerNorm and GELU; weights lie (in, out), and q, k, v in one matrix."""

import re

from models.huggingface.table import Entry, check_options
from models.language_model import LanguageModel
from nn.attention import MHA
from nn.ffn import MLP
from nn.norm import LayerNorm
from nn.position import LearnedPosition

PREFIX = "transformer."
IGNORED = re.compile(r".*\.attn\.(masked_)?bias")  # the causal mask, stored as a buffer
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def config_in(published: dict) -> dict:
    """Fields of config.json -> fields of ours."""
    check_options(published, dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False))
    check_options(published, dict(activation_function=tuple(ACTIVATIONS)), default="gelu_new")
    activation = ACTIVATIONS[published.get("activation_function", "gelu_new")]
    width = f":width={published['n_inner']}" if published.get("n_inner") else ""
    return dict(
        model="gpt2",
        depth=published["n_layer"],
        heads=published["n_head"],
        dim=published["n_embd"],
        vocab_size=published["vocab_size"],
        seq_len=published["n_positions"],
        norm=f"layernorm:eps={published.get('layer_norm_epsilon', 1e-5)}",
        ffn=f"mlp:activation={activation}:bias=true{width}",
        tie=published.get("tie_word_embeddings", True),
    )


def fits(model: LanguageModel) -> bool:
    """Whether the parts are those that `config_out` asks; that nothing else differs is seen by reading it again."""
    return (
        model.alternates(MHA, MLP, LayerNorm)
        and type(model.position) is LearnedPosition
        and model.stack[1].layer.activation in ACTIVATIONS.values()
    )


def config_out(model: LanguageModel) -> dict:
    config, ffn = model.config, model.stack[1].layer
    activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == ffn.activation)
    return dict(
        architectures=["GPT2LMHeadModel"],
        n_layer=len(model.stack) // 2,
        n_head=model.stack[0].layer.heads,
        n_embd=config.dim,
        n_inner=ffn.up.out_features,
        vocab_size=config.vocab_size,
        n_positions=model.position.max_len,
        layer_norm_epsilon=model.stack[0].norm.eps,
        activation_function=activation,
        tie_word_embeddings=config.tie,
    )


def table(model: LanguageModel) -> list[Entry]:
    """Their tensors and ours, in the order of the file."""
    entries = [Entry("wte.weight", "embedding.weight"), Entry("wpe.weight", "position.table.weight")]
    for i in range(model.config.depth):
        block, mixer, ffn = f"h.{i}", f"stack.{2 * i}", f"stack.{2 * i + 1}"
        for kind in ("weight", "bias"):
            turned = kind == "weight"
            qkv = [f"{mixer}.layer.{part}.{kind}" for part in ("query", "key", "value")]
            entries += [
                Entry(f"{block}.ln_1.{kind}", f"{mixer}.norm.{kind}"),
                Entry(f"{block}.attn.c_attn.{kind}", *qkv, transposed=turned),
                Entry(f"{block}.attn.c_proj.{kind}", f"{mixer}.layer.out.{kind}", transposed=turned),
                Entry(f"{block}.ln_2.{kind}", f"{ffn}.norm.{kind}"),
                Entry(f"{block}.mlp.c_fc.{kind}", f"{ffn}.layer.up.{kind}", transposed=turned),
                Entry(f"{block}.mlp.c_proj.{kind}", f"{ffn}.layer.down.{kind}", transposed=turned),
            ]
    entries += [Entry("ln_f.weight", "final_norm.weight"), Entry("ln_f.bias", "final_norm.bias")]
    return entries + ([] if model.config.tie else [Entry("lm_head.weight", "head.weight", prefixed=False)])
