"""Attention calibration: its invariants, and its formula key by key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import Config, LanguageModel
from models.calibrate import calibrate, calibrated, heads_to_calibrate
from models.probe import attention_maps, sinks_of


def attention(seed: int, T: int = 24, sharp: float = 3.0, sink: int | None = None) -> torch.Tensor:
    scores = sharp * torch.randn(2, 3, T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if sink is not None:
        scores[..., sink] += 8
    return scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf).softmax(-1)


@given(st.integers(0, 50), st.floats(0, 1), st.floats(0.5, 8))
@settings(max_examples=50, deadline=None)
def test_invariants(seed, beta, alpha):
    """Sums of rows stay, nothing turns negative, what was hidden stays hidden, the first key keeps its share."""
    weights = attention(seed, sink=5)
    found = calibrate(weights, alpha=alpha, beta=beta)
    torch.testing.assert_close(found.sum(-1), weights.sum(-1))
    assert (found >= 0).all() and not found[weights == 0].any() and torch.equal(found[..., 0], weights[..., 0])
    torch.testing.assert_close(calibrate(weights, alpha=alpha, beta=1.0), weights)
    assert sinks_of(weights, alpha).sum() >= sinks_of(weights, alpha + 1).sum()


def test_formula():
    """Key by key as the paper writes it: A[k, i] + sum_j (1 - beta) A[k, j] A[k, i] / sum over the others of A[k, .]."""
    weights, beta = attention(0, sink=5), 0.4
    found, sinks = calibrate(weights, beta=beta), sinks_of(weights)
    assert sinks[..., 1:].any() and not sinks.all()
    for b in range(2):
        for h in range(3):
            tokens = [j for j in range(1, 24) if sinks[b, h, j]]
            others = [j for j in range(1, 24) if not sinks[b, h, j]]
            for k in range(24):
                row = weights[b, h, k]
                for i in others:
                    if row[others].sum() > 0:
                        more = sum((1 - beta) * row[j] for j in tokens) * row[i] / row[others].sum()
                        assert found[b, h, k, i].item() == pytest.approx((row[i] + more).item(), rel=1e-9)


def test_permuting_other_keys_commutes():
    weights = attention(1, sink=5)
    full = weights + 0.01  # every key is seen, so that any two may change places
    full = full / full.sum(-1, keepdim=True)
    order = torch.tensor([0, 5, *[i for i in range(1, 24) if i != 5][::-1]])
    torch.testing.assert_close(calibrate(full)[..., order], calibrate(full[..., order]))


@torch.no_grad()
def test_in_a_model():
    """Chosen heads alone change; beta = 1 changes nothing; afterwards all is as before."""
    torch.manual_seed(0)
    fields = dict(vocab_size=9, dim=16, heads=4, depth=2, stem="", mixer="gqa:kv_heads=2", position="none")
    model = LanguageModel(Config.of(**fields)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randint(9, (2, 30))
    plain = model(tokens)
    everything = [(layer, head) for layer in range(2) for head in range(4)]
    with calibrated(model, everything, beta=1.0):
        torch.testing.assert_close(model(tokens), plain, rtol=1e-5, atol=1e-5)
    before = attention_maps(model, tokens)
    with calibrated(model, [(0, 1), (0, 3)], alpha=0.5, beta=0.2):
        assert (model(tokens) - plain).abs().max() > 1e-3
        after = attention_maps(model, tokens)
    torch.testing.assert_close(after[0][:, [0, 2]], before[0][:, [0, 2]])
    torch.testing.assert_close(after[0][:, [1, 3]], calibrate(before[0][:, [1, 3]], alpha=0.5, beta=0.2))
    assert torch.equal(model(tokens), plain)


def test_heads_are_chosen_by_their_gain():
    """With a score that counts attention to the first key of head 1, which no calibration raises, none is chosen."""
    torch.manual_seed(0)
    model = LanguageModel(Config.of(vocab_size=9, dim=16, heads=4, depth=1, stem="", position="none"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    tokens = torch.randint(9, (2, 30))
    assert heads_to_calibrate(model, lambda: 1.0) == []
    gain = lambda: -attention_maps(model, tokens)[0][:, 2, :, 5].sum().item()  # noqa: E731
    assert set(heads_to_calibrate(model, gain, alpha=0.5)) <= {(0, 2)}
    with pytest.raises(ValueError, match="^heads: there is no head 4 in layer 0 of 1"), calibrated(model, [(0, 4)]):
        pass
