"""The next-token loss against PyTorch's cross-entropy, against NumPy, and against finite differences."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import linear_cross_entropy
from models import Config, LanguageModel
from nn.objective import OBJECTIVES, MaskedTokens, next_token_loss

N, DIM, VOCAB = 11, 6, 17


@pytest.fixture(params=[1, 4, 1000], ids="rows={}".format)
def rows_at_once(request, monkeypatch):
    """Tokens of one slice: one, a number that does not divide N, more than there are."""
    slice_by(monkeypatch, request.param)


def slice_by(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(linear_cross_entropy, "SLICE_ON_CPU", 1)
    patch.setattr(linear_cross_entropy, "ROWS_ON_CPU", rows)


def inputs(dtype=torch.float64, n=N, ignored=(2, 3, 10), scale=1.0):
    made = torch.Generator().manual_seed(0)
    x, head = (scale * torch.randn(rows, DIM, dtype=torch.float64, generator=made) for rows in (n, VOCAB))
    targets = torch.randint(VOCAB, (n,), generator=made)
    targets[[i for i in ignored if i < n]] = -100
    return x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), targets


def theirs(x, head, targets, softcap=0.0):
    logits = x @ head.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return F.cross_entropy(logits, targets, reduction="sum")


def with_gradients(loss, x, head, upstream=1.0):
    dx, dhead = torch.autograd.grad(loss * upstream, (x, head))
    return loss.detach(), dx, dhead


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_equals_pytorch(softcap, rows_at_once):
    x, head, targets = inputs()
    expected = with_gradients(theirs(x, head, targets, softcap), x, head, 0.37)
    found = with_gradients(next_token_loss(x, head, targets, softcap=softcap), x, head, 0.37)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        assert (next_token_loss(x, head, targets, softcap=softcap) - expected[0]).abs() < 1e-12


@given(st.integers(0, 9), st.integers(1, 5), st.sampled_from([0.0, 0.5, 30.0]), st.floats(0.01, 50))
@settings(max_examples=60, deadline=None)
def test_any_size(n, rows, softcap, scale):
    x, head, targets = inputs(n=n, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        slice_by(patch, rows)
        found = with_gradients(next_token_loss(x, head, targets, softcap=softcap), x, head)
    for a, b in zip(found, with_gradients(theirs(x, head, targets, softcap), x, head), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_numpy(rows_at_once):
    """Token by token, as the equation says."""
    x, head, targets = inputs()
    total = 0.0
    for vector, target in zip(x.detach().numpy(), targets.tolist(), strict=True):
        if target != -100:
            logits = head.detach().numpy() @ vector
            total -= np.log(np.exp(logits[target]) / np.exp(logits).sum())
    assert abs(next_token_loss(x, head, targets).item() - total) < 1e-10


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradcheck(softcap, rows_at_once):
    x, head, targets = inputs()
    assert torch.autograd.gradcheck(lambda x, head: next_token_loss(x, head, targets, softcap=softcap), (x, head))


def test_nothing_counts(rows_at_once):
    x, head, targets = inputs()
    loss, dx, dhead = with_gradients(next_token_loss(x, head, torch.full_like(targets, -100)), x, head)
    assert loss == 0 and not dx.any() and not dhead.any()


def test_no_tokens():
    x, head, targets = inputs(n=0)
    loss, dx, dhead = with_gradients(next_token_loss(x, head, targets), x, head)
    assert loss == 0 and dx.shape == (0, DIM) and not dhead.any()
    with torch.no_grad():
        assert next_token_loss(x, head, targets) == 0


def test_one_input_may_be_fixed():
    x, head, targets = inputs()
    expected = with_gradients(theirs(x, head, targets), x, head)
    torch.testing.assert_close(torch.autograd.grad(next_token_loss(x, head.detach(), targets), x)[0], expected[1])
    torch.testing.assert_close(torch.autograd.grad(next_token_loss(x.detach(), head, targets), head)[0], expected[2])


def test_extreme_logits_stay_finite():
    x, head, targets = inputs(torch.float32, scale=300.0)
    exact = theirs(*(array.detach().double() for array in (x, head)), targets)
    loss, dx, dhead = with_gradients(next_token_loss(x, head, targets), x, head)
    assert abs(loss / exact - 1) < 1e-5 and dx.isfinite().all() and dhead.isfinite().all()


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_autocast(softcap, rows_at_once):
    """Products in bfloat16, the loss in float32, gradients in the dtype of what they belong to."""
    x, head, targets = inputs(torch.float32)
    expected = with_gradients(theirs(x, head, targets, softcap), x, head)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(x, head, targets, softcap=softcap)
    found = with_gradients(loss, x, head)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() / b.norm() < 0.02
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(next_token_loss(x, head, targets, softcap=softcap), loss.detach())


def test_never_all_logits_at_once(monkeypatch):
    """What is kept for the backward pass are the two gradients, not the logits."""
    slice_by(monkeypatch, 2)
    kept = []
    x, head, targets = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        next_token_loss(x, head, targets).backward()
    assert sum(kept) <= N * DIM + VOCAB * DIM


# What a model reads and what it is to say


def test_next_token_leaves_the_batch_as_it_is():
    inputs, targets = torch.randint(9, (2, 3, 5))
    found = OBJECTIVES["next"]()(inputs, targets, 9, (0,))
    assert found[0] is inputs and found[1] is targets


@pytest.mark.parametrize(("rate", "keep", "random"), [(0.3, 0.1, 0.1), (0.15, 0.5, 0.0), (1.0, 0.0, 0.0), (0.5, 0.2, 0.8)])
def test_masking(rate, keep, random):
    """Shares of hidden, kept, replaced and masked tokens; the rest is as it was and does not count."""
    objective, size, text = MaskedTokens(rate=rate, keep=keep, random=random), 1000, torch.randint(1000, (200, 500))
    shown, targets = objective(text, text, size, (1, 2))
    hidden = targets != -100
    assert torch.equal(targets[hidden], text[hidden]) and torch.equal(shown[~hidden], text[~hidden])
    masked, kept = shown[hidden] == size, shown[hidden] == text[hidden]
    shares = [x.double().mean().item() for x in (hidden, kept, masked)]
    assert shares == pytest.approx([rate, keep + random / size, 1 - keep - random], abs=0.01)
    assert shown.max() <= size


def test_masking_follows_its_seed():
    text = torch.arange(60).view(3, 20)
    draw = lambda *seed: MaskedTokens()(text, text, 60, seed)[0]  # noqa: E731
    assert torch.equal(draw(0, 1), draw(0, 1)) and not torch.equal(draw(0, 1), draw(1, 0))


def test_a_mask_of_the_vocabulary():
    text = torch.arange(200, 260).view(3, 20)
    added, own = (MaskedTokens(rate=0.5, mask=mask)(text, text, 300, (0,))[0] for mask in (None, 103))
    assert (added == 300).any() and torch.equal(own, added.where(added != 300, 103))


def test_room_for_the_mask():
    assert [MaskedTokens(mask=103).vocabulary(size) for size in (60, 30522)] == [104, 30522]
    assert [MaskedTokens().vocabulary(size) for size in (1, 63, 64, 30522)] == [64, 64, 128, 30528]  # the last as MosaicBERT


@pytest.mark.parametrize("options", [dict(rate=0), dict(rate=1.5), dict(keep=-0.1), dict(keep=0.6, random=0.6), dict(mask=-1)])
def test_bad_shares(options):
    with pytest.raises(ValueError, match="^(rate|keep|mask): "):
        MaskedTokens(**options)


@torch.no_grad()
def test_an_encoder_sees_both_sides():
    """What a token's logits depend on: everything, unless it stands in another document; a decoder's on the past alone."""
    tokens, documents = torch.arange(8)[None], torch.tensor([[0] * 4 + [1] * 4])
    fields = dict(vocab_size=64, dim=16, heads=2, depth=1, stem="", mixer="gqa", position="rope")
    for objective, packed, seen in (
        ("next", {}, range(3, 8)), ("masked", {}, range(8)), ("masked", dict(documents=documents), range(4)),
    ):  # fmt: skip
        model = LanguageModel(Config.of(**fields, objective=objective))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        changed = (model(tokens, **packed) - model(tokens.index_fill(1, torch.tensor([3]), 60), **packed)).abs().amax(-1)[0]
        assert (changed > 1e-4).nonzero()[:, 0].tolist() == list(seen)
    with pytest.raises(ValueError, match="^state: an encoder"):
        model(tokens, state=model.init_state(1, 8))
