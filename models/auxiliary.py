"""Losses beside that of the predictions, which layers leave on themselves: balance of experts, rewards of a policy."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn


def auxiliary_loss(layers: Iterable[nn.Module], costs: Callable[[], Tensor]) -> Tensor | None:
    """The sum of what the modules have left in `auxiliary` and of the losses of their policies; None if there is none.

    In nats a token. `costs()` gives -log p of each token (N,), and is asked only where a router learns by reward. What was
    left is taken away, so that no pass counts twice.
    """
    parts, asked = [], None
    for layer in layers:
        for module in layer.modules():
            if getattr(module, "auxiliary", None) is not None:
                parts.append(module.auxiliary)
                module.auxiliary = None
            if getattr(module, "taken", None) is not None:
                asked = costs() if asked is None else asked
                parts.append(module.policy_loss(asked))
    return sum(parts) if parts else None


def after_step(model: nn.Module) -> None:
    """Tell every layer that counts over a step that the step is over."""
    for module in model.modules():
        if hasattr(module, "after_step"):
            module.after_step()
