"""The same model in other coordinates of its residual stream, which other norms read: what conversions are made of.

The stream x (n numbers a token) becomes x' = W x + o of n' numbers: whatever writes into it writes W times that, and the
embedding adds the origin o. If a new norm N' and a matrix R of each place are such that R N'(x') = N(x), the matrices that
read N(x) need only be multiplied by R, and the model computes the same.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.checkpoint import load_weights
from models.config import Config
from models.language_model import LanguageModel
from models.residual import BESIDE, Parallel
from models.stack import SUBLAYERS
from nn.attention import GQA, MHA, MQA
from nn.embedding import NgramEmbedding
from nn.ffn import GLU, MLP, GeGLU, SwiGLU
from nn.linear import Linear
from nn.position import LearnedPosition, NoPosition
from nn.spec import arguments, resolve

NORM = re.compile(r"(stack\.[0-9]+\.|final_)norm\.")  # the names of their tensors
KNOWN = (GQA, MHA, MQA, MLP, GLU, SwiGLU, GeGLU, NgramEmbedding)  # they read the stream by their linear layers alone


def norms_of(model: LanguageModel) -> list[nn.Module]:
    """The norms of a pre-norm model in the order of the forward pass, the final one last. ValueError for another model."""
    for name, plain in (("embedding_norm", "none"), ("head", "linear")):
        if (value := getattr(model.config, name)).partition(":")[0] != plain:
            raise ValueError(f"{name}: {value!r} has a norm of its own, which no conversion here knows")
    if model.config.norm_place not in ("pre", "scaled"):
        raise ValueError(f"norm_place: {model.config.norm_place!r}, but only norms before their sublayer can be exchanged")
    return [*(sublayer.norm for sublayer in model.stack), model.final_norm]


@torch.no_grad()
def recast(
    model: LanguageModel,
    norm: str,
    states: list[dict[str, Tensor]],
    reads: list[Tensor],
    write: Tensor,
    origin: Tensor | None = None,
) -> LanguageModel:
    """A model whose norms are all of the spec `norm`, with the tensors `states`; every place's `reads` is its R, (n, n').

    `write` is W, (n', n), and `origin` o, (n',). Worked out in float64, stored in the model's dtype, its head never tied.
    ValueError where a sublayer or a position encoding is of a kind whose matrices are not known here.
    """
    check(model, moved=write.shape[0] != write.shape[1] or not torch.equal(write, torch.eye(len(write)).to(write)))
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if not NORM.match(name)}
    dtype = model.embedding.weight.dtype

    def put(name: str, tensor: Tensor) -> None:
        tensors[name] = tensor.to(dtype, copy=True)

    embedding = model.config.embedding_scale * model.embedding.weight.double()
    put("embedding.weight", embedding @ write.T + (0 if origin is None else origin))
    if isinstance(model.position, LearnedPosition):
        put("position.table.weight", model.position.table.weight.double() @ write.T)
    for i, (sublayer, read, state) in enumerate(zip([*model.stack, model.head], reads, states, strict=True)):
        place = f"stack.{i}." if i < len(model.stack) else ""
        for name, tensor in state.items():
            put(f"{place}norm.{name}" if place else f"final_norm.{name}", tensor)
        for name, module in sublayer.named_modules(prefix=place[:-1] or "head"):
            if getattr(module, "writes_residual", False):
                put(f"{name}.weight", write @ module.weight.double())
                if module.bias is not None:
                    put(f"{name}.bias", write @ module.bias.double())
            elif isinstance(module, NgramEmbedding):
                put(f"{name}.table.weight", module.table.weight.double() @ write.T)
            elif isinstance(module, Linear):
                put(f"{name}.weight", module.weight.double() @ read)
    with torch.device("meta"):
        made = LanguageModel(configured(model, norm, len(write)))
    load_weights(made, tensors, "recast")
    return made.train(model.training)


def check(model: LanguageModel, *, moved: bool) -> None:
    if model.config.adapt:
        raise ValueError("adapt: the model is adapted; python -m models.merge_adapter makes it plain")
    norms_of(model)  # or an error
    for layer in (branch for sublayer in model.stack for branch in branches(sublayer.layer)):
        if type(layer) not in KNOWN:
            known = ", ".join(kind.__name__ for kind in KNOWN)
            raise ValueError(f"stack: {type(layer).__name__} is not among the kinds that are known here: {known}")
    if moved and not isinstance(model.position, LearnedPosition) and type(model.position).embed is not NoPosition.embed:
        raise ValueError(f"position: {model.config.position!r} adds to the stream what no weight holds")


def branches(layer: nn.Module) -> list[nn.Module]:
    return list(layer.branches) if isinstance(layer, Parallel) else [layer]


def configured(model: LanguageModel, norm: str, dim: int) -> Config:
    """The configuration with another norm and width, in which every other width is what it was."""
    config = replace(model.config, norm=norm, tie=False, embedding_scale=1.0)
    if dim == config.dim:
        return config
    pairs = zip(model.specs, model.stack, strict=True)
    pinned = ["+".join(map(pin, BESIDE.split(spec), branches(sublayer.layer))) for spec, sublayer in pairs]
    return replace(config, dim=dim, stack=" ".join(pinned) or "none")


def pin(spec: str, layer: nn.Module) -> str:
    """The spec with the widths spelled out that would follow from the model's."""
    make, options = resolve(spec, SUBLAYERS, "sublayer")
    widths = dict(head_dim=getattr(layer, "head_dim", None), width=layer.down.in_features if hasattr(layer, "down") else None)
    for name, width in widths.items():
        if name in arguments(make) and options.get(name) is None:
            spec = ":".join([part for part in spec.split(":") if not part.startswith(f"{name}=")] + [f"{name}={width}"])
    return spec
