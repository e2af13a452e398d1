"""Lazy layers: those that look at the first and the latest tokens only need no more than these in their cache.

Zhang et al. 2024, "LightTransfer: Your Long-Context LLM is Secretly a Hybrid Model with Effortless Adaptation"
(arXiv:2410.13846). The layers with the largest lazy ratio attend to sinks and a window from then on; the others stay as
they are: a hybrid, without training.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.config import Config
from models.language_model import LanguageModel
from models.probe import attention_maps


@torch.inference_mode()
def lazy_ratios(model: LanguageModel, tokens: Tensor, *, first: int = 4, recent: int = 1020, queries: int = 64) -> list[float]:
    """For each layer the share of attention that its last queries give to the first and the most recent keys.

    tokens (B, T). The mean over texts, heads and the last `queries` queries (how many is our choice: the paper says the
    last ones of the prompt). 1 where T <= first + recent.
    """
    ratios = []
    for weights in attention_maps(model, tokens):
        T = weights.shape[-1]
        i, j = torch.arange(T, device=weights.device)[:, None], torch.arange(T, device=weights.device)
        near = (j < first) | (i - j < recent)
        late = slice(max(0, T - queries), T)
        ratios.append(((weights * near)[:, :, late].sum(-1) / weights[:, :, late].sum(-1)).mean().item())
    return ratios


def make_lazy(config: Config, ratios: list[float], share: float, *, first: int = 4, recent: int = 1020) -> Config:
    """The configuration in which the `share` of layers with the largest ratios have sinks and a window; weights fit both.

    ValueError where the mixers are not one a layer, or cannot have a window.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: between 0 and 1, not {share}")
    mixers = config.mixer.split(",")
    mixers = [mixers[i % len(mixers)] for i in range(config.depth)]
    if config.stack or len(ratios) != config.depth or any(m.partition(":")[0] != "gqa" for m in mixers):
        raise ValueError("ratios: one a layer, of a model whose layers are all gqa")
    lazy = sorted(range(config.depth), key=lambda i: -ratios[i])[: round(share * config.depth)]
    for i in lazy:
        if "window=" in mixers[i]:
            raise ValueError(f"ratios: layer {i + 1} has a window already")
        mixers[i] += f":window={recent}:global_tokens={first}"
    return replace(config, mixer=",".join(mixers))


def converted(model: LanguageModel, config: Config) -> LanguageModel:
    """A model of this configuration with the weights of `model`, which are the same tensors."""
    with torch.device("meta"):
        hybrid = LanguageModel(config)
    hybrid.load_state_dict(model.state_dict(), assign=True)
    if config.tie:
        hybrid.head.weight = hybrid.embedding.weight
    return hybrid.train(model.training)
