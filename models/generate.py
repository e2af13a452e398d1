"""Decoding: tokens out of a model, one at a time."""

import codecs
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.language_model import LanguageModel
from models.machine import synchronise


@dataclass
class Sampler:
    """How the next token is drawn from the logits (B, V).

    temperature: logits are divided by it; 0 takes the likeliest token. Of the tokens, these remain, in this order:
    top_k: the k likeliest (0: all). Fan et al. 2018 (arXiv:1805.04833).
    top_p: the fewest that hold this much probability. Holtzman et al. 2019, nucleus sampling (arXiv:1904.09751).
    min_p: those at least this fraction as likely as the likeliest. Nguyen et al. 2024 (arXiv:2407.01082).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (("temperature", 0, 1e6), ("top_k", 0, 2**31), ("top_p", 0, 1), ("min_p", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: {getattr(self, name)} is not between {low} and {high:g}")
        self.generator = torch.Generator().manual_seed(self.seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B, V) float32 probabilities on the CPU."""
        logits = logits.float().cpu()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        logits = (logits - logits.amax(-1, keepdim=True)) / self.temperature  # at most 0: nothing overflows
        if self.top_k:
            best = logits.topk(min(self.top_k, logits.shape[-1]))
            logits = torch.full_like(logits, -torch.inf).scatter_(-1, best.indices, best.values)
        if self.top_p < 1:
            ranked, order = logits.softmax(-1).sort(-1, descending=True)
            enough = ranked.cumsum(-1) - ranked >= self.top_p  # the ones before already hold top_p
            enough[..., 0] = False
            logits = logits.masked_fill(enough.scatter(-1, order, enough), -torch.inf)
        p = logits.softmax(-1)
        if self.min_p:
            p = p.masked_fill(p < self.min_p * p.max(-1, keepdim=True).values, 0)
        return p / p.sum(-1, keepdim=True)

    def __call__(self, logits: Tensor) -> Tensor:
        """(B, V) logits -> (B,) int64 tokens, on the device of the logits. ValueError if a row's largest is not finite."""
        highest, likeliest = logits.max(-1)
        if not math.isfinite(highest.sum().item()):
            raise ValueError("logits: not finite; in half precision that is an overflow, which --dtype float32 avoids")
        if self.temperature == 0:
            return likeliest
        return torch.multinomial(self.probabilities(logits), 1, generator=self.generator)[:, 0].to(logits.device)


@torch.inference_mode()
def generate(
    model: LanguageModel, prompt: Tensor, *, new_tokens: int, sampler: Sampler, stop: int | None = None
) -> Iterator[Tensor]:
    """Yield up to `new_tokens` tokens (B,) int64 that follow `prompt` (B, T) int64, ending early when all rows said `stop`."""
    if prompt.shape[1] == 0:
        raise ValueError("prompt: at least one token is needed to go on from")
    state = model.init_state(prompt.shape[0], prompt.shape[1] + new_tokens)
    ended = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)
    tokens = prompt
    for _ in range(new_tokens):
        following = sampler(model(tokens, state=state, last=True)[:, -1])
        yield following
        if stop is not None:
            ended |= following == stop
            if ended.all():
                return
        tokens = following[:, None]


def answers(model: LanguageModel, tokenizer: Any, question: str, answer: str) -> bool:
    """Whether the model, taking the likeliest tokens, goes on from a question with the answer, white space aside."""
    prompt = torch.tensor([tokenizer.encode(question)], device=model.head.weight.device)
    said = generate(model, prompt, new_tokens=len(answer) + 1, sampler=Sampler(temperature=0))
    return tokenizer.decode([token.item() for token in said]).strip().startswith(answer)


def spoken(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:
    """The text of tokens as they come, without the end of the text; characters appear when all their bytes are there."""
    characters = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token != tokenizer.eot:
            yield characters.decode(tokenizer.decode_bytes([token]))
    yield characters.decode(b"", final=True)


def sample(model: LanguageModel, tokenizer: Any, *, new_tokens: int, sampler: Sampler) -> str:
    """A text that the model makes up, up to its end or to `new_tokens`, or to as many as it has positions for."""
    prompt = torch.tensor([[tokenizer.eot]], device=model.head.weight.device)
    length = min(new_tokens, model.position.max_len or new_tokens)
    tokens = generate(model, prompt, new_tokens=length, sampler=sampler, stop=tokenizer.eot)
    return "".join(spoken((token.item() for token in tokens), tokenizer))


def fastest(model: LanguageModel, prompt: Tensor, *, new_tokens: int, repeats: int) -> dict[str, float]:
    """Tokens a second of reading a prompt (B, T), `prefill`, and of writing after it, `decode`: the best of some repeats."""
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(repeats):
        tokens = generate(model, prompt, new_tokens=new_tokens + 1, sampler=Sampler(temperature=0))
        for phase, count in (("prefill", prompt.numel()), ("decode", len(prompt) * new_tokens)):
            start = time.perf_counter()
            list(tokens) if phase == "decode" else next(tokens)
            synchronise(prompt.device)
            best[phase] = max(best[phase], count / (time.perf_counter() - start))
    return best
