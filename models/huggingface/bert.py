"""BERT checkpoints: a post-norm encoder with learned positions, GELU and a head of its own for hidden tokens.

Devlin et al. 2018 (arXiv:1810.04805). Their table of segment types has no place in ours: a text of one segment is all of
type 0, whose row is added to each position when a checkpoint is read, and the table is written as zeros. What they keep for
other tasks (the pooler, the next-sentence classifier) is not read.
"""

import re

from models.heads import TransformHead
from models.huggingface.table import AddedRow, Entry, check_options
from models.language_model import LanguageModel
from nn.attention import GQA, MHA
from nn.ffn import MLP
from nn.norm import LayerNorm
from nn.position import LearnedPosition

PREFIX = "bert."
IGNORED = re.compile(r"embeddings\.position_ids|pooler\..*|cls\.seq_relationship\..*|cls\.predictions\.decoder\.bias")
ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "silu": "silu"}
TYPES = 2


def config_in(published: dict) -> dict:
    """Fields of config.json -> fields of ours."""
    check_options(published, dict(is_decoder=False, add_cross_attention=False, tie_word_embeddings=True))
    check_options(published, dict(position_embedding_type="absolute", type_vocab_size=TYPES))
    check_options(published, dict(hidden_act=tuple(ACTIVATIONS)))
    activation = ACTIVATIONS[published.get("hidden_act", "gelu")]
    return dict(
        model="gpt2",
        depth=published["num_hidden_layers"],
        heads=published["num_attention_heads"],
        dim=published["hidden_size"],
        vocab_size=published["vocab_size"],
        seq_len=published["max_position_embeddings"],
        norm=f"layernorm:eps={published.get('layer_norm_eps', 1e-12)}",
        norm_place="post",
        embedding_norm="extra",
        ffn=f"mlp:activation={activation}:bias=true:width={published['intermediate_size']}",
        head=f"transform:activation={activation}",
        tie=True,
        objective="masked:rate=0.15",
    )


def fits(model: LanguageModel) -> bool:
    """Whether the parts are those that `config_out` asks; that nothing else differs is seen by reading it again."""
    return (
        model.alternates((MHA, GQA), MLP, LayerNorm)
        and type(model.position) is LearnedPosition
        and type(model.transform) is TransformHead
        and model.stack[1].layer.activation in ACTIVATIONS.values()
    )


def config_out(model: LanguageModel) -> dict:
    config, ffn = model.config, model.stack[1].layer
    return dict(
        architectures=["BertForMaskedLM"],
        num_hidden_layers=len(model.stack) // 2,
        num_attention_heads=model.stack[0].layer.heads,
        hidden_size=config.dim,
        intermediate_size=ffn.up.out_features,
        hidden_act=next(theirs for theirs, ours in ACTIVATIONS.items() if ours == ffn.activation),
        vocab_size=config.vocab_size,
        type_vocab_size=TYPES,
        max_position_embeddings=model.position.max_len,
        layer_norm_eps=model.stack[0].norm.eps,
        pad_token_id=None,
        tie_word_embeddings=True,
    )


def table(model: LanguageModel) -> list[Entry]:
    """Their tensors and ours, in the order of the file."""
    entries = [
        Entry("embeddings.word_embeddings.weight", "embedding.weight"),
        Entry("embeddings.position_embeddings.weight", "position.table.weight"),
        AddedRow("embeddings.token_type_embeddings.weight", "position.table.weight", count=TYPES),
    ]
    pairs = [("embeddings.LayerNorm", "embedding_norm")]
    for i in range(model.config.depth):
        block, mixer, ffn = f"encoder.layer.{i}", f"stack.{2 * i}", f"stack.{2 * i + 1}"
        pairs += [(f"{block}.attention.self.{part}", f"{mixer}.layer.{part}") for part in ("query", "key", "value")]
        pairs += [
            (f"{block}.attention.output.dense", f"{mixer}.layer.out"),
            (f"{block}.attention.output.LayerNorm", f"{mixer}.norm"),
            (f"{block}.intermediate.dense", f"{ffn}.layer.up"),
            (f"{block}.output.dense", f"{ffn}.layer.down"),
            (f"{block}.output.LayerNorm", f"{ffn}.norm"),
        ]
    entries += [Entry(f"{theirs}.{kind}", f"{ours}.{kind}") for theirs, ours in pairs for kind in ("weight", "bias")]
    for part, ours in (("dense", "dense"), ("LayerNorm", "norm")):
        for kind in ("weight", "bias"):
            entries.append(Entry(f"cls.predictions.transform.{part}.{kind}", f"transform.{ours}.{kind}", prefixed=False))
    return entries + [Entry("cls.predictions.bias", "head.bias", prefixed=False)]
