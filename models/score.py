"""How well a model predicts text, in bits per byte whatever its tokenizer; how well it answers a task."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.language_model import LanguageModel
from nn.objective import MaskedTokens, NextToken


def posed(batches: Iterable, objective: NextToken | MaskedTokens, size: int) -> Iterator[tuple[Tensor | None, ...]]:
    """Batches as the objective asks for them, each row the same every time. `size`: how many ids the tokenizer has."""
    numbers = itertools.count()
    for inputs, targets, *rest in batches:
        rows = [objective(*row, size, (next(numbers),)) for row in zip(inputs, targets, strict=True)]
        inputs, targets = (torch.stack(part) for part in zip(*rows, strict=True))
        yield inputs, targets, *rest


@torch.inference_mode()
def bits_per_byte(
    model: LanguageModel | Callable[..., Tensor],
    batches: Iterable,
    token_bytes: np.ndarray,
    *,
    packed: bool = False,
    device: torch.device | None = None,
) -> float:
    """Bits the model needs for the targets of all `batches`, for each byte of text that they stand for.

    Batches hold inputs, targets (-100: does not count), documents, perhaps domains, each (B, T). Ends of documents cost
    bits, like any token, but are no text: `token_bytes` (V,) says 0 for them. The number is also the compressed size, in bits
    a byte, that an arithmetic coder would reach; of an encoder it is a figure for the tokens that are hidden from it.
    `model` is one, or what gives its losses; then `device` says where.
    """
    device, nats, length = device or model.head.weight.device, 0.0, 0
    for inputs, targets, documents, *domains in batches:
        given = dict(documents=documents if packed else None, domains=domains[0] if domains else None)
        given = {name: x.to(device) for name, x in given.items() if x is not None}
        loss = model(inputs.to(device), targets.to(device), **given)
        nats += loss.item()
        length += int(token_bytes[targets[targets >= 0].numpy()].sum())
    if length == 0:
        raise ValueError("batches: their targets stand for no bytes of text")
    return nats / math.log(2) / length


@torch.inference_mode()
def answered(
    model: LanguageModel,
    batches: Iterable,
    oracle: Callable[[Tensor], Tensor] | None = None,
    logits_of: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """How well a model answers what the targets of all `batches` ask for: inputs, targets (-100: not asked), each (B, T).

    accuracy: the share of the asked positions where the likeliest token is the target; complete: the share of sequences
    where it is at all of them; val_loss: nats an asked position. With `oracle`, (B, T) to (B, T), also its accuracy.
    `logits_of`, (B, T) to (B, T, V), is asked in the model's place.
    ValueError for an encoder, which would read on before it answers, and where nothing is asked.
    """
    if not model.causal:
        raise ValueError("model: an encoder sees all tokens at once; a task asks one that reads from left to right")
    device, asked, sequences, sums = model.head.weight.device, 0, 0, torch.zeros(4, dtype=torch.float64)
    for inputs, targets, *_ in batches:
        logits, wanted = (logits_of or model)(inputs.to(device)), targets >= 0  # (B, T, V), (B, T)
        logits, right = logits[wanted.to(device)].float(), targets[wanted]  # (N, V), (N,)
        correct = torch.ones_like(wanted)
        correct[wanted] = logits.argmax(1).cpu() == right
        nats = cross_entropy(logits, right.to(device), reduction="sum").item()
        solved = (oracle(inputs)[wanted] == right).sum().item() if oracle else 0
        sums += torch.tensor([correct[wanted].sum(), correct.all(1).sum(), nats, solved])
        asked, sequences = asked + len(right), sequences + len(targets)
    if not asked:
        raise ValueError("batches: their targets ask for nothing")
    names = ["accuracy", "complete", "val_loss", *(["oracle"] if oracle else [])]
    return dict(zip(names, (sums / torch.tensor([asked, sequences, asked, asked])).tolist(), strict=False))


@torch.inference_mode()
def worked_example(model: LanguageModel, batch: tuple[Tensor, ...], spell: Callable[[Tensor], str]) -> str:
    """The first row of a task's batch (inputs, targets, …): what the model reads, what is asked of it, what it says."""
    inputs, targets = batch[0][0], batch[1][0]  # (T,)
    said, asked = model(inputs[None].to(model.head.weight.device))[0].argmax(1).cpu(), targets >= 0
    parts = {"inputs": inputs, "answers": targets[asked], "model": said[asked]}
    return "\n".join(f"{name + ':':<9}{_shortened(spell(ids))}" for name, ids in parts.items())


def _shortened(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-most // 2 :]}"
