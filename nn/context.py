"""What varies from call to call, in one small object that travels beside the activations."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass
class Context:
    """Where the tokens of this call stand, and what they may see.

    tokens: (B, T) int64, the token ids, for the layers that look something up by them.
    positions: (T,) or (B, T) int64, the index of each token in its sequence or, when packed, in its document.
    documents: (B, T) integers or None; with them, a token sees only tokens of its own document.
    domains: (B, 1) or (B, T) int64, what kind of text the tokens are of, for the layers that treat kinds apart; or None.
    causal: whether a token sees only itself and what stands before it.
    state: the decoding state of the sublayer that is being called, which the model sets anew for each; None in training.
    whole: where processes share the positions of a row, the context of all of them; this one is of the process's own.
    shared: what one layer works out and all others may use in the same call (rotation tables, masks), by name.
    """

    tokens: Tensor
    positions: Tensor
    documents: Tensor | None = None
    domains: Tensor | None = None
    causal: bool = True
    state: Any = None
    whole: "Context | None" = None
    shared: dict[Any, Any] = field(default_factory=dict)

    def once(self, name: Any, make: Callable[[], Any]) -> Any:
        """The value that `make` gives, worked out once a call however many layers ask for it."""
        if name not in self.shared:
            self.shared[name] = make()
        return self.shared[name]
