"""Where attention and MLPs stand in a hybrid stack: the allocator of Mamba-2-Hybrid.

    python -m models.hybrid 56 0.08 0.5

prints M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-: M a Mamba-2 sublayer, * attention, - an MLP.
Waleffe et al. 2024, "An Empirical Study of Mamba-based Language Models" (arXiv:2406.07887), section 3.3: attention stands
evenly spaced and never at an end; then MLPs take the places of Mamba sublayers, evenly, the last sublayer being one. The
authors' code adds up floats on the way; here halves are exact.
"""

import argparse
import sys

SUBLAYERS = {"M": "mamba2:groups=8", "*": "gqa:kv_heads=8", "-": "mlp:activation=gelu"}


def hybrid_pattern(layers: int, attention_ratio: float, mlp_ratio: float) -> str:
    """The pattern of `layers` sublayers, of which these shares are attention and MLPs, each rounded to the nearest number.

    ValueError for a negative number, or for shares that together leave fewer than no Mamba sublayers.
    """
    for name, value in (("layers", layers), ("attention_ratio", attention_ratio), ("mlp_ratio", mlp_ratio)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name}: {value} is not a number of at least 0")
    attention, mlps = round(layers * attention_ratio), round(layers * mlp_ratio)
    rest = layers - attention
    if rest < mlps:
        raise ValueError(f"mlp_ratio: {attention} attention and {mlps} mlp sublayers are more than {layers}")
    mixed = insert("M" * (rest - mlps), "-" * mlps, sections=mlps)
    return insert(mixed, "*" * attention, sections=attention + 1)


def insert(text: str, marks: str, *, sections: int) -> str:
    """The marks put behind the first sections, of as many, of the text, whose borders are rounded, halves up."""
    borders = [(2 * len(text) * i + sections) // (2 * sections) for i in range(len(marks) + 1)] if marks else [0]
    parts = [text[a:b] + mark for a, b, mark in zip(borders, borders[1:], marks, strict=False)]
    return "".join(parts) + text[borders[-1] :]


def spelled(pattern: str, sublayers: dict[str, str] = SUBLAYERS) -> str:
    """A pattern as `--stack` reads it, each letter as the spec that `sublayers` has for it. ValueError for another letter.

    The published model has 8 groups of B and C, 8 key/value heads, no position encoding, and MLPs four times as wide as the
    stream; that their activation is GELU is our reading of the authors' scripts.
    """
    if unknown := set(pattern) - set(sublayers):
        raise ValueError(f"pattern: {min(unknown)!r} is none of {', '.join(sublayers)}")
    return " ".join(sublayers[letter] for letter in pattern)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m models.hybrid", description=__doc__.splitlines()[0])
    parser.add_argument("layers", type=int, help="sublayers in all")
    parser.add_argument("attention_ratio", type=float, help="share of attention sublayers")
    parser.add_argument("mlp_ratio", type=float, help="share of MLP sublayers")
    parser.add_argument("--stack", action="store_true", help="print the sublayers as --stack reads them")
    flags = parser.parse_args(argv)
    try:
        pattern = hybrid_pattern(flags.layers, flags.attention_ratio, flags.mlp_ratio)
    except ValueError as error:
        print(f"hybrid: {error}", file=sys.stderr)
        return 2
    print(spelled(pattern) if flags.stack else pattern)
    return 0


if __name__ == "__main__":
    sys.exit(main())
