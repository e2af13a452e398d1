"""Mixtures of experts: layer and routers against their equations, what keeps experts in use, bounds on their load."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models import Config, build_model
from models.auxiliary import after_step
from models.checkpoint import load_weights, model_tensors
from models.language_model import LanguageModel
from models.stack import FFNS
from nn.context import Context
from nn.moe import ROUTERS, MoE
from nn.moe.capacity import METRICS, drop, reroute, room
from nn.moe.losses import SCOPES, Balance, balance, shares_of, z_loss
from nn.moe.routing import counts_of
from nn.moe.sinkhorn import sinkhorn
from nn.spec import build

DIM, VOCAB, E = 12, 30, 6
SPELLINGS = {  # every router, and what else it can be told
    "topk": ["topk", "topk/over=all", "topk/bias=true", "topk/jitter=0.1"],
    "switch": ["switch"],
    "noisy": ["noisy", "noisy/load=0.1/importance=0.1"],
    "bias": ["bias", "bias/groups=2", "bias/groups=3/top_groups=2/score=softmax/scaling=2.5", "bias/renormalise=false"],
    "hash": ["hash", "hash/seed=3"],
    "sinkhorn": ["sinkhorn"],
    "rl": ["rl"],
    "recurrent": ["recurrent/hidden=5"],
    "expert_choice": ["expert_choice"],
}
ALL = [spelling for spellings in SPELLINGS.values() for spelling in spellings]
CAUSAL = [spelling for spelling in ALL if spelling != "expert_choice"]
each = pytest.mark.parametrize("router", CAUSAL)


def make(router: str = "topk", dtype: torch.dtype = torch.float64, **options) -> MoE:
    torch.manual_seed(0)
    words = "".join(f":{key}={str(value).lower()}" for key, value in (dict(experts=E, width=10) | options).items())
    moe = build(f"moe:router={router}{words}", FFNS, "ffn", DIM, vocab_size=VOCAB)
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe.to(dtype)


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def context(x: torch.Tensor, **more) -> Context:
    tokens = torch.randint(VOCAB, x.shape[:2], generator=torch.Generator().manual_seed(2))
    return Context(tokens, torch.arange(x.shape[1]), **more)


def silu(x):
    return x / (1 + np.exp(-x))


def ffn(x: np.ndarray, experts, e: int) -> np.ndarray:
    gate, up, down = (part.weight[e].detach().numpy() for part in (experts.gate, experts.up, experts.down))
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def test_every_router_is_spelled_here():
    assert SPELLINGS.keys() == ROUTERS.keys()


@pytest.mark.parametrize("router", ALL)
@pytest.mark.parametrize("options", [{}, dict(shared=2, shared_gate=True, scaling=1.5)])
def test_formula(router, options):
    """Each token is the weighted sum of what its experts say, worked out one by one; shared experts speak to all."""
    moe, x = make(router, **options).eval(), numbers(2, 5, DIM)
    y = moe(x, context(x, causal=router != "expert_choice")).detach().numpy()
    flat, routing = x.flatten(0, 1).numpy(), moe.routing
    expected = np.zeros_like(flat)
    for n, (chosen, weights) in enumerate(zip(routing.experts.tolist(), routing.weights.tolist(), strict=True)):
        assert len({e for e in chosen if e < E}) == sum(e < E for e in chosen)
        for e, weight in zip(chosen, weights, strict=True):
            expected[n] += moe.scaling * weight * ffn(flat[n], moe.experts, e) if e < E else 0
        if options:
            gate = 1 / (1 + np.exp(-flat[n] @ moe.shared_gate.weight[0].detach().numpy()))
            expected[n] += gate * ffn(flat[n], moe.shared, 0)
    np.testing.assert_allclose(y.reshape(-1, DIM), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("activation", ["gelu", "relu2", "relu", "gelu_tanh", "silu"])
def test_plain_experts_are_mlps(activation):
    moe, x = make(gated=False, activation=activation, top_k=1), numbers(1, 7, DIM)
    mlp = build(f"mlp:width=10:activation={activation}", FFNS, "ffn", DIM).double()
    for n, token in enumerate(moe(x, context(x))[0]):
        e = moe.routing.experts[n, 0]
        mlp.up.weight.data, mlp.down.weight.data = moe.experts.up.weight[e], moe.experts.down.weight[e]
        torch.testing.assert_close(token, mlp(x[0, n], None), rtol=1e-10, atol=1e-12)


@each
def test_tokens_do_not_meet(router):
    moe, x = make(router).eval(), numbers(2, 5, DIM)
    full = context(x)
    y = moe(x, full)
    one = Context(full.tokens[1:, 3:4], full.positions[3:4])
    torch.testing.assert_close(moe(x[1:, 3:4], one), y[1:, 3:4])
    assert moe(x[:, :0], Context(full.tokens[:, :0], full.positions[:0])).shape == (2, 0, DIM)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(10)), st.sampled_from([r for r in CAUSAL if not r.startswith(("noisy", "rl"))]), st.booleans())
def test_permuting_tokens_permutes_outputs(order, router, learns):
    moe, x = make(router.replace("/jitter=0.1", "")).train(learns), numbers(1, 10, DIM)
    before = context(x)
    after = Context(before.tokens[:, list(order)], before.positions)
    torch.testing.assert_close(moe(x[:, list(order)], after), moe(x, before)[:, list(order)], rtol=1e-9, atol=1e-11)


@each
def test_gradients(router):
    moe, x = make(router).eval(), numbers(2, 3, DIM).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: moe(x, context(x)), (x,))
    moe.train()
    x = numbers(4, 40, DIM).requires_grad_()
    here = context(x)
    moe.router(x.flatten(0, 1), here)  # what the layer before has left, where routers remember
    loss = (moe(x, here) * numbers(4, 40, DIM)).sum()
    if router == "rl":
        loss = loss + moe.router.policy_loss(numbers(160))
    (loss if moe.auxiliary is None else loss + moe.auxiliary).backward()
    for name, parameter in moe.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_kept_and_routing_is_as_exact_as_the_input(router, dtype):
    x, moe = numbers(2, 40, DIM), make(router, dtype).eval()
    y = moe(x.to(dtype), context(x))
    same = make(router, dtype).double().eval()
    exact = same(x.to(dtype).double(), context(x))
    assert y.dtype == dtype and moe.routing.weights.dtype == torch.float32
    assert torch.equal(moe.routing.experts, same.routing.experts)
    assert (y - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 0.02)


@each
def test_autocast_leaves_the_router_in_float32(router):
    moe, x = make(router, torch.float32).eval(), numbers(2, 40, DIM).float().requires_grad_()
    exact = moe(x, context(x))
    chosen = moe.routing
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x, context(x))
    assert torch.equal(moe.routing.experts, chosen.experts) and torch.equal(moe.routing.weights, chosen.weights)
    assert y.dtype == torch.float32 and (y - exact).norm() / exact.norm() < 0.02


# Routers


def test_topk_over_the_chosen_and_over_all():
    """The second, renormalised, is the first: so equal experts are one expert under the first alone."""
    x = numbers(50, DIM)
    moe, other = make("topk", top_k=3), make("topk/over=all", top_k=3)
    first, second = (m.router(x, None) for m in (moe, other))
    logits = x @ moe.router.gate.weight.T
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert torch.equal(first.experts, logits.argsort(descending=True)[:, :3])
    torch.testing.assert_close(second.weights, p.gather(1, second.experts))
    torch.testing.assert_close(first.weights, second.weights / second.weights.sum(-1, keepdim=True))
    for m in (moe, other):
        for part in (m.experts.gate, m.experts.up, m.experts.down):
            part.weight.data[:] = part.weight.data[:1].clone()
    alone = torch.from_numpy(ffn(x.numpy(), moe.experts, 0))
    torch.testing.assert_close(moe(x[None], context(x[None]))[0], alone, rtol=1e-9, atol=1e-11)
    mass = second.weights.sum(-1, keepdim=True)
    torch.testing.assert_close(other(x[None], context(x[None]))[0], mass * alone, rtol=1e-9, atol=1e-11)
    assert mass.mean() < 0.98


def test_switch_is_one_choice_over_all():
    x = numbers(20, DIM)
    switch, one = make("switch").router(x, None), make("topk/over=all", top_k=1).router(x, None)
    assert torch.equal(switch.experts, one.experts) and torch.equal(switch.weights, one.weights)


def test_jitter_and_noise_are_of_training_only():
    x = numbers(200, DIM)
    for name in ("topk/jitter=0.3", "noisy"):
        router = make(name).router
        plain = make("topk").router.eval()(x, None).experts if name.startswith("topk") else router.eval()(x, None).experts
        assert (router.train()(x, None).experts != plain).any()
        with torch.no_grad():
            assert torch.equal(router(x, None).experts, plain)
        assert torch.equal(router.eval()(x, None).experts, plain)


def test_noisy_chances_are_those_of_drawing_again():
    torch.manual_seed(0)
    router = make("noisy", top_k=2).router
    clean, size = torch.randn(3, E, dtype=torch.float64), torch.rand(3, E, dtype=torch.float64) + 0.2
    noisy = clean + size * torch.randn(3, E, dtype=torch.float64)
    said = router.chances(clean, noisy, size)
    draws = 40000
    for e in range(E):
        again = noisy.repeat(draws, 1, 1)
        again[:, :, e] = clean[:, e] + size[:, e] * torch.randn(draws, 3, dtype=torch.float64)
        among = (again.topk(2, -1).indices == e).any(-1).double().mean(0)
        assert (among - said[:, e]).abs().max() < 5 * 0.5 / math.sqrt(draws)


def test_noisy_losses_are_zero_where_all_is_even():
    moe = make("noisy/load=1/importance=1", balance=0, z=0)
    even = torch.eye(E, dtype=torch.float64).repeat(4, 1)
    with torch.no_grad():
        moe.router.gate.weight.zero_(), moe.router.noise.weight.fill_(-50)
        moe.router.gate.weight[:, :E] = 100 * torch.eye(E)
    x = F.pad(even + even.roll(1, 1), (0, DIM - E))
    moe.router(x, None)
    assert moe.router.own_loss < 1e-4
    moe.router(x[:1].repeat(24, 1), None)
    assert moe.router.own_loss.item() == pytest.approx(2 * (E / 2 - 1), rel=1e-3)  # two of E experts have it all


def test_hash_tables_are_permutations():
    """Each expert owns as many ids as any other, up to one; layers and seeds have tables of their own; nothing is learned."""
    tables = []
    for seed, layer in ((0, 1), (0, 2), (1, 1)):
        moe = build(f"moe:router=hash/seed={seed}:top_k=2:experts={E}:width=4", FFNS, "ffn", DIM, vocab_size=31, layer=layer)
        table = moe.router.table[0]
        assert all(int(c) in (31 // E, 31 // E + 1) for column in table.T for c in counts_of(column.long(), E))
        assert (table[:, 0] != table[:, 1]).all() and not list(moe.router.parameters())
        tables.append(table)
    assert not torch.equal(tables[0], tables[1]) and not torch.equal(tables[0], tables[2])


def test_domains_have_experts_of_their_own():
    """A token goes to its domain's group only, so that the group can be cut out with its logits as they were."""
    moe, x = make("hash/domains=2"), numbers(2, 5, DIM)
    domains = torch.tensor([[0], [1]])
    y = moe(x, context(x, domains=domains))
    chosen = moe.routing.experts.view(2, 5)
    assert (chosen[0] < 3).all() and (chosen[1] >= 3).all()
    alone = make("hash", experts=3)
    for ours, part in zip((alone.experts.gate, alone.experts.up, alone.experts.down),
                          (moe.experts.gate, moe.experts.up, moe.experts.down), strict=True):  # fmt: skip
        ours.weight.data = part.weight.data[3:]
    alone.router.table = moe.router.table[1:] - 3
    whole = context(x)
    assert torch.equal(alone(x[1:], Context(whole.tokens[1:], whole.positions)), y[1:])
    with pytest.raises(ValueError, match="^domains: the router has 2, but the tokens were given none"):
        moe(x, context(x))


def test_a_model_hands_domains_on():
    config = Config.of(stem="", mixer="gqa", ffn="moe:experts=4:width=8:router=hash/domains=2", depth=1, dim=DIM, heads=2,
                       vocab_size=VOCAB, seq_len=8)  # fmt: skip
    model, tokens = build_model(config), torch.randint(VOCAB, (2, 8))
    model(tokens, domains=torch.tensor([[1], [0]]))
    assert (model.stack[1].layer.routing.experts.view(2, 8)[0] >= 2).all()


def test_bias_chooses_but_never_weighs():
    router, x = make("bias").router, numbers(30, DIM)
    s = torch.sigmoid(x @ router.gate.weight.T)
    with torch.no_grad():
        router.bias[4] = 10.0
    routing = router(x, None)
    assert (routing.experts[:, 0] == 4).all()
    kept = s.gather(1, routing.experts)
    torch.testing.assert_close(routing.weights, kept / kept.sum(-1, keepdim=True))


def test_groups_limit_the_choice_to_the_best_pairs():
    router, x = make("bias/groups=3/top_groups=1").router, numbers(40, DIM)
    s = torch.sigmoid(x @ router.gate.weight.T).view(40, 3, 2)
    best = s.sum(-1).argmax(-1)
    assert torch.equal(router(x, None).experts // 2, best[:, None].expand(40, 2))


def test_bias_moves_by_the_loads_of_a_step():
    router, x = make("bias/rate=0.25").router, numbers(40, DIM)
    counts = counts_of(router(x[:20], None).experts, E) + counts_of(router(x[20:], None).experts, E)
    with torch.no_grad():
        router(x, None)  # not a step of training: not counted
    after_step(router)
    torch.testing.assert_close(router.bias, 0.25 * torch.sign(80 / E - counts.double()))
    moved = router.bias.clone()
    after_step(router)
    assert torch.equal(router.bias, moved) and moved.abs().max() == 0.25


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.floats(0.0, 3.0), st.integers(0, 1000))
def test_sinkhorn_has_both_marginals(N, experts, scale, seed):
    logits = scale * torch.randn(N, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plan = sinkhorn(logits, 5000, 1e-7).exp()
    torch.testing.assert_close(plan.sum(1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(0), torch.full((experts,), N / experts, dtype=torch.float64), rtol=1e-6, atol=0)
    turned = plan.log() - logits  # a plan of the form r_n exp(logits) c_e
    torch.testing.assert_close(turned - turned[:1] - turned[:, :1] + turned[:1, :1], torch.zeros_like(plan), rtol=0, atol=1e-8)


def test_sinkhorn_balances_training_and_not_inference():
    moe, x = make("sinkhorn"), 3 * numbers(1, 600, DIM) + numbers(DIM)
    moe(x, context(x))
    assert counts_of(moe.routing.experts, E).max() < 2 * 600 / E
    moe.eval()(x, context(x))
    logits = x[0] @ moe.router.gate.weight.T
    assert torch.equal(moe.routing.experts[:, 0], logits.argmax(-1))
    assert counts_of(moe.routing.experts, E).max() > 2 * 600 / E


def test_the_policy_gradient_is_unbiased():
    """The mean of its gradient over all draws of two tokens and two experts is that of the expected cost."""
    router = build("rl:policy=1:entropy=0", ROUTERS, "router", DIM, experts=2).double()
    nn.init.normal_(router.gate.weight)
    x, costs = numbers(2, DIM), torch.tensor([[1.0, 5.0], [-2.0, 0.5]], dtype=torch.float64)  # of token n with expert e
    mean = torch.zeros_like(router.gate.weight)
    for draw in itertools.product((0, 1), repeat=2):
        log_probs = (x @ router.gate.weight.T).log_softmax(-1)
        drawn = torch.tensor(draw)[:, None]
        router.taken = log_probs, drawn
        (gradient,) = torch.autograd.grad(router.policy_loss(costs.gather(1, drawn)[:, 0]), router.gate.weight)
        mean += log_probs.gather(1, drawn).sum().exp().detach() * gradient
    expected = ((x @ router.gate.weight.T).softmax(-1) * costs).sum(-1).mean()
    torch.testing.assert_close(mean, torch.autograd.grad(expected, router.gate.weight)[0])


def test_a_policy_learns_from_the_costs_of_the_model():
    """Where only one of two experts is of use, the policy comes to choose it."""
    torch.manual_seed(0)
    config = Config.of(stem="", mixer="none", ffn="moe:experts=2:width=32:router=rl/policy=1/entropy=0", depth=1, dim=16,
                       heads=2, vocab_size=8, seq_len=64)  # fmt: skip
    model = build_model(config)
    moe = model.stack[0].layer
    nn.init.normal_(model.head.weight)
    optimizer = torch.optim.Adam(moe.parameters(), lr=0.02)  # nothing else can learn the map
    for _ in range(150):
        tokens = torch.randint(8, (4, 64))
        with torch.no_grad():
            moe.experts.down.weight[1] = 0
        model(tokens, (tokens * 3 + 1) % 8).div(256).backward()
        optimizer.step(), optimizer.zero_grad()
    model.eval()(tokens)
    assert moe.routing.experts.float().mean() < 0.2


def test_the_recurrent_router_is_a_gated_recurrent_unit_over_the_depth():
    router, (u, h) = make("recurrent/hidden=5").router, (numbers(7, 5), numbers(7, 5) / 2)
    cell = nn.GRUCell(5, 5).double()
    for ours, kind in ((router.from_input, "ih"), (router.from_memory, "hh")):
        getattr(cell, f"weight_{kind}").data, getattr(cell, f"bias_{kind}").data = ours.weight.data, ours.bias.data
    torch.testing.assert_close(router.step(u, h), cell(u, h))
    torch.testing.assert_close(router.step(u, None), cell(u))


def test_layers_share_the_memory_of_their_routers():
    """One GRU for all, in the model, its optimizer and its checkpoints; what layer 1 saw reaches layer 2."""
    config = Config.of(stem="", mixer="none", ffn="moe:experts=4:width=8:router=recurrent/hidden=6", depth=2, dim=DIM, heads=2,
                       vocab_size=VOCAB, seq_len=8)  # fmt: skip
    model, tokens = build_model(config), torch.randint(VOCAB, (2, 8))
    first, second = (sublayer.layer.router for sublayer in model.stack)
    assert first.from_memory is second.from_memory and first.gate is not second.gate
    names = [name for name in model_tensors(model) if "from_" in name]
    assert len(names) == 4 and all(name.startswith("stack.0.") for name in names)
    with torch.device("meta"):
        again = LanguageModel(config)
    load_weights(again, {name: tensor.clone() for name, tensor in model_tensors(model).items()}, "here")
    assert again.stack[0].layer.router.from_memory.weight is again.stack[1].layer.router.from_memory.weight
    assert torch.equal(again(tokens), model(tokens))
    model(tokens)
    logits = second(numbers(16, DIM).float(), Context(tokens, torch.arange(8))).logits
    model.zero_grad()
    ctx = Context(tokens, torch.arange(8))
    first(numbers(16, DIM).float(), ctx)
    remembered = second(numbers(16, DIM).float(), ctx).logits
    assert (remembered - logits).abs().max() > 1e-4
    remembered.sum().backward()
    assert first.project.weight.grad.abs().max() > 0


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.sampled_from([0.3, 1.0, 2.0, 6.0]), st.integers(0, 99))
def test_experts_that_choose_have_equal_loads(N, capacity, seed):
    router = build(f"expert_choice:capacity={capacity}", ROUTERS, "router", DIM, experts=E).double()
    x = torch.randn(N, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    routing = router(x, Context(torch.zeros(1, N, dtype=torch.int64), torch.arange(N), causal=False))
    taken = min(N, math.ceil(capacity * N / E))
    assert counts_of(routing.experts, E).tolist() == [taken] * E
    scores = (x @ router.gate.weight.T).softmax(-1)
    for e in range(E):
        chosen = (routing.experts == e).nonzero()
        assert set(chosen[:, 0].tolist()) == set(scores[:, e].topk(taken).indices.tolist())
        torch.testing.assert_close(routing.weights[chosen[:, 0], chosen[:, 1]], scores[chosen[:, 0], e])


def test_experts_that_choose_are_for_encoders():
    moe, x = make("expert_choice"), numbers(1, 5, DIM)
    with pytest.raises(ValueError, match="^causal: experts that choose look at all tokens"):
        moe(x, context(x))


# Losses


def test_the_balance_loss_is_1_where_all_is_even_and_E_where_one_has_all():
    even = torch.full((9, E), 1 / E)
    assert balance(even[0], even) == pytest.approx(1)
    one = torch.eye(E)[0]
    assert balance(one, one.expand(9, E)) == pytest.approx(E)
    skewed = numbers(9, E).float().softmax(-1)
    assert balance(even[0], skewed) == pytest.approx(1) and balance(skewed[0], even) == pytest.approx(1)
    assert z_loss(torch.zeros(4, E)) == pytest.approx(math.log(E) ** 2)
    assert shares_of(torch.zeros(3, E)).tolist() == torch.full((3, E), 1 / E).tolist()


def test_scopes_differ_by_covariances():
    """mean_j L_micro - L_global = E sum_i Cov_j(f_i^j, p_i^j) (Qiu et al. 2025); `sequence` is `micro` of one row each."""
    experts = torch.randint(E, (4, 10, 2), generator=torch.Generator().manual_seed(0))  # 4 parts of 10 tokens
    scores = (2 * numbers(4, 10, E)).softmax(-1)
    f = shares_of(torch.stack([counts_of(part, E) for part in experts])).double()
    p = scores.mean(1)
    micro = torch.stack([Balance("micro", E)(*pair, 1) for pair in zip(experts, scores, strict=True)]).mean()
    whole = Balance("micro", E)(experts.flatten(0, 1), scores.flatten(0, 1), 4)
    covariances = ((f - f.mean(0)) * (p - p.mean(0))).mean(0).sum()
    torch.testing.assert_close(micro - whole, E * covariances)
    torch.testing.assert_close(Balance("sequence", E)(experts.flatten(0, 1), scores.flatten(0, 1), 4), micro)
    assert covariances.abs() > 1e-4


def test_a_buffer_counts_the_parts_of_a_step():
    experts = torch.randint(E, (3, 10, 2), generator=torch.Generator().manual_seed(0))
    scores = (2 * numbers(3, 10, E)).softmax(-1)
    buffer = Balance("buffer", E)
    for _ in range(2):
        found = [buffer(*pair, 1) for pair in zip(experts, scores, strict=True)]
        for j in range(3):
            shares = shares_of(counts_of(experts[: j + 1], E)).double()
            torch.testing.assert_close(found[j], balance(shares, scores[j]))
        buffer.after_step()


def test_losses_are_in_the_gradient_of_a_model_and_not_in_its_loss():
    """In nats a token: with coefficient c the gradient is that of sum of -log p + targets * c * balance."""
    tokens = torch.randint(VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    targets = tokens.masked_fill(torch.arange(8) < 3, -100)
    found = {}
    for c, z in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.25)):
        ffn = f"moe:experts=4:width=8:balance={c}:z={z}"
        config = Config.of(stem="", mixer="none", ffn=ffn, depth=2, dim=DIM, heads=2, vocab_size=VOCAB, seq_len=8)
        model = build_model(config).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(parameter.numel()))
        loss = model(tokens, targets)
        own = torch.autograd.grad(loss, list(model.parameters()))
        assert all(sublayer.layer.auxiliary is None for sublayer in model.stack)  # no pass counts twice
        hidden = model.hidden(tokens)
        parts = [sublayer.layer.auxiliary for sublayer in model.stack]
        extra = 0 if c == z == 0 else 15 * sum(parts)
        added = torch.autograd.grad(extra, list(model.parameters()), allow_unused=True) if c or z else [None] * len(own)
        found[c, z] = loss.item(), [g - (0 if a is None else a) for g, a in zip(own, added, strict=True)], parts
        assert hidden.requires_grad
    plain = found.pop((0.0, 0.0))
    assert plain[2] == [None, None]
    for value, gradients, parts in found.values():
        assert value == pytest.approx(plain[0], rel=1e-12) and all(part > 0.1 for part in parts)
        for g, p in zip(gradients, plain[1], strict=True):
            torch.testing.assert_close(g, p, rtol=1e-8, atol=1e-9)
    with torch.no_grad():
        model(tokens, targets)
    assert all(sublayer.layer.auxiliary is None for sublayer in model.stack)


# Capacity


def routings(data):
    N, experts = data.draw(st.integers(1, 25)), data.draw(st.integers(2, 7))
    K = data.draw(st.integers(1, min(3, experts)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randn(N, experts, generator=generator, dtype=torch.float64) * data.draw(st.sampled_from([0.0, 0.3, 3.0]))
    scores = ((scores * 4).round() / 4).softmax(-1)  # with ties
    weights, chosen = scores.topk(K)
    return scores, chosen, weights


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dropping_keeps_to_the_bound_and_fills_it(data):
    scores, chosen, weights = routings(data)
    many, metric = scores.shape[1], data.draw(st.sampled_from(METRICS))
    capacity = room(data.draw(st.sampled_from([0.5, 1.0, 1.5, math.inf])), chosen.numel(), many)
    left = drop(chosen, weights, many, capacity, metric)
    loads, wanted = counts_of(left, many), counts_of(chosen, many)
    assert loads.tolist() == wanted.clamp(max=capacity).tolist()
    assert ((left == chosen) | (left == many)).all()
    flat, served = weights.flatten(), left.flatten() < many
    for e in range(many):
        mine = (chosen.flatten() == e).nonzero()[:, 0]
        kept, lost = mine[served[mine]], mine[~served[mine]]
        if len(kept) and len(lost):
            slots = lambda i: (i % chosen.shape[1], i // chosen.shape[1])  # noqa: E731
            if metric == "score":
                assert flat[kept].min() >= flat[lost].max()
            if metric == "order":
                assert max(map(slots, kept.tolist())) < min(map(slots, lost.tolist()))
            if metric == "reverse":
                assert min(map(slots, kept.tolist())) > max(map(slots, lost.tolist()))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rerouting_keeps_to_the_bound_and_serves_more(data):
    scores, chosen, weights = routings(data)
    (N, K), many = chosen.shape, scores.shape[1]
    capacity = room(data.draw(st.sampled_from([0.5, 1.0, 1.5])), chosen.numel(), many)
    extra = data.draw(st.sampled_from([None, 0, 1]))
    dropped = drop(chosen, weights, many, capacity)
    placed, given_weights = reroute(chosen, weights, scores, capacity, extra=extra)
    assert counts_of(placed, many).max() <= capacity
    assert torch.equal(placed[dropped < many], dropped[dropped < many])
    moved = (placed < many) & (dropped == many)
    assert not moved.any() or extra != 0
    for n in range(N):
        mine = [e for e in placed[n].tolist() if e < many]
        assert len(mine) == len(set(mine))
        for k in range(K):
            if moved[n, k]:
                assert placed[n, k] not in chosen[n]
                torch.testing.assert_close(given_weights[n, k], scores[n, placed[n, k]])  # weights here are the scores
    if extra is None:  # who has no place finds no room at an expert it has not chosen
        full = counts_of(placed, many) == capacity
        for n, k in (placed == many).nonzero().tolist():
            free = [e for e in range(many) if not full[e] and e not in chosen[n] and e not in placed[n]]
            assert not free, (n, k, free)


def test_who_is_rerouted_asks_its_best_expert_which_takes_the_highest_score():
    scores = torch.tensor([[0.9, 0.01, 0.0], [0.8, 0.1, 0.0], [0.7, 0.3, 0.0], [0.6, 0.2, 0.15]])
    chosen = torch.zeros(4, 1, dtype=torch.int64)  # all want expert 0, which has room for one; then all want expert 1
    placed, weights = reroute(chosen, scores[:, :1], scores, capacity=1, extra=1)
    assert placed[:, 0].tolist() == [0, 3, 1, 3] and torch.equal(weights[2], scores[2, 1:2])
    placed, weights = reroute(chosen, scores[:, :1], scores, capacity=1)
    assert placed[:, 0].tolist() == [0, 3, 1, 2] and torch.equal(weights[3], scores[3, 2:])


def test_bounds_are_those_of_training_and_of_inference():
    x = numbers(1, 60, DIM)
    moe = make(capacity=1.0, eval_capacity=1.25, overflow="reroute")
    moe(x, context(x))
    assert counts_of(moe.routing.experts, E).max() == 20 and (moe.routing.experts == E).any()
    moe.eval()(x, context(x))
    assert counts_of(moe.routing.experts, E).max() <= 25 and (moe.routing.experts == E).sum() == 0
    full = make().eval()
    full(x, context(x))
    assert counts_of(full.routing.experts, E).max() > 25


# Compressed experts


def test_all_main_is_the_mixture_and_vectors_of_ones_are_its_best():
    x = numbers(2, 9, DIM)
    moe, whole, best = make(top_k=4), make(top_k=4, main=4), make(top_k=4, main=2)
    for other in (whole, best):
        other.load_state_dict(moe.state_dict() | dict(vectors=torch.ones(E, DIM, dtype=torch.float64)))
    torch.testing.assert_close(whole(x, context(x)), moe(x, context(x)), rtol=1e-12, atol=1e-12)
    fewer = make(top_k=2)
    fewer.load_state_dict(moe.state_dict())
    torch.testing.assert_close(best(x, context(x)), fewer(x, context(x)), rtol=1e-10, atol=1e-12)
    assert best.experts.up.uses == 2 and moe.experts.up.uses == 4


def test_others_modulate_what_the_main_experts_read():
    moe, x = make(top_k=3, main=1), numbers(1, 8, DIM)
    y = moe(x, context(x))[0].detach().numpy()
    e = moe.vectors.detach().numpy()
    for n in range(8):
        (first, *others), (g, *gates) = moe.routing.experts[n].tolist(), moe.routing.weights[n].tolist()
        read = x[0, n].numpy() * (g + sum(weight * e[j] for weight, j in zip(gates, others, strict=True)))
        np.testing.assert_allclose(y[n], ffn(read, moe.experts, first), rtol=1e-9, atol=1e-11)


def test_a_model_remembers_no_history():
    """What a pass leaves behind does not hold its graph: a model can be copied after it."""
    moe, x = make(), numbers(1, 8, DIM)
    moe(x, context(x)).sum().backward()
    moe.auxiliary = None  # which the model takes away
    copy.deepcopy(moe)
    assert not moe.routing.weights.requires_grad


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("moe:experts=0", "^experts: 0 is too small"),
        ("moe:experts=2:top_k=3", "^top_k: 3 of 2 experts"),
        ("moe:top_k=2:router=switch", "^top_k: the router switch makes 1 choices, not 2"),
        ("moe:router=topp", "^router: unknown router 'topp'.*did you mean 'topk'"),
        ("moe:router=topk/over=none", "^router: router 'topk': over='none' is not one of chosen, all"),
        ("moe:gated=false:activation=identity", "^activation: plain experts know silu.*not identity"),
        ("moe:activation=relu2", "^activation: gated experts know silu"),
        ("moe:shared_gate=true", "^shared_gate: there are no shared experts"),
        ("moe:shared_width=9", "^shared_width: there are no shared experts"),
        ("moe:shared=1:shared_width=0", "^shared_width: 0 is too small"),
        ("moe:top_k=2:main=3", "^main: 3 of 2 choices"),
        ("moe:main=0", "^main: 0 is too small"),
        ("moe:width=0", "^width: 0 is too small"),
        ("moe:balance=-1", "^balance: -1"),
        ("moe:router=hash/domains=3", "^domains: 8 experts are not 3 equal groups"),
        ("moe:router=bias/groups=3", "^groups: 8 experts are not 3 equal groups"),
        ("moe:router=bias/groups=4:top_k=3", "^top_groups: 1 of 4 groups of 2 experts; at least 3"),
        ("moe:router=noisy/load=-1", "^load: -1"),
    ],
)
def test_bad_options_are_one_line(spec, message):
    with pytest.raises(ValueError, match=message):
        build(spec, FFNS, "ffn", DIM, vocab_size=VOCAB)


def test_scopes_are_all_spelled():
    for scope in SCOPES:
        assert build(f"moe:scope={scope}", FFNS, "ffn", DIM).balance_loss.scope == scope
