"""What the experts of a mixture are used for: how even their loads are, and how much an expert tells of the kind of text."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from models.language_model import LanguageModel
from nn.moe.routing import Routing, counts_of


@torch.inference_mode()
def expert_loads(model: LanguageModel, batches: Iterable[tuple[Tensor, ...]], domain: int | None = None) -> Tensor:
    """(layers, E) int64: how many choices of the inputs (B, T), the first of each batch, each expert of each mixture has.

    `domain`: the kind of text they are of, where the model is to be told.
    ValueError where the model has no mixture, or mixtures of different numbers of experts.
    """
    layers = [module for module in model.stack.modules() if isinstance(getattr(module, "router", None), torch.nn.Module)]
    sizes = {layer.router.experts for layer in layers}
    if len(sizes) != 1:
        found = " and ".join(map(str, sorted(sizes))) or "no"
        raise ValueError(f"checkpoint: it has mixtures of {found} experts; one number for all is needed")
    (many,) = sizes
    loads = torch.zeros(len(layers), many, dtype=torch.int64)
    for inputs, *_ in batches:
        device = model.head.weight.device
        model.hidden(inputs.to(device), domains=None if domain is None else torch.tensor([[domain]], device=device))
        routings: list[Routing] = [layer.routing for layer in layers]
        loads += torch.stack([counts_of(routing.experts, many).cpu() for routing in routings])
    return loads


def entropy(loads: Tensor) -> Tensor:
    """(…, E) loads -> (…) bits: log2 E where all are equal, 0 where one has all."""
    p = loads.double() / loads.sum(-1, keepdim=True)
    return -torch.xlogy(p, p).sum(-1) / math.log(2)


def specialisation(loads: Tensor) -> Tensor:
    """(domains, …, E) loads -> (…) bits that the expert of a choice tells of its domain, the domains being equally likely.

    Their mutual information: 0 where all domains use the experts alike, log2 of the number of domains where none share one.
    """
    p = loads.double() / loads.sum(-1, keepdim=True)  # of an expert, given the domain
    return entropy(p.mean(0)) - entropy(p).mean(0)


def draw_experts(loads: Tensor, domains: list[str], picture: Path) -> None:
    """The shares of experts (across) in the choices of domains (down), a panel a layer: loads (domains, layers, E)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = (loads.double() / loads.sum(-1, keepdim=True)).transpose(0, 1)  # (layers, domains, E)
    size = (2 + 0.3 * shares.shape[2], len(shares) * (0.6 + 0.25 * len(domains)))
    figure, axes = plt.subplots(len(shares), 1, figsize=size, squeeze=False, layout="constrained", sharex=True)
    for number, (axis, layer) in enumerate(zip(axes[:, 0], shares, strict=True), 1):
        image = axis.imshow(layer.numpy(), vmin=0, vmax=shares.max().item(), cmap="magma", aspect="auto")
        axis.set(yticks=range(len(domains)), yticklabels=domains, title=f"mixture {number}")
    axes[-1, 0].set_xlabel("expert")
    figure.colorbar(image, ax=axes, label="share of the choices")
    figure.savefig(picture, dpi=120)
    plt.close(figure)
