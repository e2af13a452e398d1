"""ModernBERT checkpoints: an encoder with rotary positions and gated layers, most of which look at a window only.

Warner et al. 2024, "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder for Fast, Memory Efficient, and Long
Context Finetuning and Inference" (arXiv:2412.13663). Every third layer sees all tokens, the others those at most
local_attention // 2 away, turned from a rotary base of their own. The first layer reads the normalised embeddings as they are.
"""

import re

from models.heads import TransformHead
from models.huggingface.table import Entry, check_options
from models.language_model import LanguageModel
from nn.attention import GQA, MHA
from nn.checks import at_least
from nn.ffn import GLU
from nn.norm import LayerNorm
from nn.position import RoPE

PREFIX = "model."
IGNORED = re.compile(r"(?!)")  # nothing
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
KINDS = ("full_attention", "sliding_attention")
BIASED = ("norm", "attention", "mlp", "classifier", "decoder")
BASES = dict(full_attention=("global_rope_theta", 160000.0), sliding_attention=("local_rope_theta", 10000.0))


def config_in(published: dict) -> dict:
    """Fields of config.json -> fields of ours."""
    check_options(published, dict(hidden_activation=tuple(ACTIVATIONS), classifier_activation=tuple(ACTIVATIONS)))
    hidden, inner = (ACTIVATIONS[published.get(f"{part}_activation", "gelu")] for part in ("hidden", "classifier"))
    bias = {part: f"bias={str(published.get(f'{part}_bias', part == 'decoder')).lower()}" for part in BIASED}
    theta, local = (base_in(published, kind) for kind in KINDS)
    full = f"gqa:{bias['attention']}"
    sliding = f"{full}:window={published.get('local_attention', 128) // 2 + 1}"
    sliding += f":theta={local}" if local not in (None, theta) else ""
    mixers = [sliding if kind == "sliding_attention" else full for kind in kinds_in(published)]
    period = next(n for n in range(1, len(mixers) + 1) if mixers == (mixers[:n] * len(mixers))[: len(mixers)])
    return dict(
        model="gpt2",
        depth=len(mixers),
        heads=published["num_attention_heads"],
        dim=published["hidden_size"],
        vocab_size=published["vocab_size"],
        seq_len=published.get("max_position_embeddings", 8192),
        norm=f"layernorm:eps={published.get('norm_eps', 1e-5)}:{bias['norm']}",
        embedding_norm="first",
        mixer=",".join(mixers[:period]),
        ffn=f"glu:activation={hidden}:width={published['intermediate_size']}:{bias['mlp']}",
        position=f"rope:theta={theta}",
        head=f"transform:activation={inner}:{bias['classifier']}:decoder_{bias['decoder']}",
        tie=published.get("tie_word_embeddings", True),
        objective="masked:rate=0.3",
    )


def kinds_in(published: dict) -> list[str]:
    """The kind of attention of each layer."""
    depth, kinds = published["num_hidden_layers"], published.get("layer_types")
    at_least(1, num_hidden_layers=depth)
    if kinds is None:
        every = published.get("global_attn_every_n_layers", 3)
        at_least(1, global_attn_every_n_layers=every)
        kinds = [KINDS[i % every != 0] for i in range(depth)]
    if len(kinds) != depth or not set(kinds) <= set(KINDS):
        raise ValueError(f"config.json: layer_types are full_attention or sliding_attention, {depth} of them")
    return kinds


def base_in(published: dict, kind: str) -> float | None:
    """The rotary base of a kind of layers, wherever this file keeps it; None, of sliding ones: that of the others."""
    older, default = BASES[kind]
    rope = (published.get("rope_parameters") or {}).get(kind) or {}
    rope = {**rope, **(published.get("rope_scaling") or {})}
    check_options({"rope_type": rope.get("rope_type", rope.get("type", "default"))}, dict(rope_type="default"))
    return rope.get("rope_theta", published.get(older, default))


def fits(model: LanguageModel) -> bool:
    """Whether the parts are those that `config_out` asks; that nothing else differs is seen by reading it again."""
    return (
        model.alternates((GQA, MHA), GLU, LayerNorm, bare=True)
        and type(model.position) is RoPE
        and type(model.transform) is TransformHead
        and model.stack[1].layer.activation in ACTIVATIONS.values()
    )


def config_out(model: LanguageModel) -> dict:
    config, mixers, ffn, transform = model.config, [s.layer for s in model.stack[0::2]], model.stack[1].layer, model.transform
    kinds = [KINDS[mixer.window is not None] for mixer in mixers]
    sliding = next((mixer for mixer in mixers if mixer.window is not None), None)
    theta = model.position.theta
    local = BASES[KINDS[1]][1] if sliding is None else sliding.theta or theta
    every = next((n for n in range(1, len(kinds) + 1) if kinds == [KINDS[i % n != 0] for i in range(len(kinds))]), None)
    named = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    bases = zip(KINDS, (theta, local), strict=True)
    return dict(
        architectures=["ModernBertForMaskedLM"],
        num_hidden_layers=len(mixers),
        num_attention_heads=mixers[0].heads,
        hidden_size=config.dim,
        intermediate_size=ffn.gate.out_features,
        hidden_activation=named[ffn.activation],
        classifier_activation=named[transform.activation],
        vocab_size=config.vocab_size,
        max_position_embeddings=config.seq_len,
        norm_eps=model.stack[1].norm.eps,
        norm_bias=model.stack[1].norm.bias is not None,
        attention_bias=mixers[0].query.bias is not None,
        mlp_bias=ffn.gate.bias is not None,
        classifier_bias=transform.dense.bias is not None,
        decoder_bias=transform.decoder_bias,
        local_attention=128 if sliding is None else 2 * (sliding.window - 1),
        layer_types=kinds,
        rope_parameters={kind: dict(rope_type="default", rope_theta=base) for kind, base in bases},
        **dict(global_rope_theta=theta, local_rope_theta=local),  # as older readers look for them
        **(dict(global_attn_every_n_layers=every) if every else {}),
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")),
        tie_word_embeddings=config.tie,
    )


def table(model: LanguageModel) -> list[Entry]:
    """Their tensors and ours, in the order of the file; each module with a bias where it has one."""
    linear = lambda module: ("weight",) if module.bias is None else ("weight", "bias")  # noqa: E731
    norms, entries = linear(model.stack[1].norm), [Entry("embeddings.tok_embeddings.weight", "embedding.weight")]
    entries += [Entry(f"embeddings.norm.{kind}", f"embedding_norm.{kind}") for kind in norms]
    for i in range(model.config.depth):
        block, mixer, ffn = f"layers.{i}", f"stack.{2 * i}", f"stack.{2 * i + 1}"
        if i:
            entries += [Entry(f"{block}.attn_norm.{kind}", f"{mixer}.norm.{kind}") for kind in norms]
        for kind in linear(model.stack[0].layer.query):
            qkv = [f"{mixer}.layer.{part}.{kind}" for part in ("query", "key", "value")]
            entries += [Entry(f"{block}.attn.Wqkv.{kind}", *qkv), Entry(f"{block}.attn.Wo.{kind}", f"{mixer}.layer.out.{kind}")]
        entries += [Entry(f"{block}.mlp_norm.{kind}", f"{ffn}.norm.{kind}") for kind in norms]
        for kind in linear(model.stack[1].layer.gate):
            entries.append(Entry(f"{block}.mlp.Wi.{kind}", f"{ffn}.layer.gate.{kind}", f"{ffn}.layer.up.{kind}"))
            entries.append(Entry(f"{block}.mlp.Wo.{kind}", f"{ffn}.layer.down.{kind}"))
    entries += [Entry(f"final_norm.{kind}", f"final_norm.{kind}") for kind in norms]
    for part, kinds in (("dense", linear(model.transform.dense)), ("norm", norms)):
        entries += [Entry(f"head.{part}.{kind}", f"transform.{part}.{kind}", prefixed=False) for kind in kinds]
    entries += [] if model.config.tie else [Entry("decoder.weight", "head.weight", prefixed=False)]
    return entries + ([Entry("decoder.bias", "head.bias", prefixed=False)] if model.head.bias is not None else [])
