"""Some parameters learn, the others stay as they are."""

import re
from fnmatch import fnmatchcase

from torch import nn


def learn_only(model: nn.Module, patterns: str) -> None:
    """Freeze every parameter whose name matches none of the patterns, joined by commas: `*.layer.query.*,head.*`.

    "" freezes none; what is frozen already stays so. A frozen one has requires_grad False and is no part of the optimizer.
    ValueError for a pattern that matches nothing that learns.
    """
    if not patterns:
        return
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(name, pattern) for name in learning):
            there = ", ".join(dict.fromkeys(re.sub(r"^stack\.[0-9]+\.", "stack.*.", name) for name in learning))
            raise ValueError(f"only: no parameter that learns is called {pattern!r}; there are {there}")
    for name, parameter in learning.items():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in wanted))
