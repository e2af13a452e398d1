def at_least(least: float, **arguments: float | None) -> None:
    """ValueError naming the first of the arguments that is smaller than `least` (None, for not given, is not)."""
    for name, value in arguments.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}: {value} is too small; at least {least}")
