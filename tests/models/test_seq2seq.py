import itertools

import numpy as np
import pytest
import torch

from models.seq2seq import Seq2Seq, beam_search

BEGIN, END, V = 0, 1, 5


@pytest.fixture(scope="module")
def model() -> Seq2Seq:
    torch.manual_seed(0)
    made = Seq2Seq(7, V, width=6, depth=2).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.8)
    return made


SOURCE = torch.tensor([3, 6, 2, 5])


def log_p(model: Seq2Seq, words: list[int]) -> float:
    inputs, targets = torch.tensor([[BEGIN, *words]]), torch.tensor([[*words, END]])
    return -model(SOURCE[None], inputs, targets).item()


@pytest.mark.parametrize("reverse", [False, True])
def test_against_pytorchs_lstm(reverse):
    """The encoder is torch.nn.LSTM over the source, turned round or not; its states are where the decoder's begin."""
    torch.manual_seed(1)
    model = Seq2Seq(7, V, width=6, depth=2, reverse=reverse).double()
    sides = [torch.nn.LSTM(6, 6, num_layers=2, batch_first=True).double() for _ in range(2)]
    for side, layers in zip(sides, (model.encoder, model.decoder), strict=True):
        for i, cells in enumerate(layers):
            with torch.no_grad():
                getattr(side, f"weight_ih_l{i}").copy_(cells.input.weight)
                getattr(side, f"weight_hh_l{i}").copy_(cells.recur.weight)
                getattr(side, f"bias_ih_l{i}").copy_(cells.input.bias)
                getattr(side, f"bias_hh_l{i}").zero_()
    source, inputs, targets = torch.randint(7, (3, 5)), torch.randint(V, (3, 4)), torch.randint(V, (3, 4))
    _, states = sides[0](model.source(source.flip(1) if reverse else source))
    logits = model.head(sides[1](model.target(inputs), states)[0])
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model(source, inputs, targets), wanted)


def test_begins_as_the_paper_says():
    weights = torch.cat([parameter.detach().flatten() for parameter in Seq2Seq(50, 50, width=32, depth=2).parameters()])
    assert weights.abs().max() <= 0.08
    assert weights.std().item() == pytest.approx(0.08 / np.sqrt(3), rel=0.02)


def test_a_beam_of_one_is_greedy(model):
    words, longest = [], 12
    for _ in range(longest):
        x, _ = model.decode(torch.tensor([[BEGIN, *words]]), model.encode(SOURCE[None]))
        word = model.head(x[0, -1]).argmax().item()
        if word == END:
            break
        words.append(word)
    found = beam_search(model, SOURCE, begin=BEGIN, end=END, size=1, max_len=longest)
    assert [h.words for h in found] == ([words] if word == END else [])


def test_a_wide_beam_finds_all(model):
    """With room for every beginning, the list is that of all targets by their probability, each with its own."""
    longest = 3
    words = [w for w in range(V) if w != END]
    every = [list(t) for length in range(longest + 1) for t in itertools.product(words, repeat=length)]
    wanted = sorted(((log_p(model, target), target) for target in every), reverse=True)
    found = beam_search(model, SOURCE, begin=BEGIN, end=END, size=V ** (longest + 1), max_len=longest)
    assert [h.words for h in found] == [target for _, target in wanted]
    np.testing.assert_allclose([h.score for h in found], [score for score, _ in wanted])


def test_what_a_beam_finds_is_scored_right(model):
    found = beam_search(model, SOURCE, begin=BEGIN, end=END, size=4, max_len=30)
    assert 1 <= len(found) <= 4
    for h in found:
        assert h.score == pytest.approx(log_p(model, h.words))


@pytest.mark.parametrize("name", ["width", "depth", "source_size"])
def test_sizes_below_one(name):
    arguments = dict(source_size=3, target_size=3, width=2, depth=1) | {name: 0}
    with pytest.raises(ValueError, match=f"^{name}: 0"):
        Seq2Seq(arguments.pop("source_size"), arguments.pop("target_size"), **arguments)


@pytest.mark.parametrize("name", ["size", "max_len"])
def test_beams_below_one(model, name):
    with pytest.raises(ValueError, match=f"^{name}: 0"):
        beam_search(model, SOURCE, begin=BEGIN, end=END, **{name: 0})
