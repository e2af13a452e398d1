"""A dense model becomes a mixture of copies of its ffns: the same function, or a smaller one, and shard by shard the same."""

from functools import partial

import pytest
import torch

import train
from models import build_model
from models.checkpoint import model_tensors
from models.extract_domain import extract
from models.upcycle import dense_ffns, main, upcycle, upcycled
from models.weights import load_model, save_model
from nn.moe import MoE
from tests.models.drawn import drawn, tokens

trained = partial(drawn, depth=4)

FFNS = [
    "swiglu", "swiglu:width=5", "geglu", "geglu:approximate=true", "sglu", "glu", "glu:activation=relu", "mlp",
    "mlp:activation=relu2", "mlp:activation=gelu_tanh:width=7", "swiglu,mlp",
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("ffn", FFNS)
def test_at_step_zero_a_mixture_of_equals_is_the_dense_model(ffn):
    """Where the weights have the sum 1; a softmax over all experts keeps less than that, and the logits move."""
    model = trained(ffn=ffn)
    dense = model(tokens())
    made = upcycle(model, router_std=0.25)
    assert sum(isinstance(module, MoE) for module in made.modules()) == 4
    torch.testing.assert_close(made(tokens()), dense, rtol=0, atol=1e-13)
    assert (upcycle(model, over="all", router_std=0.25)(tokens()) - dense).abs().max() > 1e-2
    torch.testing.assert_close(upcycle(model, over="all", experts=3, top_k=3)(tokens()), dense, rtol=0, atol=1e-13)


@torch.no_grad()
def test_experts_of_domains_inherit_the_dense_model():
    """Chosen by a table, that of a new model of this spec; in every domain, and cut out, what the dense model computes."""
    model = trained()
    dense = model(tokens())
    made = upcycle(model, experts=6, top_k=1, layers="3-4", options="router=hash/domains=3/seed=2")
    assert [spec.partition(":")[0] for spec in made.specs[1::2]] == ["swiglu", "swiglu", "moe", "moe"]
    for number in (5, 7):
        fresh = build_model(made.config).stack[number].layer.router.table
        assert torch.equal(made.stack[number].layer.router.table, fresh) and fresh.shape == (3, 40, 1)
    for domain in range(3):
        torch.testing.assert_close(made(tokens(), domains=torch.full((3, 1), domain)), dense, rtol=0, atol=1e-13)
        torch.testing.assert_close(extract(made, domain=domain)(tokens()), dense, rtol=0, atol=1e-13)


@torch.no_grad()
def test_a_softmax_over_all_multiplies_each_layer_by_what_it_keeps():
    model = trained(dim=64, norm="rmsnorm:gain=false", depth=1)
    made = upcycle(model, over="all", router_std=64**-0.5)  # logits of variance 1
    context, x = made.context(tokens(), None, None), torch.randn(3, 20, 64, dtype=torch.float64)
    x = made.stack[1].norm(x)
    layer = made.stack[1].layer
    y, kept = layer(x, context), layer.routing.weights.sum(-1).view(3, 20, 1)
    torch.testing.assert_close(y, kept * model.stack[1].layer(x, context), rtol=0, atol=1e-12)
    assert kept.max() < 1 and 0.5 < kept.mean() < 0.63  # of 8 normal logits the softmax gives 0.563 to the first two
    assert 0.26 < upcycle(model, over="all").stack[1].layer.router(x.flatten(0, 1), context).weights.sum(-1).mean() < 0.35


def test_shards_laid_side_by_side_are_the_whole():
    model = trained(ffn="swiglu:width=6,mlp:width=5")
    tensors, prefixes = model_tensors(model), [place.prefix for place in dense_ffns(model)]
    options = dict(noise=0.5, router_std=0.1, seed=3)
    whole = upcycled(tensors, prefixes, 8, **options)
    shards = [upcycled(tensors, prefixes, 8, first=a, last=b, **options) for a, b in ((0, 3), (3, 4), (4, 8))]
    assert all(shard.keys() == whole.keys() for shard in shards)
    for name, tensor in whole.items():
        parts = [shard[name] for shard in shards]
        if ".experts." in name:
            assert [len(part) for part in parts] == [3, 1, 4]
            assert torch.equal(torch.cat(parts), tensor)
            assert len({expert.flatten()[0].item() for expert in tensor}) == 8  # each has noise of its own
        else:
            assert all(torch.equal(part, tensor) for part in parts)
            assert ".router." in name or torch.equal(tensor, tensors[name]) and tensor is not tensors[name]
    made = upcycle(model, noise=0.5, router_std=0.1, seed=3).state_dict()
    assert all(torch.equal(made[name], tensor) for name, tensor in whole.items())
    again = upcycled(tensors, prefixes, 8, **options | dict(seed=4))
    changed = {name for name in whole if not torch.equal(whole[name], again[name])}
    assert changed == {name for name in whole if ".experts." in name or ".router." in name}


def test_what_is_drawn_has_the_size_it_is_asked_for():
    model = trained(dim=64, ffn="swiglu:width=128", depth=2)
    quiet, noisy = upcycle(model), upcycle(model, noise=0.1)
    gates = [made.stack[number].layer.router.gate.weight for made in (quiet, noisy) for number in (1, 3)]
    assert all(abs(gate.std() / 0.02 - 1) < 0.15 and abs(gate.mean()) < 0.004 for gate in gates)
    assert not torch.equal(gates[0], gates[1]) and torch.equal(gates[0], gates[2])
    drawn = []
    for number in (1, 3):
        for name in ("gate", "up", "down"):
            dense, experts, perturbed = (
                getattr(layer, name).weight.detach()
                for layer in (model.stack[number].layer, quiet.stack[number].layer.experts, noisy.stack[number].layer.experts)
            )
            assert torch.equal(experts, dense.expand_as(experts))
            moved = (perturbed - dense).flatten(1)
            drawn.append(moved[0] / dense.std())
            assert (moved.std(-1) / dense.std() / 0.1 - 1).abs().max() < 0.05
            assert moved.corrcoef().fill_diagonal_(0).abs().max() < 0.06
    assert torch.stack(drawn).corrcoef().fill_diagonal_(0).abs().max() < 0.06  # others for each matrix


CASES = {  # options of the model, those of the call: the specs of the sublayers
    "last": (dict(), dict(layers="last"), ["gqa", "swiglu:width=24"] * 3 + ["gqa", "moe:experts=8:top_k=2:width=24"]),
    "every other": (
        dict(ffn="mlp:width=9"),
        dict(every=2, experts=4, over="all", options="balance=0.02:capacity=2"),
        ["gqa", "mlp:width=9", "gqa", "moe:experts=4:top_k=2:width=9:activation=gelu:gated=false:router=topk/over=all"
         ":balance=0.02:capacity=2"] * 2,
    ),
    "some have none": (
        dict(ffn="none,glu:width=8", mixer="gqa,none"), dict(top_k=1),
        ["gqa", "moe:experts=8:top_k=1:width=8:activation=sigmoid"] * 2,
    ),
    "spelled out": (
        dict(stack="gqa+swiglu:width=8 mlp:width=9 mqa glu:width=7 gqa geglu:width=6 moe:experts=2"),
        dict(layers="1,3", experts=2),
        ["gqa+moe:experts=2:top_k=2:width=8", "moe:experts=2:top_k=2:width=9:activation=gelu:gated=false", "mqa",
         "glu:width=7", "gqa", "moe:experts=2:top_k=2:width=6:activation=gelu", "moe:experts=2"],
    ),
    "of a range, every other": (
        dict(stem="ngram", depth=5), dict(layers="2-last", every=2),
        ["ngram", "gqa", "swiglu:width=24", "gqa", "swiglu:width=24", "gqa", "moe:experts=8:top_k=2:width=24", "gqa",
         "swiglu:width=24", "gqa", "moe:experts=8:top_k=2:width=24"],
    ),
    "in the stem": (
        dict(stem="mlp:width=3", depth=0), dict(), ["moe:experts=8:top_k=2:width=3:activation=gelu:gated=false"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_which_layers_change(case):
    options, given, specs = CASES[case]
    model = trained(**options).train()
    made = upcycle(model, **given)
    assert made.specs == specs and made.training and not upcycle(model.eval(), **given).training
    assert build_model(made.config).specs == specs and bool(made.config.stack) == bool(model.config.stack)
    if given.get("over") != "all":
        torch.testing.assert_close(made.eval()(tokens()), model(tokens()), rtol=0, atol=1e-12)
    made.embedding.weight.data.zero_()
    assert model.embedding.weight.any()  # copies


def test_the_router_alone_tells_the_copies_apart():
    """Where it gives all experts the same weight for all tokens, their gradients are equal and they stay one expert."""
    model = trained(depth=1)
    for top_k, apart in ((2, True), (8, False)):
        made = upcycle(model, top_k=top_k, router_std=0.3 if apart else 0.0, options="balance=0:z=0")
        made(tokens(), tokens()).backward()
        gradients = made.stack[1].layer.experts.up.weight.grad
        spread = (gradients - gradients[0]).abs().max() / gradients.abs().max()
        assert (spread > 0.1) == apart and (spread < 1e-12) != apart


@pytest.mark.parametrize(
    ("options", "given", "part"),
    [
        (dict(ffn="none"), dict(), "layers: none has a dense ffn"),
        (dict(ffn="moe:experts=2"), dict(), "layers: none has a dense ffn"),
        (dict(stack="gqa mlp mqa moe"), dict(layers="2"), "layers: layer 2 has no dense ffn; 1 have"),
        (dict(ffn="swiglu,none"), dict(layers="1,2"), "layers: layer 2 has no dense ffn; 1, 3 have"),
        (dict(), dict(layers="5"), "layers: '5' is none of 1 to 4"),
        (dict(ffn="swiglu:bias=true"), dict(), "layers: the ffn of layer 1 has biases"),
        (dict(ffn="swiglu,mlp:activation=star_relu"), dict(), "layers: the ffn of layer 2 has star_relu"),
        (dict(), dict(every=5), "every: there is no 5th of 4 layers"),
        (dict(), dict(every=0), "every: 0 is too small"),
        (dict(), dict(experts=0), "experts: 0 is too small"),
        (dict(), dict(experts=2, top_k=3), "top_k: 3 of 2 experts"),
        (dict(), dict(top_k=0), "top_k: 0 is too small"),
        (dict(), dict(over="some"), "over='some' is not one of chosen, all"),
        (dict(), dict(noise=-1.0), "noise: -1.0 is too small"),
        (dict(), dict(router_std=-1.0), "router_std: -1.0 is too small"),
        (dict(), dict(options="blance=1"), "has no option 'blance'"),
    ],
)  # fmt: skip
def test_mistakes(options, given, part):
    with pytest.raises(ValueError, match=part):
        upcycle(trained(**options), **given)


def test_mistakes_of_shards():
    tensors = model_tensors(trained())
    for first, last in ((-1, 2), (2, 2), (0, 9)):
        with pytest.raises(ValueError, match=f"first: experts {first} to {last - 1} are none of 8"):
            upcycled(tensors, ["stack.1.layer."], 8, first=first, last=last)


def test_as_a_command(tmp_path, capsys):
    model, folder = trained(vocab_size=8, seq_len=9, depth=2).float(), tmp_path / "dense"
    folder.mkdir()
    save_model(model, folder)
    call = [str(folder), "--experts", "4", "--top-k", "2", "--every", "2", "--noise", "0.1", "--seed", "3"]
    assert main([*call, "--options", "balance=0.02", "--out", str(tmp_path / "mixture")]) == 0
    out = capsys.readouterr().out
    assert "swiglu:width=24 -> moe:experts=4:top_k=2:width=24:balance=0.02\n" in out and " parameters -> " in out
    made = load_model(tmp_path / "mixture")
    wanted = upcycle(model, experts=4, every=2, noise=0.1, seed=3).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in made.state_dict().items())
    run = ["--weights", str(tmp_path / "mixture"), "--data", "task:induction:length=8:symbols=4", "--steps", "2"]
    run += ["--eval-every", "0", "--dtype", "float32", "--device", "cpu", "--batch-size", "64", "--out", str(tmp_path / "run")]
    assert train.main(run) == 0
    capsys.readouterr()
    assert main([*call, "--layers", "3", "--out", str(tmp_path / "again")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("upcycle: layers: '3' is none of 1 to 2") and not (tmp_path / "again").exists()
