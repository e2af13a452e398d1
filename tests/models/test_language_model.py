"""The whole model: published sizes, initialisation, tied heads, the loss it gives."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import PRESETS, Config, LanguageModel, build_model
from models.convert_norm import convert
from models.describe import parameters
from models.fold_norm import fold
from models.remove_norms import with_fake_norms
from models.stack import MIXERS
from models.weights import load_model, save_model

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-3b": 3_212_749_824,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
}
TINY = dict(vocab_size=31, dim=16, heads=2, depth=2, seq_len=12)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    """Every preset builds and runs, without memory; the published ones have their published number of parameters."""
    config = Config.of(model=preset)
    with torch.device("meta"):
        model = LanguageModel(config)
        assert model(torch.zeros(1, 4, dtype=torch.int64)).shape == (1, 4, config.vocab_size)
    count = sum(p.numel() for p in model.parameters())
    assert count == PUBLISHED.get(preset, count) == sum(parameters(model).values())


def test_every_published_size_is_a_preset():
    assert PUBLISHED.keys() <= PRESETS.keys()


@pytest.mark.parametrize(("preset", "millions"), [("llama-1m", 1), ("llama-10m", 10), ("llama-125m", 125)])
def test_the_names_of_small_llamas(preset, millions):
    with torch.device("meta"):
        model = LanguageModel(Config.of(model=preset))
    assert 0.75 < sum(p.numel() for p in model.parameters()) / (millions * 1e6) < 1.35


def test_tied_head_shares_memory(tmp_path):
    tied, untied = (build_model(Config.of(**TINY, tie=tie)) for tie in (True, False))
    assert tied.head.weight is tied.embedding.weight and untied.head.weight is not untied.embedding.weight
    assert sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters()) == 31 * 16
    save_model(tied, tmp_path)
    again = load_model(tmp_path)
    assert again.head.weight is again.embedding.weight
    with torch.no_grad():
        again.embedding.weight.zero_()
    assert not again.head.weight.any()


@pytest.mark.parametrize("init", ["fan_in", "gpt2"])
@pytest.mark.parametrize("model", ["small", "gpt2", "llama-1m"])
def test_same_seed_same_weights(model, init):
    one, two, other = (build_model(Config.of(model=model, init=init, **TINY), seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    torch.manual_seed(99)  # nor does it depend on the generator of the program
    assert all(
        torch.equal(one[name], tensor)
        for name, tensor in build_model(Config.of(model=model, init=init, **TINY), seed=1).state_dict().items()
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_seed_decides_every_weight_of_every_mixer(mixer):
    config = Config.of(mixer=mixer, position="none", ffn="mlp", **TINY)
    states = []
    for program in (1, 2):
        torch.manual_seed(program)
        states.append(build_model(config, seed=7).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_gpt2_initialisation():
    """Standard deviation 0.02, residual outputs divided by the root of their number, biases zero."""
    model = build_model(Config.of(model="gpt2", depth=3, dim=256, heads=4, vocab_size=999))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            std = 0.02 / math.sqrt(6) if ".out." in name or ".down." in name else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.02 and abs(parameter.mean().item()) < std / 50


def test_fan_in_initialisation():
    """Sublayers begin as the identity and the model as a uniform guess; elsewhere variance 1 / (4 fan-in)."""
    model = build_model(Config.of(depth=3, dim=256, heads=4, vocab_size=999, ffn="swiglu"))
    for name, parameter in model.named_parameters():
        if name.startswith("head") or any(part in name for part in (".out.", ".down.", "table.")):
            assert not parameter.any()
        elif name.startswith("embedding"):
            assert abs(parameter.std().item() - 1) < 0.01
        else:
            std = 0.5 / math.sqrt(parameter.shape[1])
            assert abs(parameter.std().item() / std - 1) < 0.02 and parameter.abs().max() <= std * math.sqrt(3) + 1e-6
    tokens = torch.randint(999, (2, 8), generator=torch.Generator().manual_seed(0))
    assert abs(model(tokens, tokens).item() - tokens.numel() * math.log(999)) < 1e-2


@pytest.mark.parametrize("preset", ["small", "gpt2", "llama-1m"])
def test_a_new_model_guesses(preset):
    """The loss before training is that of a uniform guess, or close above it."""
    config = Config.of(model=preset, depth=2, dim=64, heads=4, vocab_size=256, seq_len=32)
    tokens = torch.randint(256, (8, 33), generator=torch.Generator().manual_seed(0))
    loss = build_model(config)(tokens[:, :-1], tokens[:, 1:]).item() / (8 * 32)
    assert abs(loss - math.log(256)) < 0.15


HEADS = ["linear", "linear:decoder_bias=true", "transform", "transform:bias=false:activation=relu:decoder_bias=false"]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("norm_place", ["pre", "post"])
@pytest.mark.parametrize("head", HEADS)
def test_loss_is_the_cross_entropy_of_the_logits(softcap, norm_place, head):
    model = LanguageModel(Config.of(**TINY, softcap=softcap, norm_place=norm_place, head=head, tie=True)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(0))
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    logits = model(tokens)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    found = model(tokens, targets)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    ours = torch.autograd.grad(found, list(model.parameters()), allow_unused=True)
    theirs = torch.autograd.grad(expected, list(model.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert not softcap or logits.abs().max() < softcap


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm:eps=0.01"])
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_heads_against_the_equation(head, norm, activation):
    """E norm(f(W x + b)) + c, or E x + c, of what the last norm gives."""
    head = head.replace("relu", activation) + ("" if "linear" in head or "activation" in head else f":activation={activation}")
    model = LanguageModel(Config.of(**TINY, head=head, norm=norm, tie=True)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    inner, part, seen = model.transform, dict(model.named_parameters()), []
    model.final_norm.register_forward_hook(lambda module, args, y: seen.append(y))
    logits = model(torch.arange(12)[None])
    y = seen[0]
    if head.startswith("transform"):
        y = y @ part["transform.dense.weight"].T + part.get("transform.dense.bias", 0)
        y = F.gelu(y) if activation == "gelu" else F.relu(y)
        mean = y.mean(-1, keepdim=True) if norm == "layernorm" else 0
        y = (y - mean) / ((y - mean).square().mean(-1, keepdim=True) + inner.norm.eps).sqrt()
        y = y * part["transform.norm.weight"] + part.get("transform.norm.bias", 0)
    expected = y @ part["embedding.weight"].T + part.get("head.bias", 0)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    assert ("head.bias" in part) == ("decoder_bias=true" in head or head.startswith("transform") and "decoder" not in head)
    assert ("transform.dense.bias" in part) == (head.startswith("transform") and ":bias=false" not in head)


@pytest.mark.parametrize("embedding_norm", ["none", "extra", "first"])
@pytest.mark.parametrize("position", ["learned", "rope"])
def test_embedding_norms(embedding_norm, position):
    """The stack begins with the normalised sum of embeddings and positions; `first`: its first sublayer takes it as it is."""
    options = TINY | dict(norm="layernorm", stem="", mixer="gqa", position=position, embedding_norm=embedding_norm)
    model = LanguageModel(Config.of(**options, embedding_scale=3.0)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    begins, reads = [], []
    model.stack[0].register_forward_pre_hook(lambda module, args: begins.append(args[0]))
    model.stack[0].layer.register_forward_pre_hook(lambda module, args: reads.append(args[0]))
    tokens = torch.arange(12)[None]
    model(tokens)
    expected = 3 * model.embedding.weight[tokens]
    expected = expected + (model.position.table.weight[:12] if position == "learned" else 0)
    normed = lambda x, norm: F.layer_norm(x, (16,), norm.weight, norm.bias, norm.eps)  # noqa: E731
    expected = expected if embedding_norm == "none" else normed(expected, model.embedding_norm)
    torch.testing.assert_close(begins[0], expected, rtol=0, atol=1e-12)
    own = list(model.stack[0].norm.parameters())
    assert bool(own) == (embedding_norm != "first") and all(list(s.norm.parameters()) for s in model.stack[1:])
    torch.testing.assert_close(reads[0], normed(expected, model.stack[0].norm) if own else expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(embedding_norm="first", norm_place="post"), "embedding_norm: 'first' leaves away a norm .*; 'post' has none"),
        (dict(embedding_norm="first", norm_place="sandwich"), "embedding_norm: 'first'"),
        (dict(head="transfrom"), r"unknown head 'transfrom' \(did you mean 'transform'\?\); there are: linear, transform"),
        (dict(head="linear:bias=true"), r"head 'linear' has no option 'bias'"),
        (dict(head="transform:activation=tanh"), "'tanh' is not one of gelu, "),
        (dict(mixer="gqa:theta=100", position="alibi"), "theta: a rotary base needs the position encoding rope, not ALiBi"),
    ],
)
def test_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(Config.of(**TINY | options))


@pytest.mark.parametrize("change", [lambda m: convert(m, "rmsnorm"), lambda m: convert(m, "crmsnorm"), with_fake_norms, fold])
@pytest.mark.parametrize("options", [dict(embedding_norm="extra"), dict(embedding_norm="first"), dict(head="transform")])
def test_conversions_refuse_norms_beside_the_stack(change, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^{name}: {value!r} has a norm of its own, which no conversion here knows$"):
        change(LanguageModel(Config.of(**TINY, model="gpt2", **options)))


def test_conversions_keep_the_bias_of_a_head():
    model = build_model(Config.of(**TINY, model="gpt2", head="linear:decoder_bias=true")).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    tokens = torch.arange(12)[None]
    for made in (convert(model, "rmsnorm"), convert(model, "crmsnorm")):
        torch.testing.assert_close(made(tokens), model(tokens), rtol=0, atol=1e-9)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("init", ["fan_in", "gpt2", "deepnorm"])
def test_bert_learns_from_scratch(tie, init):
    """The flags of BERT train: the bias of the words begins at 0, the loss falls, and every parameter has a gradient."""
    options = dict(norm_place="post", norm="layernorm", embedding_norm="extra", head="transform", objective="masked")
    model = build_model(Config.of(**TINY, model="gpt2", **options, tie=tie, init=init))
    assert not model.head.bias.any() and not model.causal
    tokens = torch.randint(30, (8, 12), generator=torch.Generator().manual_seed(0))
    hidden = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    shown, targets = tokens.masked_fill(hidden, 30), tokens.masked_fill(~hidden, -100)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = model(shown, targets) / hidden.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in model.parameters()) and model.head.bias.grad.any()
    assert abs(losses[0] - math.log(31)) < 1 and losses[-1] < losses[0] - 1


@pytest.mark.parametrize("position", ["learned", "rope", "alibi"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("parts", [{}, dict(head="transform", embedding_norm="extra"), dict(embedding_norm="first")])
def test_weights_come_back(position, tie, parts, tmp_path):
    model = build_model(Config.of(**TINY, position=position, tie=tie, init="gpt2", **parts), seed=3)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in model.named_parameters()]
    tokens = torch.arange(12)[None]
    assert torch.equal(again(tokens), model(tokens))
