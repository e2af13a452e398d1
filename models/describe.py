"""What a model costs before it is built: parameters by part, FLOPs, decoding state, activation memory.

    python -m models.describe --model gpt2 --seq-len 512

Counted on the meta device, so that 8B parameters need no memory. FLOPs are those of matrix products, a multiplication and
an addition each 1, as Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B) count them: attention over the whole
square of queries and keys, although a causal kernel may skip half.
"""

import sys

import torch
from torch import nn

from models.config import Config, Parser, add_flags
from models.language_model import LanguageModel


def parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters by part; a tied head counts with the embedding. The values sum to the model's parameters."""
    mixers = [s.layer for s in model.stack if s.is_mixer]
    ffns = [s.layer for s in model.stack if not s.is_mixer]
    parts = {
        "embedding": [model.embedding],
        "position": [model.position],
        f"mixers ({len(mixers)})": mixers,
        f"ffns ({len(ffns)})": ffns,
        "norms": [*(s.norm for s in model.stack), model.final_norm],
        "head": [] if model.config.tie else [model.head],
    }
    seen, counts = set(), {}
    for name, modules in parts.items():
        counts[name] = sum(p.numel() for m in modules for p in m.parameters() if not (id(p) in seen or seen.add(id(p))))
    return counts


def forward_flops(model: LanguageModel, seq_len: int) -> int:
    """FLOPs of one sequence's forward pass; its backward pass takes twice as many."""
    linear = sum(2 * m.weight.numel() for m in [*model.stack.modules(), model.head] if isinstance(m, nn.Linear))
    mixing = sum(s.layer.mixing_flops(seq_len, seq_len) for s in model.stack if s.is_mixer)
    return linear * seq_len + mixing


def state_bytes(model: LanguageModel, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes that decoding remembers of one sequence."""
    return sum(s.layer.state_bytes(1, seq_len, dtype) for s in model.stack if s.is_mixer)


def activation_bytes(config: Config, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of one sequence keeps for the backward pass, parameters not counted."""
    with torch.device("meta"):
        model = LanguageModel(config).to(dtype)
        tokens = torch.zeros(1, seq_len, dtype=torch.int64)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    return sum(storage.nbytes() for storage in kept.values())


def describe(config: Config, dtype: torch.dtype = torch.bfloat16) -> str:
    """The table that the command prints."""
    with torch.device("meta"):
        model = LanguageModel(config)
    seq_len = config.seq_len
    parts = parameters(model)
    lines = [f"{name:28}{count:>18,}" for name, count in parts.items() if count]
    total, flops = sum(parts.values()), forward_flops(model, seq_len)
    state, activations = state_bytes(model, seq_len, dtype), activation_bytes(config, seq_len, dtype)
    return "\n".join([
        f"{config.model}: {len(model.stack)} sublayers of width {config.dim}, sequences of {seq_len:,} tokens, "
        + str(dtype).removeprefix("torch."),
        "",
        *lines,
        f"{'parameters':28}{total:>18,}",
        "",
        f"{'forward FLOPs a token':28}{flops // seq_len:>18,}",
        f"{'training FLOPs a token':28}{3 * flops // seq_len:>18,}",
        f"{'decoding state':28}{state:>18,} bytes a sequence, {state / seq_len:,.0f} a token",
        f"{'activations for backward':28}{activations:>18,} bytes a sequence, {activations / seq_len:,.0f} a token",
    ])  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m models.describe", description=__doc__.splitlines()[0])
    add_flags(parser)
    try:
        print(describe(Config.of(**vars(parser.parse_args(argv)))))
    except ValueError as error:
        print(f"describe: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
