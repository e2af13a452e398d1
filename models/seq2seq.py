"""Sequence to sequence: one stack of LSTMs reads, another one writes, and all that passes between them is a state.

Sutskever, Vinyals and Le 2014, "Sequence to Sequence Learning with Neural Networks" (arXiv:1409.3215).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nn.checks import at_least
from nn.objective import next_token_loss
from nn.recurrent import LSTMCells
from nn.recurrent.lstm import LSTMState

# B batch, S source length, T target length, W cells

States = list[LSTMState]


class Seq2Seq(nn.Module):
    """p(target | source) = prod_t softmax(head h_t), the decoder beginning with the encoder's last states (section 2).

    `depth` layers of `width` cells on each side, with embeddings of the same width. With `reverse` the source is read from
    its end to its beginning, so that what is said first was read last: of all word pairs some are then close together,
    which is what learning begins with (section 3.3). All weights begin uniform in [-0.08, 0.08] (section 3.4).

    Sources of a batch have one length, as targets have: the paper sorts sentences by length. Target ids of -100 do not
    count.
    """

    def __init__(self, source_size: int, target_size: int, *, width: int = 1000, depth: int = 4, reverse: bool = True):
        super().__init__()
        at_least(1, source_size=source_size, target_size=target_size, width=width, depth=depth)
        self.reverse = reverse
        self.source, self.target = nn.Embedding(source_size, width), nn.Embedding(target_size, width)
        self.encoder, self.decoder = (nn.ModuleList(LSTMCells(width, width) for _ in range(depth)) for _ in range(2))
        self.head = nn.Linear(width, target_size, bias=False)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.08, 0.08)

    def encode(self, source: Tensor) -> States:
        """The states of every layer after a source (B, S) int64 is read."""
        x, states = self.source(source.flip(1) if self.reverse else source), []
        for layer in self.encoder:
            x, state = layer(x, layer.init_state(len(x), dtype=x.dtype, device=x.device))
            states.append(state)
        return states

    def decode(self, words: Tensor, states: States) -> tuple[Tensor, States]:
        """What the head is given (B, T, W) after each of the target's words (B, T), and the states after the last."""
        x, after = self.target(words), []
        for layer, state in zip(self.decoder, states, strict=True):
            x, state = layer(x, state)
            after.append(state)
        return x, after

    def forward(self, source: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        """The sum of -log p(target) in nats: source (B, S), the words before (B, T) and the words (B, T), int64."""
        x, _ = self.decode(inputs, self.encode(source))
        return next_token_loss(x.flatten(0, 1), self.head.weight, targets.flatten())


@dataclass
class Hypothesis:
    """A beginning of a target, or a whole one: its words without begin and end, and log p of them in nats."""

    words: list[int]
    score: float


@torch.inference_mode()
def beam_search(
    model: Seq2Seq, source: Tensor, *, begin: int, end: int, size: int = 12, max_len: int = 100
) -> list[Hypothesis]:
    """Translations of a source (S,) int64, the likeliest first: at most `size`, each ended by the word `end`.

    At every step the `size` likeliest beginnings go on; one that says `end` leaves the beam for the list of what was found
    (section 3.2), and the beam is smaller by it. What has no end after `max_len` words is not in the list. A `size` of 1
    is greedy search. ValueError for sizes below 1.
    """
    at_least(1, size=size, max_len=max_len)
    states = model.encode(source[None])
    beam, found = [Hypothesis([], 0.0)], []
    words = torch.tensor([[begin]], device=source.device)
    for step in range(max_len + 1):
        x, states = model.decode(words, states)
        scores = torch.tensor([h.score for h in beam], dtype=torch.float64)[:, None]
        scores = scores + model.head(x[:, -1]).double().log_softmax(-1).cpu()  # (beam, V)
        best = scores.flatten().topk(min(size - len(found), scores.numel()))
        rows, following, extended = [], [], []
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            row, word = divmod(place, scores.shape[1])
            if word == end:
                found.append(Hypothesis(beam[row].words, score))
            elif step < max_len:
                rows.append(row)
                following.append([word])
                extended.append(Hypothesis([*beam[row].words, word], score))
        if not extended:
            break
        beam, words = extended, torch.tensor(following, device=source.device)
        states = [LSTMState(state.h[rows], state.c[rows]) for state in states]
    return sorted(found, key=lambda h: -h.score)
