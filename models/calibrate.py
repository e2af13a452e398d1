"""Attention calibration: what goes to sinks is turned to the other tokens, in a trained model, without training.

Yu et al. 2024, "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without Training through
Attention Calibration" (arXiv:2406.15765). It looks at whole matrices of attention, T x T numbers a head, which the fused
kernel never makes: for studies and for texts of moderate length.
"""

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from models.language_model import LanguageModel
from models.probe import attending, attention_layers, sinks_of, weights_of
from nn.context import Context

# B batch, H heads, T queries, S keys


def calibrate(weights: Tensor, *, alpha: float = 5.0, beta: float = 0.4) -> Tensor:
    """Attention (B, H, T, S) with each sink's share times beta, and what is taken from it given to the keys that are none.

    A sink is a key beyond the first that gets more than alpha / T on average; the others share the gain in proportion to
    what they have. The first key is left alone: it neither gives nor takes. Rows keep their sums.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta: a share between 0 and 1, not {beta}")
    if not alpha > 0:
        raise ValueError(f"alpha: more than 0, not {alpha}")
    sinks = sinks_of(weights, alpha)[:, :, None].clone()  # (B, H, 1, S)
    sinks[..., 0] = False
    others = ~sinks
    others[..., 0] = False
    taken = (weights * sinks).sum(-1, keepdim=True) * (1 - beta)
    had = (weights * others).sum(-1, keepdim=True)
    able = had > 0  # a row whose keys are all sinks keeps what it has
    gain = torch.where(able, 1 + taken / had.where(able, 1), 1)
    return weights * torch.where(sinks & able, beta, torch.where(others, gain, 1))


@contextmanager
def calibrated(model: LanguageModel, heads: Iterable[tuple[int, int]], *, alpha: float = 5.0, beta: float = 0.4):
    """Within it these heads, (layer of attention, head) both counted from 0, attend as `calibrate` says."""
    layers, chosen = attention_layers(model), {}
    for layer, head in heads:
        if not (0 <= layer < len(layers) and 0 <= head < layers[layer].heads):
            raise ValueError(f"heads: there is no head {head} in layer {layer} of {len(layers)}")
        chosen.setdefault(layers[layer], []).append(head)

    def change(layer: nn.Module, attend: Callable) -> Callable:
        picked = chosen[layer]

        def call(q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
            weights = calibrate(weights_of(attend, q, k, v, context)[:, picked], alpha=alpha, beta=beta)
            y = attend(q, k, v, context).clone()
            y[:, picked] = weights.to(v.dtype) @ v.repeat_interleave(layer.heads // v.shape[1], 1)[:, picked]
            return y

        return call

    with attending(list(chosen), change):
        yield


def heads_to_calibrate(
    model: LanguageModel, score: Callable[[], float], *, alpha: float = 5.0, beta: float = 0.4
) -> list[tuple[int, int]]:
    """The heads, one at a time, with which `score` (higher is better, on a small held-out set) rises when calibrated."""
    plain, found = score(), []
    for layer, mixer in enumerate(attention_layers(model)):
        for head in range(mixer.heads):
            with calibrated(model, [(layer, head)], alpha=alpha, beta=beta):
                if score() > plain:
                    found.append((layer, head))
    return found
