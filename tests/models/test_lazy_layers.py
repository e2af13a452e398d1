"""Lazy layers: their ratio, and the hybrid that comes of it."""

import pytest
import torch

from models import Config, LanguageModel
from models.lazy_layers import converted, lazy_ratios, make_lazy
from models.probe import attention_maps

FIELDS = dict(vocab_size=11, dim=16, heads=2, depth=4, stem="", mixer="gqa", position="rope", tie=True)


def model() -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(Config.of(**FIELDS)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return made


def tokens(length: int) -> torch.Tensor:
    return torch.randint(11, (2, length), generator=torch.Generator().manual_seed(1))


def test_ratios():
    """The explicit sum over keys; all of it where the first and the recent are everything."""
    made, text = model(), tokens(40)
    found = lazy_ratios(made, text, first=2, recent=5, queries=7)
    for ratio, weights in zip(found, attention_maps(made, text), strict=True):
        shares = [
            sum(weights[b, h, i, j].item() for j in range(40) if j < 2 or 0 <= i - j < 5)
            for b in range(2) for h in range(2) for i in range(33, 40)
        ]  # fmt: skip
        assert 0 < ratio < 1 and ratio == pytest.approx(sum(shares) / len(shares), rel=1e-4)
    assert lazy_ratios(made, text, first=4, recent=36) == pytest.approx([1.0] * 4)


@torch.no_grad()
def test_the_hybrid():
    """The laziest half has a window; within it nothing changes bit for bit, beyond it something does; the cache is smaller."""
    made = model()
    config = make_lazy(made.config, [0.2, 0.9, 0.5, 0.7], 0.5, first=2, recent=6)
    hybrid = converted(made, config)
    assert [s.layer.window for s in hybrid.stack[0::2]] == [None, 6, None, 6]
    torch.testing.assert_close(hybrid(tokens(8)), made(tokens(8)), rtol=0, atol=1e-12)
    assert (hybrid(tokens(20)) - made(tokens(20))).abs().max() > 1e-3
    sizes = [m.init_state(1, 100).bytes() for m in (made, hybrid)]
    assert sizes[1] == sizes[0] // 2 + 2 * 2 * 16 * 7 * 8  # two layers of 2 + 6 - 1 tokens
    state, text = hybrid.init_state(2, 20), tokens(20)
    parts = [hybrid(part, state=state) for part in text.split([9, 1, 1, 9], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), hybrid(text), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("config", "ratios", "share", "part"),
    [
        (dict(), [1.0] * 3, 0.5, "ratios: one a layer"), (dict(), [1.0] * 4, 1.5, "share: "),
        (dict(mixer="mha"), [1.0] * 4, 0.5, "ratios: "), (dict(mixer="gqa:window=3"), [1.0] * 4, 0.5, "already"),
    ],
)  # fmt: skip
def test_mistakes(config, ratios, share, part):
    with pytest.raises(ValueError, match=part):
        make_lazy(Config.of(**FIELDS | config), ratios, share)
