"""What probes say of models whose insides are known."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import Config, LanguageModel
from models.probe import attention_maps, layer_effects, layers_of, loss_by_position, sinks_of

FIELDS = dict(vocab_size=13, dim=16, heads=2, stem="", norm="rmsnorm", position="none", tie=False)


def model(**given) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel(Config.of(**FIELDS | given)).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def tokens(batch: int = 3, length: int = 7) -> torch.Tensor:
    return torch.randint(13, (batch, length), generator=torch.Generator().manual_seed(1))


def test_loss_by_position():
    made, inputs, targets = model(depth=1), tokens(), tokens().flip(0).clone()
    targets[0, 2:] = -100
    targets[:, 5] = -100
    found = loss_by_position(made, [(inputs[:1], targets[:1], None), (inputs[1:], targets[1:], None)])
    log_p = made(inputs).log_softmax(-1)
    for t in range(7):
        said = [-log_p[b, t, targets[b, t]].item() for b in range(3) if targets[b, t] >= 0]
        assert math.isnan(found[t]) if not said else found[t].item() == pytest.approx(sum(said) / len(said), rel=1e-5)


def test_layers_are_mixers_with_what_follows_them():
    made = model(stack="gqa mlp mlp (gqa+mlp)*2 mlp")
    assert [len(layer) for layer in layers_of(made)] == [2, 1, 1, 2]


def test_a_layer_that_does_nothing():
    made = model(depth=3)
    for sublayer in layers_of(made)[1]:
        for name in ("out", "down"):
            if hasattr(sublayer.layer, name):
                torch.nn.init.zeros_(getattr(sublayer.layer, name).weight)
    first, idle, last = layer_effects(made, tokens(), tokens())
    assert idle["skipped"] == 0 and idle["angle"] < 1e-3 and idle["variance"] == first["variance"]
    assert abs(last["skipped"]) > 1e-3 and last["angle"] > 0.01


def test_what_is_lost_without_a_layer():
    """The stream without layer 2 of 2 is that after layer 1; the angle and the variance are those of the streams."""
    made, inputs, targets = model(depth=2), tokens(), tokens().flip(0)
    streams = []
    for sublayer in (made.stack[0], made.stack[2], made.final_norm):
        sublayer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    whole = made(inputs, targets).item()
    start, middle, end = streams
    logits = made.head(F.rms_norm(middle, (16,), made.final_norm.weight, 1e-6))
    without = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
    found = layer_effects(made, inputs, targets)
    assert found[1]["skipped"] == pytest.approx((without - whole) / targets.numel(), rel=1e-5)
    cosine = (start * middle).sum(-1) / (start.norm(dim=-1) * middle.norm(dim=-1))
    assert found[0]["angle"] == pytest.approx(cosine.arccos().mean().item() / math.pi, rel=1e-4)
    assert found[1]["variance"] == pytest.approx(end.var().item(), rel=1e-4)
    assert made(inputs, targets).item() == whole  # nothing is left behind


@pytest.mark.parametrize("spec", ["gqa", "mqa", "gqa:window=3", "gqa:sinks=true:softcap=2", "gqa:qk_norm=head:gate=true"])
@torch.no_grad()
def test_attention_maps(spec):
    """Weights that give the layer's output back from its values, zero where it may not look; with sinks less than 1 in all."""
    made = model(depth=2, mixer=spec)
    maps = attention_maps(made, tokens())
    assert len(maps) == 2 and all(m.shape == (3, 2, 7, 7) for m in maps)
    gone = torch.ones(7, 7).triu(1).bool() | (torch.ones(7, 7).tril(-3).bool() & ("window" in spec))
    for weights in maps:
        assert (weights >= 0).all() and not weights[:, :, gone].any()
        total = weights.sum(-1)
        assert (total < 1 - 1e-3).all() if "sinks" in spec else torch.allclose(total, torch.ones_like(total), atol=1e-5)
    layer, x = made.stack[0].layer, made.stack[0].norm(made.embedding(tokens()))
    values = layer.heads_of(layer.value(x)).transpose(1, 2).repeat_interleave(layer.heads // layer.kv_heads, 1)
    read = (maps[0].double() @ values).transpose(1, 2).flatten(2)
    read = read if layer.gate is None else read * layer.gate(x).sigmoid()
    torch.testing.assert_close(layer.out(read), layer(x, made.context(tokens(), None, None)), atol=1e-5, rtol=1e-5)
    assert torch.equal(attention_maps(made, tokens())[0], maps[0]) and "attend" not in vars(layer)


def test_sinks():
    """A key is one if those who see it give it more than alpha / T on average, and more of them the smaller alpha."""
    weights = torch.full((1, 1, 20, 20), 0.01).tril()
    weights[..., 3][weights[..., 3] > 0] = 0.6
    assert sinks_of(weights)[0, 0].nonzero()[:, 0].tolist() == [3]
    counts = [sinks_of(weights, alpha).sum().item() for alpha in (0.1, 5, 13)]
    assert counts == [20, 1, 0]
