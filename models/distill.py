"""Distillation: a model learns from another, whose matrices, outputs or logits it is to have.

    python -m models.linearize runs/20261120-121353 --mixer discrete_mamba2 --out student
    python train.py --teacher runs/20261120-121353 --weights student --match matrices --out runs/1
    python train.py --teacher runs/20261120-121353 --weights runs/1 --match outputs --out runs/2
    python train.py --teacher runs/20261120-121353 --weights runs/2 --match logits --out runs/3

The three stages of MOHAWK: Bick et al. 2024, "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models"
(arXiv:2408.10189), which Llamba scales up (Bick et al. 2025, arXiv:2502.14458). In the first two each layer of the model is
given what the teacher's layer reads, and the teacher's own output goes on to the next: all mixers learn at once,
each by itself, and nothing else does.
"""

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.linear_cross_entropy import slices
from models.checkpoint import find
from models.config import Config
from models.language_model import LanguageModel
from models.recast import branches
from models.weights import load_model
from nn.attention import GQA
from nn.context import Context
from nn.embedding import EMBEDDINGS
from nn.objective.next_token import IGNORED
from nn.spec import resolve

# B batch, T time, C model dim, H heads, V vocabulary, N tokens that count


class Distillation(nn.Module):
    """A model and its teacher as one module, whose call is a loss; its parameters are the model's alone.

    `match` is a spec of MATCHES. ValueError for a teacher that such a model cannot have.
    """

    def __init__(self, model: LanguageModel, teacher: LanguageModel, match: str = "logits"):
        super().__init__()
        self.compare, self.options = resolve(match, MATCHES, "match")
        if teacher.config.vocab_size != model.config.vocab_size or teacher.causal != model.causal:
            kinds = [f"{'a decoder' if m.causal else 'an encoder'} of {m.config.vocab_size} ids" for m in (teacher, model)]
            raise ValueError(f"teacher: {kinds[0]}; the model is {kinds[1]}")
        self.model, self.aside = model, [teacher.eval().requires_grad_(False)]  # in a list it is no part of the module
        compared = [] if self.compare is logits else pairs(model, teacher)
        for layers in compared if self.compare is matrices else []:
            heads = [heads_of(layer) for layer in layers]
            if heads[0] != heads[1]:
                raise ValueError(f"teacher: its matrices have {heads[1]} heads, the model's {heads[0]}")

    def forward(self, tokens: Tensor, targets: Tensor, *, documents: Tensor | None = None) -> Tensor:
        """The mean distance times the number of targets that count: a scalar, to be divided by that number.

        tokens and targets (B, T) int64, a target of -100 does not count; documents (B, T), where packed.
        """
        loss = self.compare(self.model, self.aside[0], tokens, targets != IGNORED, documents, **self.options)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ValueError(f"only: no parameter that learns has a part in the {self.compare.__name__} that are to match")
        return loss


def matrices(model: LanguageModel, teacher: LanguageModel, tokens: Tensor, counted: Tensor, documents: Tensor | None) -> Tensor:
    """What mixes the tokens: the mean over layers, texts and heads of ||softmax(Q K^T) - M||_F, MOHAWK's first stage.

    Both as matrices (B, H, T, T), which are held whole.
    """
    losses, calls = [], [m.context(tokens, documents, None) for m in (model, teacher)]
    for ours, theirs, x, _ in read(model, teacher, tokens, documents):
        with torch.no_grad():
            wanted = matrix_of(theirs, x, calls[1])
        losses.append(torch.linalg.vector_norm(matrix_of(ours, x, calls[0]) - wanted, dim=(-2, -1)).mean())
    return torch.stack(losses).mean() * counted.sum()


def outputs(
    model: LanguageModel,
    teacher: LanguageModel,
    tokens: Tensor,
    counted: Tensor,
    documents: Tensor | None,
    *,
    norm: Literal["l2", "mse"] = "l2",
) -> Tensor:
    """What the mixers give: the mean over layers and tokens of ||y - y'||_2, MOHAWK's second stage, or of (y - y')^2.

    The mean square error is LoLCATs' attention transfer (Zhang et al. 2024, arXiv:2410.10254).
    """
    losses, context = [], model.context(tokens, documents, None)
    for ours, _, x, wanted in read(model, teacher, tokens, documents):
        y = ours(x, context)
        error = y.to(torch.promote_types(y.dtype, torch.float32)) - wanted
        losses.append((torch.linalg.vector_norm(error, dim=-1) if norm == "l2" else error.square()).mean())
    return torch.stack(losses).mean() * counted.sum()


def logits(model: LanguageModel, teacher: LanguageModel, tokens: Tensor, counted: Tensor, documents: Tensor | None) -> Tensor:
    """What is said in the end: the cross-entropy -sum_v p'_v log p_v to the teacher's distribution, MOHAWK's third stage.

    Of the tokens that count. Its least value is the entropy of the teacher. Logits are made for a slice of tokens at a time,
    and in the backward pass once more.
    """
    x = model.transform(model.final_norm(model.hidden(tokens, documents=documents)))[counted]  # (N, C)
    with torch.no_grad():
        taught = teacher.transform(teacher.final_norm(teacher.hidden(tokens, documents=documents)))[counted]  # (N, C')

    def part(x: Tensor, taught: Tensor) -> Tensor:
        z, wanted = model.logits(x), teacher.logits(taught)  # (n, V)
        wide = torch.promote_types(z.dtype, torch.float32)
        return -(wanted.to(wide).softmax(-1) * z.to(wide).log_softmax(-1)).sum()

    parts = [checkpoint(part, x[rows], taught[rows], use_reentrant=False) for rows in slices(x, model.head.weight)]
    return torch.stack(parts).sum() if parts else x.sum()


MATCHES = {"matrices": matrices, "outputs": outputs, "logits": logits}


def read(
    model: LanguageModel, teacher: LanguageModel, tokens: Tensor, documents: Tensor | None
) -> list[tuple[nn.Module, nn.Module, Tensor, Tensor]]:
    """The mixers that are compared, each with its teacher's and what that reads and gives, (B, T, C) both."""
    layers, seen, hooks = pairs(model, teacher), {}, []
    for _, theirs in layers:
        hooks.append(theirs.register_forward_hook(lambda layer, given, y: seen.update({layer: (given[0], y)})))
    try:
        with torch.no_grad():
            teacher.hidden(tokens, documents=documents)
    finally:
        for hook in hooks:
            hook.remove()
    return [(ours, theirs, *seen[theirs]) for ours, theirs in layers]


def pairs(model: LanguageModel, teacher: LanguageModel) -> list[tuple[nn.Module, nn.Module]]:
    """The mixers that are compared, each with the teacher's in its place: of the sublayers whose specs differ, or of all.

    ValueError unless both models have the same width and mixers in the same places.
    """
    shapes = [(m.config.dim, [sublayer.is_mixer for sublayer in m.stack]) for m in (teacher, model)]
    if shapes[0] != shapes[1]:
        spelled = [f"{len(places)} sublayers, mixers at {where(places)}, width {dim}" for dim, places in shapes]
        raise ValueError(f"teacher: {spelled[0]}; the model has {spelled[1]}")
    found = []
    for ours, theirs, *specs in zip(model.stack, teacher.stack, model.specs, teacher.specs, strict=True):
        if ours.is_mixer and not isinstance(theirs.layer, tuple(EMBEDDINGS.values())):
            mixers = (next(b for b in branches(m.layer) if hasattr(b, "init_state")) for m in (ours, theirs))
            found.append((specs[0] == specs[1], (*mixers,)))
    return [pair for same, pair in found if not same] or [pair for _, pair in found]


def where(places: list[bool]) -> str:
    return ", ".join(str(i) for i, is_mixer in enumerate(places, 1) if is_mixer) or "none"


def matrix_of(layer: nn.Module, x: Tensor, context: Context) -> Tensor:
    """(B, H, T, T): by which weights a mixer that reads x (B, T, C) adds up the tokens' values, in float32 at least.

    Attention's are what it gives to unit vectors as values: exactly its own, whatever its options.
    """
    if hasattr(layer, "matrix"):
        return layer.matrix(x, context)
    q, k, v = layer.projected(x, context)
    q, k = layer.rotate(q, context), layer.rotate(k, context)
    q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, heads, T, D)
    units = torch.eye(x.shape[1], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)  # (B, K, T, T)
    weights = torch.cat([layer.attend(q, k, part, context) for part in units.split(v.shape[-1], -1)], -1)  # as wide as values
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def heads_of(layer: nn.Module) -> int:
    """How many matrices a mixer has. ValueError for one that cannot be read as any."""
    if not hasattr(layer, "matrix") and getattr(type(layer), "forward", None) is not GQA.forward:
        raise ValueError(f"match: matrices of attention or of mixers that can write theirs down, not {type(layer).__name__}")
    return layer.heads


def with_teacher(model: LanguageModel, config: Config) -> nn.Module:
    """The module that train.py calls for a loss: the model, or with its `teacher` a Distillation.

    ValueError for a teacher that is not there or does not fit.
    """
    if not config.teacher:
        if config.match:
            raise ValueError(f"match: {config.match!r} needs a --teacher")
        return model
    if config.domains:
        raise ValueError("domains: not with a teacher, who is not told them")
    if config.compile:
        raise ValueError("compile: not with a teacher, whose layers are watched as they run")
    try:
        teacher = load_model(find(Path(config.teacher)))
    except ValueError as error:
        raise ValueError(f"teacher: {error}") from None
    return Distillation(model, teacher.to(model.head.weight.device), config.match or "logits")
