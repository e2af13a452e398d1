"""Bits per byte: by hand, for a uniform guess, and independent of how the text is cut into batches."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from models import Config, LanguageModel, build_model
from models.score import bits_per_byte

VOCAB = 16


def test_by_hand():
    """Two tokens whose probabilities are known: 1/2 and 1/8 make 4 bits; they stand for 1 and 3 bytes; the end for none."""

    class Known(nn.Module):
        head = nn.Linear(1, 1)

        def forward(self, inputs, targets, documents=None):
            p = torch.tensor([0.5, 0.125, 0.25, 1.0])
            return -p[targets[targets >= 0]].log().sum()

    token_bytes = np.array([1, 3, 0, 7])
    batch = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0, 1, -100, -100]]), None
    assert math.isclose(bits_per_byte(Known(), [batch], token_bytes), 4 / 4, rel_tol=1e-6)
    end = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[2]]), None  # its 2 bits count, its 0 bytes do too
    assert math.isclose(bits_per_byte(Known(), [batch, end], token_bytes), (4 + 2) / 4, rel_tol=1e-6)
    with pytest.raises(ValueError, match="^batches: "):
        bits_per_byte(Known(), [end], token_bytes)
    with pytest.raises(ValueError, match="^batches: "):
        bits_per_byte(Known(), [], token_bytes)


def batches(rows: int, batch_size: int):
    tokens = torch.randint(VOCAB, (rows, 9), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(9) >= 4).long().expand(rows, -1)
    return [
        (t[:, :-1], t[:, 1:], d[:, :-1]) for t, d in zip(tokens.split(batch_size), documents.split(batch_size), strict=True)
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_a_uniform_guess(size):
    """log2(V) bits a token, each of `size` bytes: what a new model, whose head is zero, reaches exactly."""
    model = build_model(Config.of(vocab_size=VOCAB, dim=16, heads=2, depth=1, seq_len=8))
    assert math.isclose(bits_per_byte(model, batches(4, 2), np.full(VOCAB, size)), math.log2(VOCAB) / size, rel_tol=1e-5)


def test_batches_do_not_matter_but_documents_do():
    torch.manual_seed(0)
    model = LanguageModel(Config.of(vocab_size=VOCAB, dim=16, heads=2, depth=2, seq_len=8))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    token_bytes = np.arange(VOCAB) % 5
    scores = [bits_per_byte(model, batches(6, size), token_bytes) for size in (1, 2, 6)]
    assert max(scores) - min(scores) < 1e-4
    packed = bits_per_byte(model, batches(6, 2), token_bytes, packed=True)
    assert abs(packed - scores[0]) > 1e-3
