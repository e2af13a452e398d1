"""A dense ffn is the sum of its experts; which neuron goes where; what is left when only some are asked."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models import LanguageModel
from models.split_ffn import balanced_kmeans, main, neuron_importance, split
from models.upcycle import dense_ffns
from models.weights import load_model, save_model
from tests.models.drawn import drawn, tokens


def all_on(made: LanguageModel, experts: int) -> LanguageModel:
    """The same experts, all of them asked by every token: `hash` weighs E choices 1 / E each, which E times makes 1."""
    specs = [
        ":".join([part for part in spec.split(":") if part.split("=")[0] not in ("top_k", "router", "scaling")]
                 + [f"top_k={experts}", "router=hash", f"scaling={experts}"]) if spec.startswith("moe") else spec
        for spec in made.specs
    ]  # fmt: skip
    whole = LanguageModel(replace(made.config, stack=" ".join(specs))).double()
    left = whole.load_state_dict(made.state_dict(), strict=False)
    assert all(".router." in name for name in (*left.missing_keys, *left.unexpected_keys))
    return whole


@torch.no_grad()
@pytest.mark.parametrize("method", ["random", "kmeans", "inter"])
@pytest.mark.parametrize("ffn", ["swiglu:width=24", "mlp:activation=relu2:width=24", "geglu:width=24,sglu:width=16"])
def test_all_experts_together_are_the_dense_layer(ffn, method):
    """With two experts beside one that is shared, neurons are in one place each if the two want different ones."""
    model, options = drawn(ffn=ffn), {}
    dense, experts = model(tokens()), 8
    if method == "inter":
        experts, width = 3, {place.prefix: place.width for place in dense_ffns(model)}
        ranks = {prefix: torch.arange(F) // (F // 4) for prefix, F in width.items()}  # 3 wanted by all, 0 … 2 by one each
        wishes = {p: torch.stack([2.0 * (rank == 3) + (rank == e) for e in range(3)]) for p, rank in ranks.items()}
        options = dict(importance=wishes)
    made = split(model, experts=experts, method=method, **options)
    torch.testing.assert_close(all_on(made, experts)(tokens()), dense, rtol=0, atol=1e-12)
    assert (made(tokens()) - dense).abs().max() > 0.05


@torch.no_grad()
def test_the_chosen_add_up_by_hand():
    model = drawn(depth=1)
    made = split(model, experts=4, top_k=2, router_std=0.5, seed=3)
    assert made.specs[1] == ("moe:experts=4:top_k=2:width=6:router=noisy/importance=0.01/load=0.01:balance=0:z=0:scaling=2")
    dense, layer = model.stack[1].layer, made.eval().stack[1].layer
    assert not layer.router.noise.weight.any()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    y = layer(x, made.context(tokens(), None, None))[0]
    parts = np.random.default_rng([3, 1, 0]).permutation(24).reshape(4, 6)
    for row, (number, value) in enumerate(zip(x[0], y, strict=True)):
        logits, chosen = (layer.router.gate.weight @ number).topk(2)
        wanted = 0
        for gate, e in zip(logits.softmax(0), chosen, strict=True):
            up, gates = dense.up.weight[parts[e]] @ number, dense.gate.weight[parts[e]] @ number
            wanted = wanted + 4 / 2 * gate * (dense.down.weight[:, parts[e]] @ (F.silu(gates) * up))
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-12, msg=f"row {row}")


def test_every_neuron_has_one_place():
    model = drawn(ffn="swiglu:width=32")
    for method in ("random", "kmeans"):
        made = split(model, method=method, seed=1)
        places, other = [], split(model, method=method, seed=2)
        for old, new in zip(model.stack[1::2], made.stack[1::2], strict=True):
            ups, downs = new.layer.experts.up.weight.flatten(0, 1), new.layer.experts.down.weight.transpose(1, 2).flatten(0, 1)
            found = (ups[:, None] == old.layer.up.weight).all(-1).nonzero()[:, 1]
            assert found.sort().values.tolist() == list(range(32))
            assert torch.equal(downs, old.layer.down.weight.T[found])
            places.append(found.tolist())
        assert places[0] != places[1]
        assert not torch.equal(other.stack[1].layer.experts.up.weight, made.stack[1].layer.experts.up.weight)


def cost(points: np.ndarray, labels: np.ndarray) -> float:
    return sum(((points[labels == c] - points[labels == c].mean(0)) ** 2).sum() for c in np.unique(labels))


def test_kmeans_finds_equal_groups_that_stand_apart():
    random = np.random.default_rng(0)
    truth = random.permutation(48) % 6
    points = 5 * np.eye(6, 10)[truth] + 0.3 * random.standard_normal((48, 10))
    best = min((balanced_kmeans(points, 6, seed=seed) for seed in range(5)), key=lambda labels: cost(points, labels))
    assert len({(a, b) for a, b in zip(best, truth, strict=True)}) == 6


def test_kmeans_is_as_good_as_trying_all_partitions():
    """Never better than the best of them, nearly always the best after a few starts; and never worse than where it began."""
    found = 0
    for trial in range(20):
        points = np.random.default_rng(trial).standard_normal((10, 2))
        every = (np.isin(np.arange(10), half) for half in combinations(range(10), 5))
        least = min(cost(points, halves.astype(int)) for halves in every)
        costs = []
        for seed in range(4):
            labels = balanced_kmeans(points, 2, seed=seed)
            assert np.bincount(labels).tolist() == [5, 5]
            costs.append(cost(points, labels))
            rounds = [cost(points, balanced_kmeans(points, 2, seed=seed, rounds=n)) for n in range(5)]
            assert all(a >= b - 1e-12 for a, b in zip(rounds, rounds[1:], strict=False))
        assert min(costs) >= least - 1e-12
        found += min(costs) < least + 1e-12
    assert found >= 18
    with pytest.raises(ValueError, match="clusters: 10 points are not 3 equal parts"):
        balanced_kmeans(points, 3)


def test_kmeans_puts_like_neurons_together():
    """By the direction of their rows of W_up, not by its length."""
    model = drawn(depth=1, ffn="swiglu:width=16")
    with torch.no_grad():
        directions, lengths = torch.eye(16, dtype=torch.float64)[:4], 10 ** torch.linspace(-2, 2, 16, dtype=torch.float64)
        kinds = torch.arange(16) % 4
        model.stack[1].layer.up.weight.copy_(directions[kinds] * lengths[:, None])
    made = split(model, experts=4, method="kmeans").stack[1].layer.experts.up.weight
    assert all(len({tuple(row) for row in F.normalize(expert, dim=-1).tolist()}) == 1 for expert in made)


def test_importance_is_the_change_of_the_loss():
    """For one token of one text: by central differences, each neuron a little stronger and weaker."""
    model = drawn(ffn="swiglu:width=6,mlp:width=5")
    inputs, targets = tokens()[:1, :1], tokens()[:1, 1:2]
    got = neuron_importance(model, [[(inputs, targets)], [(inputs, targets), (inputs, targets)]])
    for place in dense_ffns(model):
        importance = got[place.prefix]
        assert importance.shape == (2, place.width) and not importance.requires_grad
        torch.testing.assert_close(importance[1], 2 * importance[0])
        for neuron in range(place.width):
            changed, before = [], place.layer.down.weight.detach().clone()
            for sign in (1, -1):
                with torch.no_grad():
                    place.layer.down.weight.copy_(before)[:, neuron] *= 1 + sign * 1e-5
                    changed.append(model(inputs, targets).item())
            with torch.no_grad():
                place.layer.down.weight.copy_(before)
            assert abs(abs(changed[0] - changed[1]) / 2e-5 - importance[0, neuron].item()) < 1e-7
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    several = neuron_importance(model, [[(tokens()[:, :-1], tokens()[:, 1:])]])["stack.1.layer."][0]
    alone = sum(neuron_importance(model, [[(row[None, :-1], row[None, 1:])]])["stack.1.layer."][0] for row in tokens())
    torch.testing.assert_close(several, alone)  # absolute values are taken before the sum over tokens


def test_experts_with_neurons_in_common():
    model = drawn(depth=1, ffn="swiglu:width=6")
    up = model.stack[1].layer.up.weight
    wishes = torch.tensor([[9.0, 8, 7, 0, 1, 2], [9, 1, 0, 8, 2, 3]])
    made = split(model, experts=2, top_k=1, method="inner", importance={"stack.1.layer.": wishes}).stack[1].layer
    assert torch.equal(made.experts.up.weight, up[torch.tensor([[0, 1, 2], [0, 3, 5]])]) and made.scaling == 2
    wishes = torch.tensor([[3.0, 0, 50, 1, 0, 0], [3, 0, 0, 1, 100, 0.5]])
    made = split(model, experts=2, top_k=1, method="inter", importance={"stack.1.layer.": wishes}).stack[1].layer
    assert torch.equal(made.shared.up.weight, up[torch.tensor([[0, 4]])])  # both want 0; of 2 and 4, once each, the sums decide
    assert torch.equal(made.experts.up.weight, up[torch.tensor([[2, 3], [3, 5]])])
    assert torch.equal(made.shared.down.weight, model.stack[1].layer.down.weight[None, :, [0, 4]])
    made = split(model, experts=1, top_k=1, method="inter", shared=2, importance={"stack.1.layer.": wishes[:1]})
    assert made.specs[1].endswith("shared=2:scaling=1") and made.stack[1].layer.shared.up.weight.shape == (1, 4, 16)


def test_scaling_and_layers():
    model = drawn(depth=4)
    made = split(model, experts=6, top_k=3, scaling=1.5, every=2, options="capacity=2")
    assert [spec.partition(":")[0] for spec in made.specs[1::2]] == ["swiglu", "moe"] * 2
    layer = made.stack[3].layer
    assert (layer.scaling, layer.capacity, layer.router.importance, layer.balance) == (1.5, 2.0, 0.01, 0.0)
    assert split(model, experts=6, top_k=3).stack[1].layer.scaling == 2
    assert split(model, experts=8, top_k=3).stack[1].layer.scaling == 8 / 3
    again = split(model, experts=6, top_k=3, seed=1).stack[1].layer.router.gate.weight
    assert not torch.equal(again, split(model, experts=6, top_k=3).stack[1].layer.router.gate.weight)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (dict(method="graph"), "method: 'graph' is none of random, kmeans, inner, inter"),
        (dict(experts=5), "experts: 24 neurons are not 5 equal parts"),
        (dict(experts=0), "experts: 0 is too small"),
        (dict(top_k=0), "top_k: 0 is too small"),
        (dict(top_k=9), "top_k: 9 of 8 experts"),
        (dict(shared=1), "shared: 1 experts; inter has at least 1"),
        (dict(method="inter", shared=0), "shared: 0 experts; inter has at least 1"),
        (dict(method="inner"), "importance: inner and inter need it"),
        (dict(importance={}), "importance: inner and inter need it, random and kmeans do not; the method is random"),
        (dict(method="inner", experts=4, importance=dict.fromkeys(("stack.1.layer.", "stack.3.layer."), torch.ones(3, 24))),
         r"importance: it is \(3, 24\) for stack.1.layer., not \(4, 24\)"),
        (dict(method="inner", experts=4, importance={}), "importance: there is none for stack.1.layer."),
        (dict(layers="7"), "layers: '7' is none of 1 to 2"),
        (dict(options="blance=1"), "has no option 'blance'"),
    ],
)  # fmt: skip
def test_mistakes(given, part):
    with pytest.raises(ValueError, match=part):
        split(drawn(), **given)


def test_as_a_command(tmp_path, capsys):
    model, folder = drawn().float(), tmp_path / "dense"
    folder.mkdir()
    save_model(model, folder)
    call = [str(folder), "--experts", "4", "--top-k", "1", "--method", "kmeans", "--seed", "3"]
    assert main([*call, "--scaling", "2", "--out", str(tmp_path / "mixture")]) == 0
    assert "swiglu:width=24 -> moe:experts=4:top_k=1:width=6:router=noisy/" in capsys.readouterr().out
    made, wanted = load_model(tmp_path / "mixture"), split(model, experts=4, top_k=1, method="kmeans", seed=3, scaling=2)
    assert made.config == wanted.config
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in made.state_dict().items())
    assert main([*call[:1], "--experts", "5", "--out", str(tmp_path / "again")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("split_ffn: experts: 24 neurons are not 5 equal parts") and not (tmp_path / "again").exists()
