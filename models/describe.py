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
from nn.moe.experts import StackedLinear
from nn.monarch import MonarchLinear
from nn.objective.next_token import BIAS_COLUMNS


def parameters(model: LanguageModel) -> dict[str, int]:
    """Parameters by part; a tied head counts with the embedding. The values sum to the model's parameters."""
    mixers = [s.layer for s in model.stack if s.is_mixer]
    ffns = [s.layer for s in model.stack if not s.is_mixer]
    norms = [norm for s in model.stack for norm in (s.norm, s.second_norm) if norm is not None]
    parts = {
        "embedding": [model.embedding],
        "position": [model.position],
        f"mixers ({len(mixers)})": mixers,
        f"ffns ({len(ffns)})": ffns,
        "norms": [model.embedding_norm, *norms, model.final_norm, getattr(model.transform, "norm", nn.Identity())],
        "head": [model.transform, model.head],
    }
    seen, counts = set(), {}
    for name, modules in parts.items():
        counts[name] = sum(p.numel() for m in modules for p in m.parameters() if not (id(p) in seen or seen.add(id(p))))
    return counts


def active(model: LanguageModel) -> int:
    """Parameters that a token goes through: of the experts, as many as it is sent to."""
    stacks = [m for m in model.modules() if isinstance(m, StackedLinear)]
    idle = sum(m.weight.numel() - m.uses * m.in_features * m.out_features for m in stacks)
    return sum(p.numel() for p in model.parameters()) - idle


def forward_flops(model: LanguageModel, seq_len: int) -> int:
    """FLOPs of one sequence's forward pass."""
    modules = [*model.stack.modules(), *model.transform.modules(), model.head]
    linear = sum(2 * m.weight.numel() for m in modules if isinstance(m, nn.Linear))
    linear += sum(2 * m.uses * m.in_features * m.out_features for m in modules if isinstance(m, StackedLinear))
    linear += sum(2 * (m.first.numel() + m.second.numel()) for m in modules if isinstance(m, MonarchLinear))
    mixing = sum(s.layer.mixing_flops(seq_len, seq_len) for s in model.stack if s.is_mixer)
    return linear * seq_len + mixing


def training_flops(model: LanguageModel, seq_len: int) -> int:
    """FLOPs of one sequence's forward and backward pass: three times the forward pass, where a bias of words is columns."""
    bias = 0 if model.head.bias is None else 2 * BIAS_COLUMNS * model.head.out_features
    return 3 * (forward_flops(model, seq_len) + bias * seq_len)


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
        *([f"{'active, a token':28}{active(model):>18,}"] if active(model) < total else []),
        "",
        f"{'forward FLOPs a token':28}{flops // seq_len:>18,}",
        f"{'training FLOPs a token':28}{training_flops(model, seq_len) // seq_len:>18,}",
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
