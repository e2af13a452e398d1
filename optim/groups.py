"""Which parameter belongs to which optimizer: decided by what its module is, not by how it is called."""

from typing import NamedTuple

from torch import Tensor, nn

Named = list[tuple[str, Tensor]]

# Modules whose parameters do not map one space to another, however many axes they have.
NO_MATRIX = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Split(NamedTuple):
    """(name, parameter) pairs by role, in the order of `model.named_parameters()`; optimizers take them as they are."""

    hidden: Named  # weight matrices (rows, columns) and stacks of them: Muon, with decay
    head: Named  # the matrix to the vocabulary, where it is not tied to the embedding: AdamW, with decay
    embedding: Named  # tables looked up by index, a tied head among them: AdamW, no decay
    vector: Named  # everything else, biases, gains, scalars, convolutions: AdamW, no decay


def by_parts(model: nn.Module, hidden: Named) -> list[dict]:
    """Groups of hidden matrices for Muon: those of a layer that has an attribute `parts`, rows of the matrices fused in it.

    >>> muon = Muon(by_parts(model, split_parameters(model).hidden))
    """
    fused = {id(module.weight): tuple(module.parts) for module in model.modules() if getattr(module, "parts", ())}
    groups: dict[tuple[int, ...], Named] = {}
    for name, param in hidden:
        groups.setdefault(fused.get(id(param), ()), []).append((name, param))
    return [dict(params=params, parts=parts) for parts, params in groups.items()]


def split_parameters(model: nn.Module) -> Split:
    """Sort every trainable parameter of any model into the four roles above; each appears once, shared ones too.

    - embedding: the weight of an `nn.Embedding` or `nn.EmbeddingBag`, and whatever shares that tensor;
    - head: of 2 or 3 axes, anywhere in a module whose own name is `head`;
    - vector: of 0, 1 or more than 3 axes; a single row or column; of a normalisation or convolution; or named in its
      module's attribute `elementwise`, a tuple of parameter names, by which a module says that a parameter of 2 or 3
      axes is a grid of scalars (as Mamba's `A_log` is);
    - hidden: all others.

    >>> split = split_parameters(model)
    >>> muon = Muon(split.hidden)
    >>> rest = AdamW([{"params": split.head}, {"params": split.embedding + split.vector, "weight_decay": 0.0}])
    >>> optimizer = Combined([muon, rest])
    """
    tables, scalars, heads = set(), set(), set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            tables.update(map(id, own.values()))
        elementwise = own if isinstance(module, NO_MATRIX) else getattr(module, "elementwise", ())
        scalars.update(id(own[name]) for name in elementwise if name in own)
        if "head" in path.split("."):
            heads.update(map(id, own.values()))

    split = Split([], [], [], [])
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        matrix = param.ndim in (2, 3) and min(param.shape[-2:]) > 1 and id(param) not in scalars
        if id(param) in tables:
            split.embedding.append((name, param))
        elif not matrix:
            split.vector.append((name, param))
        else:
            (split.head if id(param) in heads else split.hidden).append((name, param))
    return split
