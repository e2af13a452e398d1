"""Bits per byte: how well a model predicts text, whatever its tokenizer."""

import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from models.language_model import LanguageModel
from nn.objective import MaskedTokens, NextToken


def posed(batches: Iterable, objective: NextToken | MaskedTokens, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches as the objective asks for them, each row the same every time. `size`: how many ids the tokenizer has."""
    numbers = itertools.count()
    for inputs, targets, documents in batches:
        rows = [objective(*row, size, (next(numbers),)) for row in zip(inputs, targets, strict=True)]
        inputs, targets = (torch.stack(part) for part in zip(*rows, strict=True))
        yield inputs, targets, documents


@torch.inference_mode()
def bits_per_byte(model: LanguageModel, batches: Iterable, token_bytes: np.ndarray, *, packed: bool = False) -> float:
    """Bits the model needs for the targets of all `batches`, for each byte of text that they stand for.

    Batches hold inputs, targets (-100: does not count) and documents, each (B, T). Ends of documents cost bits, like any
    token, but are no text: `token_bytes` (V,) says 0 for them. The number is also the compressed size, in bits a byte,
    that an arithmetic coder would reach with this model; of an encoder it is a figure for the tokens that are hidden from it.
    """
    device, nats, length = model.head.weight.device, 0.0, 0
    for inputs, targets, documents in batches:
        loss = model(inputs.to(device), targets.to(device), documents=documents.to(device) if packed else None)
        nats += loss.item()
        length += int(token_bytes[targets[targets >= 0].numpy()].sum())
    if length == 0:
        raise ValueError("batches: their targets stand for no bytes of text")
    return nats / math.log(2) / length
