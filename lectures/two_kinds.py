"""Two kinds of text, one byte a token, for lectures that ask which expert works on which: sums, and sentences of few words."""

import itertools
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from models import LanguageModel
from models.auxiliary import after_step
from optim import AdamW

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


def learned(model: LanguageModel, steps: int, *, seed: int = 1, together: bool = True) -> LanguageModel:
    """The model after `steps` on 8 rows of each kind, `together` in one batch or each in a part of the step by itself."""
    optimizer = AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    both = zip(*(rows(kind, 8, seed + number) for number, kind in enumerate(KINDS)), strict=True)
    for pair in itertools.islice(both, steps):
        for part in [torch.cat(pair)] if together else pair:
            (model(part[:, :-1], part[:, 1:]) / (16 * T)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(model)
    return model.eval()


@torch.no_grad()
def nats_a_token(model: LanguageModel) -> float:
    """Over both kinds."""
    texts = held_out()
    return sum(model(x[:, :-1], x[:, 1:]).item() for x in texts) / sum(x[:, 1:].numel() for x in texts)
