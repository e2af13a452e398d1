"""What goes on inside a trained model: loss by position, what each layer does, where attention looks."""

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from models.language_model import LanguageModel
from models.stack import layer_numbers
from nn.context import Context

# B batch, T time, C model dim, H heads, S keys


@torch.inference_mode()
def loss_by_position(model: LanguageModel, batches: Iterable) -> Tensor:
    """(T,) float64: the mean loss in nats of the token at each position of the windows; NaN where none counts.

    Batches hold inputs, targets (-100: does not count) and documents, each (B, T).
    """
    total = count = torch.zeros((), dtype=torch.float64)
    for inputs, targets, _ in batches:
        targets = targets.to(model.head.weight.device)
        logits = model(inputs.to(targets.device)).float()
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
        total = total + losses.view_as(targets).sum(0).double().cpu()
        count = count + (targets >= 0).sum(0).cpu()
    return total / count


def layers_of(model: LanguageModel) -> list[list[nn.Module]]:
    """The sublayers of each layer, from the first on: a mixer and what follows it up to the next."""
    numbers = layer_numbers(model.specs)
    return [[s for s, n in zip(model.stack, numbers, strict=True) if n == number] for number in sorted(set(numbers))]


@contextmanager
def without(sublayers: list[nn.Module]):
    """Within it these sublayers hand the residual stream on as it is."""
    for sublayer in sublayers:
        sublayer.forward = lambda x, context: x
    try:
        yield
    finally:
        for sublayer in sublayers:
            del sublayer.forward


@torch.inference_mode()
def layer_effects(model: LanguageModel, inputs: Tensor, targets: Tensor) -> list[dict[str, float]]:
    """What each layer does to inputs (B, T), with targets (B, T): one dict a layer, with

    skipped: by how many nats a token the loss rises without it;
    angle: the mean of arccos(cos(x, y)) / pi between the stream before and after it, 0 where it only scales;
    variance: of the stream after it, over all numbers.

    Sun et al. 2025, "The Curse of Depth in Large Language Models" (arXiv:2502.05795); the angle is that of Gromov et al.
    2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv:2403.17887), eq. 3.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    layers = layers_of(model)

    def watch(number: int, layer: list[nn.Module]) -> list:
        before, after = {}, {}

        def enter(module, args):
            before["x"] = args[0].float()

        def leave(module, args, y):
            after["y"] = y.float()
            seen[number] = before["x"], after["y"]

        return [layer[0].register_forward_pre_hook(enter), layer[-1].register_forward_hook(leave)]

    hooks = [hook for number, layer in enumerate(layers) for hook in watch(number, layer)]
    try:
        whole = model(inputs, targets).item()
    finally:
        for hook in hooks:
            hook.remove()
    counted, effects = int((targets >= 0).sum()), []
    for number, layer in enumerate(layers):
        x, y = seen[number]
        angle = torch.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos().mean().item() / math.pi
        with without(layer):
            skipped = (model(inputs, targets).item() - whole) / counted
        effects.append(dict(skipped=skipped, angle=angle, variance=y.var().item()))
    return effects


@contextmanager
def attending(layers: list[nn.Module], change: Callable[[nn.Module, Callable], Callable]):
    """Within it each layer of attention attends by `change(layer, attend)` instead of its own (q, k, v, context) -> y."""
    before = [vars(layer).get("attend") for layer in layers]
    for layer in layers:
        layer.attend = change(layer, layer.attend)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del layer.attend
            if own is not None:
                layer.attend = own


def weights_of(attend: Callable, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
    """(B, H, T, S): what each query gives to each key, from the layer's own attention with unit vectors as values."""
    units = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:2], -1, -1)
    return attend(q, k, units, context).float()


def attention_layers(model: LanguageModel) -> list[nn.Module]:
    return [s.layer for s in model.stack if hasattr(s.layer, "attend")]


@torch.inference_mode()
def attention_maps(model: LanguageModel, tokens: Tensor) -> list[Tensor]:
    """For each softmax attention layer the weights (B, H, T, S) that its queries give to the keys of tokens (B, T).

    Rows sum to 1, less what a learned sink takes.
    """
    maps: list[Tensor] = []

    def recorded(layer: nn.Module, attend: Callable) -> Callable:
        def call(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
            maps.append(weights_of(attend, q, k, v, context))
            return attend(q, k, v, context)

        return call

    with attending(attention_layers(model), recorded):
        model(tokens)
    return maps


def sinks_of(weights: Tensor, alpha: float = 5.0) -> Tensor:
    """(B, H, S) bool: keys to which attention (B, H, T, S) goes more than alpha / T on average over the queries that see them.

    Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks" (arXiv:2406.15765), with alpha = 5; that the mean is taken
    over the queries that see a key is our choice.
    """
    seen = (weights > 0).sum(-2).clamp(min=1)
    return weights.sum(-2) / seen > alpha / weights.shape[-2]


def draw_maps(maps: list[Tensor], picture: Path) -> None:
    """The attention of every head of every layer over the first text, as a PNG: queries downwards, keys to the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heads = max(weights.shape[1] for weights in maps)
    figure, axes = plt.subplots(len(maps), heads, figsize=(2 * heads, 2 * len(maps)), squeeze=False, layout="constrained")
    for number, (row, weights) in enumerate(zip(axes, maps, strict=True), 1):
        for head, axis in enumerate(row):
            axis.set(xticks=[], yticks=[])
            if head < weights.shape[1]:
                axis.imshow(weights[0, head].cpu().sqrt().numpy(), vmin=0, vmax=1, cmap="magma")
                axis.set_title(f"layer {number}, head {head + 1}", fontsize=7)
    figure.savefig(picture, dpi=120)
    plt.close(figure)
