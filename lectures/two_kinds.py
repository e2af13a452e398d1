"""Two kinds of text, one byte a token, for lectures that ask which expert works on which: sums, and sentences of few words."""

import random
from collections.abc import Iterator

import torch
from torch import Tensor

T = 32  # tokens a row
WORDS = "the cat sat on a mat and saw red birds near old trees while rain fell over green hills".split()


def sums(rng: random.Random) -> str:
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    return f"{a}+{b}={a + b}; "


def sentences(rng: random.Random) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(5)) + ". "


KINDS = (sums, sentences)


def text(kind, many: int, seed: int) -> Tensor:
    """(many,) int64 tokens of a kind."""
    rng = random.Random(seed)
    pieces = "".join(kind(rng) for _ in range(many // 5))
    return torch.tensor(list(pieces[:many].encode()))


def rows(kind, many: int, seed: int) -> Iterator[Tensor]:
    """Batches (many, T + 1) without end."""
    tokens, generator = text(kind, 40_000, seed), torch.Generator().manual_seed(seed)
    while True:
        places = torch.randint(len(tokens) - T, (many,), generator=generator)
        yield torch.stack([tokens[i : i + T + 1] for i in places])


def held_out() -> list[Tensor]:
    """150 rows of each kind (150, T + 1) that `rows` never shows."""
    return [text(kind, 150 * (T + 1), 99).view(-1, T + 1) for kind in KINDS]
