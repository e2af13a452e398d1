"""What a model costs before it is built: parameters by part, FLOPs, decoding state, activation memory; and on many ranks.

    python -m models.describe --model gpt2 --seq-len 512
    python -m models.describe --model llama-70b --mesh "fsdp=64,tp=8" --seq-len 8192

Counted on the meta device, so that 8B parameters need no memory. FLOPs are those of matrix products, a multiplication and
an addition each 1, as Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B) count them: attention over the whole
square of queries and keys, although a causal kernel may skip half.
"""

import math
import sys
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from models.config import Config, Parser, add_flags
from models.hardware import HARDWARE, predict
from models.language_model import LanguageModel
from models.plan import Run, plan
from nn.moe.experts import StackedLinear
from nn.monarch import MonarchLinear
from nn.objective.next_token import BIAS_COLUMNS
from nn.parallel.mesh import parse_mesh


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


def linear_flops(modules: Iterable[nn.Module]) -> int:
    """FLOPs of a token's products with the weights of these modules, each looked at by itself."""
    modules = list(modules)
    linear = sum(2 * m.weight.numel() for m in modules if isinstance(m, nn.Linear))
    linear += sum(2 * m.uses * m.in_features * m.out_features for m in modules if isinstance(m, StackedLinear))
    return linear + sum(2 * (m.first.numel() + m.second.numel()) for m in modules if isinstance(m, MonarchLinear))


def forward_flops(model: LanguageModel, seq_len: int) -> int:
    """FLOPs of one sequence's forward pass."""
    linear = linear_flops([*model.stack.modules(), *model.transform.modules(), model.head])
    mixing = sum(s.layer.mixing_flops(seq_len, seq_len) for s in model.stack if s.is_mixer)
    return linear * seq_len + mixing


def training_flops(model: LanguageModel, seq_len: int) -> int:
    """FLOPs of one sequence's forward and backward pass: three times the forward pass, where a bias of words is columns."""
    bias = 0 if model.head.bias is None else 2 * BIAS_COLUMNS * model.head.out_features
    return 3 * (forward_flops(model, seq_len) + bias * seq_len)


def state_bytes(model: LanguageModel, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes that decoding remembers of one sequence."""
    return sum(s.layer.state_bytes(1, seq_len, dtype) for s in model.stack if s.is_mixer)


def kept_bytes(config: Config, seq_len: int, dtype: torch.dtype) -> list[int]:
    """Bytes that each sublayer of the stack keeps for a plain backward pass of one sequence, and last what is not of the stack.

    A storage counts where it is kept first; parameters do not count.
    """
    with torch.device("meta"):
        model = LanguageModel(replace(config, backprop="plain")).to(dtype)
        tokens = torch.zeros(1, seq_len, dtype=torch.int64)
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    kept, counts, place = {}, [0] * (len(model.stack) + 1), [-1]

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in kept:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
            counts[place[0]] += storage.nbytes()
        return tensor

    for number, sublayer in enumerate(model.stack):
        sublayer.register_forward_pre_hook(lambda *_, number=number: place.__setitem__(0, number))
        sublayer.register_forward_hook(lambda *_: place.__setitem__(0, -1))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens, tokens)
    return counts


def activation_bytes(config: Config, seq_len: int, dtype: torch.dtype) -> int:
    """Bytes that the forward pass of one sequence keeps for the backward pass, parameters not counted."""
    return sum(kept_bytes(config, seq_len, dtype))


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


def add_plan_flags(parser: Parser) -> None:
    group = parser.add_argument_group("plan", "what a training run on the ranks of --mesh would need")
    group.add_argument("--rows", type=int, metavar="N", default=1, help="sequences of a micro-batch of a rank [1]")
    group.add_argument("--micro-batches", type=int, metavar="N", default=1, help="micro-batches a step [1]")
    group.add_argument("--zero", type=int, metavar="N", default=0, help="what copies share out, ZeRO's stage 0 to 3 [0]")
    group.add_argument("--hardware", choices=tuple(HARDWARE), help="one kind alone")


def planned(config: Config, rows: int, micro_batches: int, zero: int, hardware: str | None) -> str:
    """The table of a plan: the fullest stage's memory and messages, and what each kind of hardware could make of it.

    ValueError for what the mesh cannot share out.
    """
    from models.parts import parts_of  # which counts with what stands above

    sizes = parse_mesh(config.mesh)
    run = Run(sizes, config.dim, config.seq_len, rows, micro_batches, zero, config.backprop.partition(":")[0], config.offload)
    parts = parts_of(config, sizes)
    stages = plan(parts, run)
    fullest = max(stages, key=lambda stage: sum(stage.bytes.values()))
    together, sequences = sum(fullest.bytes.values()), rows * micro_batches * sizes["dp"] * sizes["ep"] * sizes["fsdp"]
    named = ",".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one rank"
    lines = [f"{named}: {math.prod(sizes.values()):,} ranks, a step of {sequences:,} x {config.seq_len:,} tokens", ""]
    memory = fullest.bytes | {"together": together}
    lines += [f"{name:28}{size:>18,.0f} bytes a rank" for name, size in memory.items()]
    lines += [f"{'host: ' + name:28}{size:>18,.0f} bytes a rank" for name, size in fullest.host.items()]
    lines += ["", *(f"{name:28}{size:>18,.0f} bytes sent a step" for name, size in fullest.sent.items())]
    lines += [""] if fullest.sent else []
    for name in [hardware] if hardware else HARDWARE:
        time, share = predict(parts, run, HARDWARE[name])
        fits = "fits" if together <= HARDWARE[name].memory else f"does not fit into {HARDWARE[name].memory / 1e9:.0f} GB"
        lines.append(f"{name:28}{share:>17.1%} of its FLOPs at most, {time:.3g} s a step; {fits}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m models.describe", description=__doc__.splitlines()[0])
    add_flags(parser)
    add_plan_flags(parser)
    given = vars(parser.parse_args(argv))
    options = {name: given.pop(name) for name in ("rows", "micro_batches", "zero", "hardware")}
    try:
        config = Config.of(**given)
        text = describe(config)
        print(f"{text}\n\n{planned(config, **options)}" if config.mesh else text)
    except ValueError as error:
        print(f"describe: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
