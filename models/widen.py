"""A wider model out of a trained one: channels, heads and neurons are copied, so that it knows what the narrow one knows.

Unit j of the wide model copies unit g(j) of the narrow one, which then has C_g(j) copies. A matrix W becomes

    W'[i, j] = W[g_out(i), g_in(j)] / C_g_in(j)

so that copies which are read add up to what was read before: function-preserving initialisation, FPI (Chen et al. 2015,
"Net2Net", arXiv:1511.05641; Chen et al. 2021, "bert2BERT", arXiv:2110.07143). But copies of one unit get equal gradients and
stay equal. Advanced knowledge initialisation, AKI, of bert2BERT takes the rows of new units from the same matrix of the next
layer, which breaks the symmetry and no longer preserves the function.

RMSNorm sees the mean of the squares of n channels. That of M is the same where every channel has equally many copies; and for
any numbers of copies where a copy is multiplied by s = sqrt(M / (n C)) as it is written, and divided by s as it is read, since
sum_j (s x_g(j))^2 / M = sum_i x_i^2 / n. With M a multiple of n, s is 1. (The factor is ours: bert2BERT copies as it is.)

With grouped queries a new query head stands in the group of the head it copies, whose keys it reads, and the number of
key/value heads stays: AquilaMoE (Zhang et al. 2024, arXiv:2408.06567) goes from 32 to 40 query heads with 8 of keys and values.
Where every query head has a key/value head of its own, that is copied with it. The width of a head stays.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.checkpoint import load_weights
from models.language_model import LanguageModel
from models.linearize import spelled
from models.recast import branches
from models.residual import BESIDE
from models.stack import SUBLAYERS
from nn.attention import GQA, MHA, MQA
from nn.embedding import NgramEmbedding
from nn.ffn import GLU, MLP, SGLU, GeGLU, SwiGLU
from nn.linear import Linear
from nn.norm import NORMS as NORM_FAMILY
from nn.norm import LayerNorm, NoNorm, RMSNorm, SimpleRMSNorm
from nn.position import LearnedPosition, NoPosition, RoPE
from nn.spec import build

ATTENTION, FFNS = (GQA, MHA, MQA), (MLP, GLU, SwiGLU, GeGLU, SGLU)
NORMS, POSITIONS = (RMSNorm, SimpleRMSNorm, LayerNorm, NoNorm), (NoPosition, RoPE, LearnedPosition)


@dataclass(frozen=True)
class Copies:
    """Which of the old units each of the new ones copies, (new,) int64, and what it is multiplied by, (new,) float64."""

    source: Tensor
    scale: Tensor

    @property
    def counts(self) -> Tensor:
        """(new,): how many copies of its source there are, itself among them."""
        return self.source.bincount()[self.source]

    @property
    def added(self) -> Tensor:
        """(new,) bool: all but the first copy of each."""
        sources, order = self.source.sort(stable=True)
        return torch.zeros_like(order, dtype=torch.bool).scatter(0, order[1:], sources[1:] == sources[:-1])

    def written(self, values: Tensor) -> Tensor:
        """(old, …) -> (new, …): what writes the old units, a bias or the rows of a matrix, writes the new ones."""
        scale = self.scale.view(-1, *[1] * (values.ndim - 1)).to(values.device)
        return (values.detach()[self.source] * scale).to(values.dtype)

    def read(self, matrix: Tensor) -> Tensor:
        """(…, old) -> (…, new): what reads the old units reads the new ones."""
        return (matrix.detach()[..., self.source] / (self.counts * self.scale).to(matrix.device)).to(matrix.dtype)

    def blocks(self, size: int) -> "Copies":
        """The same for units that are `size` numbers each."""
        source = (self.source[:, None] * size + torch.arange(size)).flatten()
        return Copies(source, self.scale.repeat_interleave(size))


def copies(old: int, new: int, generator: torch.Generator) -> Copies:
    """Every unit equally often, up to one, the old ones first; which are copied once more is drawn."""
    source = torch.cat([torch.arange(old).repeat(new // old), torch.randperm(old, generator=generator)[: new % old]])
    return Copies(source, torch.ones(new, dtype=torch.float64))


def channels(old: int, new: int, generator: torch.Generator) -> Copies:
    """Those of the residual stream, with the factors that keep the mean of squares."""
    made = copies(old, new, generator)
    return replace(made, scale=(new / (old * made.counts.double())).sqrt())


def inner(layer: nn.Module, dim: int, old: int, ffn_width: int | None, generator: torch.Generator) -> tuple[Copies, ...]:
    """The copies inside of a layer: of query heads and of key/value heads, or of neurons."""
    if not isinstance(layer, ATTENTION):
        width = layer.down.in_features
        wanted = -(-width * dim // old) if ffn_width is None else ffn_width
        if wanted < width:
            raise ValueError(f"ffn_width: {wanted} neurons are fewer than the {width} that there are")
        return (copies(width, wanted, generator),)
    H, K, more = layer.heads, layer.kv_heads, times(layer.heads, dim, old)
    if K == H and not isinstance(layer, MQA):
        return (query := copies(H, more, generator)), query
    if more % K:
        raise ValueError(f"dim: at {dim} there are {more} query heads, which {K} key/value heads cannot share evenly")
    source = torch.cat([group * (H // K) + copies(H // K, more // K, generator).source for group in range(K)])
    return Copies(source, torch.ones(more, dtype=torch.float64)), copies(K, K, generator)


def times(heads: int, dim: int, old: int) -> int:
    """As many times the heads. ValueError where this is no whole number."""
    if heads * dim % old:
        raise ValueError(f"dim: {heads} heads do not become {dim} / {old} times as many; {old // heads} channels a head")
    return heads * dim // old


def widen(model: LanguageModel, dim: int, *, method: str = "fpi", ffn_width: int | None = None, seed: int = 0) -> LanguageModel:
    """A model of width `dim`, with as many times the heads and, unless `ffn_width` says how many, the neurons of the ffns.

    `fpi` computes what the narrow one does, up to rounding; `aki` does not. What is copied once more than the rest is drawn
    from the seed. A tied head stays tied where the final norm has a gain, which then takes the number of copies up, and is
    untied where it has none. ValueError for a smaller dim, one that does not suit the heads, and for sublayers, norms or
    positions whose tensors are not known here.
    """
    check(model, dim, method)
    old, generator = model.config.dim, torch.Generator().manual_seed(seed)
    stream, plans, tensors, specs, borrowed = channels(old, dim, generator), {}, {}, [], False
    for number, (spec, sublayer) in enumerate(zip(model.specs, model.stack, strict=True)):
        words, layers = BESIDE.split(spec), branches(sublayer.layer)
        for part, layer in enumerate(layers):
            prefix = f"stack.{number}.layer." + f"branches.{part}." * (len(layers) > 1)
            if isinstance(layer, NgramEmbedding):
                tensors[f"{prefix}table.weight"] = stream.written(layer.table.weight.T).T
                continue
            kind = kind_of(layer)
            if kind not in plans:  # layers of one kind have the same copies
                plans[kind] = inner(layer, dim, old, ffn_width, generator)
            words[part] = respelled(words[part], layer, plans[kind], dim)
            above = next(later(model, number, kind), layer) if method == "aki" else layer  # the last has none above it
            borrowed = borrowed or above is not layer
            tensors |= {prefix + name: tensor for name, tensor in grown(layer, above, plans[kind], stream).items()}
        specs.append("+".join(words))
    if method == "aki" and not borrowed:
        raise ValueError("method: aki takes from the next layer of the same kind, and no layer has one")
    config = spelled(model.config, specs)
    config = replace(config, dim=dim, heads=max(1, config.heads * dim // old), tie=config.tie and gained(model.final_norm))
    tensors |= around(model, stream, tied=config.tie)
    with torch.device("meta"):
        made = LanguageModel(config)
    load_weights(made, tensors, "widen")
    return made.train(model.training)


def grown(layer: nn.Module, above: nn.Module, units: tuple[Copies, ...], stream: Copies) -> dict[str, Tensor]:
    """The tensors of a wide layer by name; the rows of its added units are those of the layer `above`."""
    if isinstance(layer, ATTENTION):
        query, key = (unit.blocks(layer.head_dim) for unit in units)
        sides = dict(query=(query, stream), key=(key, stream), value=(key, stream), gate=(query, stream), out=(stream, query))
        along = {"sinks": units[0], "value_table.weight": key}  # their last axis
        along |= {"query_gain": query, "key_gain": key} if layer.qk_norm == "all" else {}
    else:
        sides, along = dict(gate=(units[0], stream), up=(units[0], stream), down=(stream, units[0])), {}
    made = {}
    for name, (out, into) in sides.items():
        for kind in ("weight", "bias"):
            ours, theirs = (getattr(getattr(source, name, None), kind, None) for source in (layer, above))
            if ours is not None:
                ours, theirs = (out.written(into.read(t) if kind == "weight" else t) for t in (ours, theirs))
                ours[out.added] = theirs[out.added]
                made[f"{name}.{kind}"] = ours
    for name, tensor in layer.state_dict().items():
        if name not in made:
            made[name] = tensor[..., along[name].source] if name in along else tensor.clone()
    return made


def around(model: LanguageModel, stream: Copies, *, tied: bool) -> dict[str, Tensor]:
    """The tensors outside of the layers: embeddings, norms, head."""
    made = {"embedding.weight": stream.written(model.embedding.weight.T).T}
    if isinstance(model.position, LearnedPosition):
        made["position.table.weight"] = stream.written(model.position.table.weight.T).T
    for name, norm in model.named_modules():
        if isinstance(norm, NORMS) and gained(norm):
            made[f"{name}.weight"] = norm.weight.detach()[stream.source]
        if isinstance(norm, NORMS) and getattr(norm, "bias", None) is not None:
            made[f"{name}.bias"] = stream.written(norm.bias)
    if tied:  # what the copies of a channel write and read again is M / n times what it was
        offset, share = getattr(model.final_norm, "offset", 0), model.config.dim / len(stream.source)
        made["final_norm.weight"] = (made["final_norm.weight"] + offset) * share - offset
        if "final_norm.bias" in made:
            made["final_norm.bias"] *= share
    else:
        made["head.weight"] = stream.read(model.head.weight)
    if model.head.bias is not None:
        made["head.bias"] = model.head.bias.detach().clone()
    return made


def gained(norm: nn.Module) -> bool:
    return getattr(norm, "weight", None) is not None


def kind_of(layer: nn.Module) -> tuple:
    """Layers of one kind have matrices of the same names and shapes, and heads alike."""
    linears = [(name, child) for name, child in layer.named_children() if isinstance(child, Linear)]
    shapes = ((name, linear.weight.shape, linear.bias is None) for name, linear in linears)
    return type(layer), getattr(layer, "heads", None), getattr(layer, "kv_heads", None), *shapes


def later(model: LanguageModel, number: int, kind: tuple) -> Iterator[nn.Module]:
    """The layers of a kind behind the sublayer of that number."""
    for sublayer in model.stack[number + 1 :]:
        yield from (layer for layer in branches(sublayer.layer) if kind_of(layer) == kind)


def respelled(spec: str, layer: nn.Module, units: tuple[Copies, ...], dim: int) -> str:
    """The spec of a wide layer: what says how many heads or neurons there are is replaced, or added where it is needed."""
    name, *pairs = spec.split(":")
    given = dict(pair.split("=", 1) for pair in pairs)
    sizes = [str(len(unit.source)) for unit in units]
    if isinstance(layer, ATTENTION):
        given |= {key: size for key, size in zip(("heads", "kv_heads"), sizes, strict=True) if key in given}
    else:
        given.pop("width", None)
        with torch.device("meta"):
            plain = build(":".join([name, *(f"{key}={value}" for key, value in given.items())]), SUBLAYERS, "sublayer", dim)
        given |= {"width": sizes[0]} if plain.down.in_features != int(sizes[0]) else {}
    return ":".join([name, *(f"{key}={value}" for key, value in given.items())])


def check(model: LanguageModel, dim: int, method: str) -> None:
    config = model.config
    if method not in ("fpi", "aki"):
        raise ValueError(f"method: {method!r} is none of fpi, aki")
    if dim < config.dim:
        raise ValueError(f"dim: {dim} is less than the {config.dim} that there are")
    if config.adapt:
        raise ValueError("adapt: the model is adapted; python -m models.merge_adapter makes it plain")
    if config.head.partition(":")[0] != "linear":
        raise ValueError(f"head: {config.head!r} has layers of its own, which are not known here")
    if type(model.position) not in POSITIONS:
        raise ValueError(f"position: {config.position!r} knows heads or channels by their number, of which copies have another")
    norms = [module for module in model.modules() if isinstance(module, tuple(NORM_FAMILY.values()))]
    if not all(type(norm) in NORMS for norm in norms):
        raise ValueError(f"norm: {config.norm!r} is not among those that are known here: rmsnorm, srmsnorm, layernorm, none")
    if dim % config.dim and any(type(norm) is LayerNorm for norm in norms):
        raise ValueError(f"dim: layernorm needs a multiple of {config.dim}; python -m models.convert_norm makes it rmsnorm")
    for layer in (branch for sublayer in model.stack for branch in branches(sublayer.layer)):
        if type(layer) not in (*ATTENTION, *FFNS, NgramEmbedding):
            raise ValueError(f"stack: {type(layer).__name__} is not among the layers that are known here")
        if getattr(layer, "qk_norm", "") == "all" and dim % config.dim:
            raise ValueError(f"dim: qk_norm=all is one norm over all heads, which needs a multiple of {config.dim}")
