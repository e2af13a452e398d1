import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.linear import Linear
from nn.spec import nearest

# r rank


class LowRank(nn.Module):
    """What stands beside a linear layer: s B A x, with A (r, in), B (out, r) and s = alpha / r."""

    def __init__(self, layer: Linear, *, rank: int, alpha: float):
        super().__init__()
        self.scale, like = alpha / rank, dict(device=layer.weight.device, dtype=layer.weight.dtype)
        self.A = nn.Linear(layer.in_features, rank, bias=False, **like)
        self.B = nn.Linear(rank, layer.out_features, bias=False, **like)
        self.A.elementwise = self.B.elementwise = ("weight",)  # AdamW moves them, as in the paper: neither is a map by itself

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.B(self.A(x))

    def matrix(self) -> Tensor:
        """s B A, (out, in)."""
        return self.scale * (self.B.weight @ self.A.weight)

    def own_init(self, generator: torch.Generator | None = None) -> None:
        """A within 1 / sqrt(in), as the authors' code has it, and B zero: nothing is added at first."""
        bound = self.A.in_features**-0.5
        nn.init.uniform_(self.A.weight, -bound, bound, generator=generator)
        nn.init.zeros_(self.B.weight)


def lora(
    model: nn.Module,
    generator: torch.Generator | None = None,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    targets: tuple[str, ...] = ("query", "key", "value", "out"),
) -> None:
    """Low-rank adaptation: beside frozen matrices stand products of two thin ones, which alone learn.

    Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3:

        y = W x + b + (alpha / r) B A x

    for each linear layer of the model's sublayers whose name is among the targets. At first B = 0, and the model is what it
    was. All its other parameters are frozen. `merge` makes one matrix of the two.

    ValueError for a target that no layer is called, or a model that is adapted already.
    """
    at_least(1, rank=rank)
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha: {alpha} is no scale; a positive number")
    # of a language model the sublayers alone: the loss reads the head's matrix as it is
    layers = [(path.rpartition(".")[2], layer) for path, layer in getattr(model, "stack", model).named_modules()]
    layers = [(name, layer) for name, layer in layers if isinstance(layer, Linear)]
    names = sorted({name for name, _ in layers})
    for target in targets:
        if target not in names:
            raise ValueError(f"targets: no layer is called {target!r}{nearest(target, names)}; there are: {', '.join(names)}")
    if any(layer.adapter is not None for _, layer in layers):
        raise ValueError("adapter: the model has one already; merge it first")
    model.requires_grad_(False)
    for name, layer in layers:
        if name in targets:
            layer.adapter = LowRank(layer, rank=rank, alpha=alpha)
            layer.adapter.own_init(generator)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """In place: W + (alpha / r) B A for W, and nothing beside it any more. All parameters learn again.

    ValueError for a model that has no adapter.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear) and module.adapter is not None]
    if not layers:
        raise ValueError("adapter: the model has none to merge")
    for layer in layers:
        layer.weight.copy_(layer.effective_weight)
        layer.adapter = None
    model.requires_grad_(True)
