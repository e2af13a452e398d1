"""Passkey retrieval: a number is told somewhere in a long text that does not matter, and asked for at its end.

Mohtashami and Jaggi 2023, "Landmark Attention" (arXiv:2305.16300), section 4.2. A guess is right once in 10^digits.
"""

import random
from dataclasses import dataclass

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True)
class Passkey:
    """prompt: the text up to the answer; answer: the digits; depth: where the number stands, from 0 (first) to 1 (last)."""

    prompt: str
    answer: str
    depth: float


def passkey(length: int, *, depth: float, seed: int, digits: int = 5) -> Passkey:
    """A prompt of at most `length` characters (and at least the question), the same for the same arguments."""
    if not 0 <= depth <= 1:
        raise ValueError(f"depth: a place between 0 and 1, not {depth}")
    if digits < 1:
        raise ValueError(f"digits: at least 1, not {digits}")
    answer = "".join(random.Random(f"{seed} {digits}").choices("0123456789", k=digits))
    told = f"The pass key is {answer}. Remember it. {answer} is the pass key.\n"
    asked = "What is the pass key? The pass key is "
    lines = max(0, (length - len(told) - len(asked)) // len(FILLER))
    before = round(depth * lines)
    return Passkey(FILLER * before + told + FILLER * (lines - before) + asked, answer, depth)
