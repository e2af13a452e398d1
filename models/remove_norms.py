"""Take the norms of a model with `norm=fakenorm` away while it is fine-tuned, one after the other.

Baroni, Khara, Schaeffer et al. 2025, "Transformers Don't Need LayerNorm at Inference Time" (arXiv:2507.02559): norms before
ffns first, then those before mixers, the final one last, some steps of training apart. The paper removes the norm of
queries and keys before that of values; here one norm serves all three and goes at once.

    model = with_fake_norms(model)
    while remove_next(model):
        for _ in range(gap):
            with std_penalty(model) as penalty:
                loss = model(tokens, targets) / targets.numel()
            (loss + 0.1 * penalty()).backward()
            …
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from models.language_model import LanguageModel
from models.recast import norms_of
from nn.norm import FakeNorm, LayerNorm


def removal_order(model: LanguageModel) -> list[str]:
    """The names of a model's norms in the order in which they go."""
    ffns, mixers = ([f"stack.{i}.norm" for i, s in enumerate(model.stack) if s.is_mixer == kind] for kind in (False, True))
    return [*ffns, *mixers, "final_norm"]


def with_fake_norms(model: LanguageModel) -> LanguageModel:
    """A copy of a model with `norm=layernorm` whose norms are FakeNorms of the same gains and biases: the same logits."""
    norms = norms_of(model)
    if not all(isinstance(norm, LayerNorm) for norm in norms):
        raise ValueError(f"norm: {model.config.norm!r}, but only a layernorm becomes a fakenorm")
    gain, bias = (str(p is not None).lower() for p in (model.final_norm.weight, model.final_norm.bias))
    config = replace(model.config, norm=f"fakenorm:eps={model.final_norm.eps}:gain={gain}:bias={bias}")
    made = LanguageModel(config).to(model.embedding.weight)
    made.load_state_dict(model.state_dict(), strict=False)  # what is missing are the statistics
    return made.train(model.training)


def remove_next(model: LanguageModel) -> str | None:
    """Freeze the next norm at its mean spread and return its name; None when none is left. ValueError for other norms."""
    if not all(isinstance(norm, FakeNorm) for norm in norms_of(model)):
        raise ValueError(f"norm: {model.config.norm!r}, but only a fakenorm can be removed")
    for name in removal_order(model):
        norm = model.get_submodule(name)
        if not norm.removed:
            norm.remove()
            return name
    return None


@contextmanager
def std_penalty(model: LanguageModel) -> Iterator[Callable[[], Tensor]]:
    """Within it the model's calls are watched: `penalty()` is how unequal the tokens' spread before the final norm was.

    penalty = mean over tokens of (std / mean(std) - 1)^2 in the last call, () with its gradient; 0 when one constant serves
    all tokens. The paper weighs such a term against the loss; that it is relative to the mean is a choice.
    """
    seen: list[Tensor] = []

    def watch(norm, inputs: tuple[Tensor]) -> None:
        seen[:] = [inputs[0].float().std(-1, correction=0)]

    def penalty() -> Tensor:
        if not seen:
            raise ValueError("penalty: the model was not called within std_penalty")
        return (seen[0] / seen[0].mean() - 1).square().mean()

    handle = model.final_norm.register_forward_pre_hook(watch)
    try:
        yield penalty
    finally:
        handle.remove()
