def at_least(least: float, **arguments: float | None) -> None:
    """ValueError naming the first of the arguments that is smaller than `least` (None, for not given, is not)."""
    for name, value in arguments.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}: {value} is too small; at least {least}")


def width_of_heads(dim: int, heads: int, head_dim: int | None) -> int:
    """`head_dim`, or where it is None an equal share of `dim`. ValueError if there is none."""
    if head_dim is None and dim % heads:
        raise ValueError(f"heads: a dim of {dim} does not divide into {heads} heads; give head_dim or another number")
    return head_dim or dim // heads
