"""Make a mixture of experts out of a trained dense model: every expert begins as a copy of the feed-forward layer.

    python -m models.upcycle runs/20261120-121353 --experts 8 --top-k 2 --out mixture
    python train.py --weights mixture --steps 500

Komatsuzaki et al. 2022, "Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints" (arXiv:2212.05055): all else is
copied, the router is drawn from N(0, 0.02^2), and only it tells the copies apart from then on. A mixture of equals is

    y(x) = sum over the k chosen of g_e f(x) = f(x) sum g_e

so what the model computes stays the same where the weights g have the sum 1: a softmax over the chosen, as in Mixtral. A
softmax over all experts, of which the chosen keep theirs, makes every such layer smaller by what the others would have had
(Vavre et al. 2024, "Llama 3 Meets MoE: Efficient Upcycling", arXiv:2412.09952, compare both). Experts that a table chooses by
the token's id, and by its domain, begin so too (Ren et al. 2023, "PanGu-Sigma", arXiv:2303.10845, section 3.2):

    python -m models.upcycle runs/20261120-121353 --top-k 1 --layers last --options router=hash/domains=4 --out mixture

What one process holds of a sharded model is made from the dense tensors by themselves: `upcycled` for experts a to b.
"""

import sys
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.checkpoint import load_weights, model_tensors
from models.config import Config, Parser
from models.language_model import LanguageModel
from models.linearize import numbered, spelled
from models.residual import BESIDE
from models.stack import layer_numbers
from models.transform import command
from nn.checks import at_least
from nn.ffn import GLU, MLP, SGLU, GeGLU, SwiGLU
from nn.moe import MoE
from nn.moe.experts import GATED, PLAIN
from nn.moe.moe import make_router
from nn.spec import resolve

DENSE = (MLP, GLU, SwiGLU, GeGLU, SGLU)


@dataclass(frozen=True)
class Place:
    """Where a dense feed-forward layer stands: its number in the stack and among what is side by side there."""

    number: int
    part: int
    prefix: str  # of the names of its tensors, with a dot
    layer: nn.Module

    @property
    def width(self) -> int:
        return self.layer.down.in_features

    @property
    def names(self) -> tuple[str, ...]:
        return ("gate", "up", "down") if isinstance(self.layer, GLU) else ("up", "down")


def upcycle(
    model: LanguageModel,
    *,
    experts: int = 8,
    top_k: int = 2,
    over: str = "chosen",
    layers: str = "all",
    every: int = 1,
    noise: float = 0.0,
    router_std: float = 0.02,
    seed: int = 0,
    options: str = "",
) -> LanguageModel:
    """A model in which the dense ffns of `layers` (first,3-5,last), of these each `every`-th, are mixtures of their copies.

    `over` is that of the router topk, `options` are further ones of moe, `balance=0.02:capacity=4`; for `noise` and
    `router_std` see `upcycled`. ValueError for layers that have no dense ffn, or one that experts cannot be.
    """
    places = dense_ffns(model, layers, every)
    further = ("" if over == "chosen" else f"router=topk/over={over}", options)
    specs = [moe_spec(place, experts=experts, top_k=top_k, width=place.width, options=further) for place in places]
    drawn = dict(noise=noise, router_std=router_std, seed=seed)
    tensors = upcycled(model_tensors(model), [place.prefix for place in places], experts, **drawn)
    for place, spec in zip(places, specs, strict=True):
        if table := table_of(model, place, spec):
            del tensors[place.prefix + "router.gate.weight"]
            tensors |= table
    return assembled(model, with_specs(model, places, specs), tensors)


def upcycled(
    tensors: dict[str, Tensor],
    prefixes: list[str],
    experts: int,
    *,
    first: int = 0,
    last: int | None = None,
    noise: float = 0.0,
    router_std: float = 0.02,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Tensors of a dense model by name -> those of the mixture, with its experts `first` to `last` - 1 (default: all).

    `prefixes` are those of the names of its ffns (`stack.1.layer.`). Stacks of experts are (last - first, out, in), and
    several calls' laid one behind the other are those of one call. `noise` adds normal numbers of that share of a matrix's
    standard deviation, others to each expert. The router is whole everywhere, normal of standard deviation `router_std`.
    """
    last = experts if last is None else last
    at_least(1, experts=experts)
    at_least(0, noise=noise, router_std=router_std)
    if not 0 <= first < last <= experts:
        raise ValueError(f"first: experts {first} to {last - 1} are none of {experts}")
    made = {name: tensor.detach().clone() for name, tensor in tensors.items() if not name.startswith(tuple(prefixes))}
    for prefix in prefixes:
        dense = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        for name, matrix in dense.items():
            made[f"{prefix}experts.{name}"] = copies = torch.stack([matrix.detach()] * (last - first))  # (b - a, out, in)
            for expert, copy in enumerate(copies, first) if noise else ():
                copy += noise * matrix.std() * normal(matrix, seed, prefix, name, expert)
        made |= router_tensors(dense["up.weight"], prefix, experts, router_std, seed)
    return made


def router_tensors(up: Tensor, prefix: str, experts: int, std: float, seed: int) -> dict[str, Tensor]:
    """The matrix (E, dim) of a fresh router before an ffn with `up` (width, dim), of its dtype."""
    like = up.new_empty(experts, up.shape[1])
    return {f"{prefix}router.gate.weight": std * normal(like, seed, prefix, "router")}


def table_of(model: LanguageModel, place: Place, spec: str) -> dict[str, Tensor]:
    """The table of token ids of a mixture that routes by it, as a fresh model of this spec has it; {} for other routers."""
    _, options = resolve(spec, {"moe": MoE}, "ffn")
    if not options.get("router", "").startswith("hash"):
        return {}
    given = dict(top_k=options["top_k"], experts=options["experts"], vocab_size=model.config.vocab_size)
    router = make_router(options["router"], model.config.dim, layer=layer_numbers(model.specs)[place.number], **given)
    return {f"{place.prefix}router.table": router.table}


def normal(like: Tensor, *seeds: int | str) -> Tensor:
    """Normal numbers of a tensor's shape and dtype, the same for the same seeds wherever they are drawn."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seeds).encode()))
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def dense_ffns(model: LanguageModel, layers: str = "all", every: int = 1) -> list[Place]:
    """The dense ffns of a model's layers (`first,3-5,last`), of these each `every`-th. ValueError as `upcycle` says."""
    at_least(1, every=every)
    if model.config.adapt:
        raise ValueError("adapt: the model is adapted; python -m models.merge_adapter makes it plain")
    numbers, found = layer_numbers(model.specs), {}
    for number, sublayer in enumerate(model.stack):
        branches = getattr(sublayer.layer, "branches", None)
        for part, layer in enumerate(branches or [sublayer.layer]):
            if type(layer) in DENSE:
                prefix = f"stack.{number}.layer." + (f"branches.{part}." if branches else "")
                found.setdefault(numbers[number], []).append(Place(number, part, prefix, layer))
    if not found:
        raise ValueError("layers: none has a dense ffn (mlp, glu, swiglu, geglu, sglu), which could become experts")
    chosen = sorted(found) if layers == "all" else numbered(layers, max(numbers))
    for number in chosen:
        if number not in found:
            raise ValueError(f"layers: layer {number} has no dense ffn; {', '.join(map(str, sorted(found)))} have")
    if every > len(chosen):
        raise ValueError(f"every: there is no {every}th of {len(chosen)} layers")
    chosen = chosen[every - 1 :: every]
    for number in chosen:
        for layer in (place.layer for place in found[number]):
            if layer.down.bias is not None:
                raise ValueError(f"layers: the ffn of layer {number} has biases, which experts have not")
            if layer.activation not in (GATED if isinstance(layer, GLU) else PLAIN):
                raise ValueError(f"layers: the ffn of layer {number} has {layer.activation}, which experts do not know")
    return [place for number in chosen for place in found[number]]


def moe_spec(place: Place, *, options: tuple[str, ...] = (), **given: int) -> str:
    """The spec of a mixture with a dense ffn's activation, the numbers `given` and further options."""
    parts = [f"{key}={value}" for key, value in given.items()]
    parts += [f"activation={place.layer.activation}"] * (place.layer.activation != "silu")
    parts += ["gated=false"] * (not isinstance(place.layer, GLU))
    return ":".join(["moe", *parts, *filter(None, options)])


def with_specs(model: LanguageModel, places: list[Place], specs: list[str]) -> Config:
    """The configuration in which each of the places has its spec."""
    parts = [BESIDE.split(spec) for spec in model.specs]
    for place, spec in zip(places, specs, strict=True):
        parts[place.number][place.part] = spec
    return spelled(model.config, ["+".join(beside) for beside in parts])


def assembled(model: LanguageModel, config: Config, tensors: dict[str, Tensor]) -> LanguageModel:
    """A model of this configuration with these tensors, in the mode (training or not) of another."""
    with torch.device("meta"):
        made = LanguageModel(config)
    load_weights(made, tensors, "tensors")
    return made.train(model.training)


def flags(parser: Parser) -> None:
    shared_flags(parser)
    parser.add_argument("--over", default="chosen", choices=("chosen", "all"), help="what the softmax runs over [chosen]")
    parser.add_argument("--noise", type=float, default=0.0, metavar="X", help="on each expert, of its standard deviation [0]")


def shared_flags(parser: Parser) -> None:
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="experts a layer [8]")
    parser.add_argument("--top-k", type=int, default=2, metavar="N", help="experts a token [2]")
    parser.add_argument("--layers", default="all", metavar="…", help="which layers change: first,3-5,last [all]")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of these each N-th [1]")
    parser.add_argument("--router-std", type=float, default=0.02, metavar="X", help="standard deviation of the router [0.02]")
    parser.add_argument("--options", default="", metavar="…", help="further ones of moe: balance=0.02:capacity=4")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the router and of what else is drawn [0]")


def main(argv: list[str] | None = None) -> int:
    return command(argv, "upcycle", __doc__, flags, upcycle, told=lambda **_: dict(domains=torch.tensor([[0]])))


if __name__ == "__main__":
    sys.exit(main())
