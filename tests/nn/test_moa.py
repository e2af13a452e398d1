"""A mixture of attention heads is the weighted sum of plain attention layers with one set of keys and values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models import Config, LanguageModel, build_model
from models.auxiliary import after_step
from models.describe import active, forward_flops
from models.stack import MIXERS
from nn.attention import GQA
from nn.context import Context
from nn.moe import ROUTERS, MoA
from nn.moe.losses import balance, shares_of, z_loss
from nn.moe.routing import counts_of
from nn.position import POSITIONS
from nn.spec import build

BATCH, TIME, DIM, HEADS, E, VOCAB = 2, 7, 16, 4, 5, 30
POSITION = ["none", "rope", "alibi", "t5:heads=4"]
CHOOSING = [name for name in ROUTERS if name != "expert_choice"]  # routers in which tokens choose


def encoding(position: str) -> nn.Module:
    torch.manual_seed(1)
    return build(position, POSITIONS, "position", dim=DIM, heads=HEADS, seq_len=64).double()


def make(options: str = "", position: nn.Module | None = None) -> MoA:
    torch.manual_seed(0)
    moa = build(f"moa:experts={E}{options}", MIXERS, "mixer", DIM, position=position, vocab_size=VOCAB, heads=HEADS).double()
    for parameter in moa.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moa


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def context(length: int = TIME, **more) -> Context:
    tokens = torch.randint(VOCAB, (BATCH, length), generator=torch.Generator().manual_seed(3))
    return Context(tokens, torch.arange(length), **more)


def expert(moa: MoA, e: int, position: nn.Module | None) -> GQA:
    """The plain attention layer that one expert is."""
    layer = GQA(DIM, position, heads=HEADS, kv_heads=moa.kv_heads, head_dim=moa.head_dim).double()
    layer.query.weight.data, layer.out.weight.data = moa.query.weight.data[e], moa.out.weight.data[e]
    layer.key.weight.data, layer.value.weight.data = moa.key.weight.data, moa.value.weight.data
    return layer


@torch.no_grad()
@pytest.mark.parametrize("position", POSITION)
@pytest.mark.parametrize("options", ["", ":top_k=1", ":top_k=3:kv_heads=2:head_dim=6", ":top_k=4:kv_heads=1"])
@pytest.mark.parametrize("given", [{}, dict(causal=False), dict(documents=torch.tensor([[0, 0, 0, 1, 1, 1, 1], [5] * 7]))])
def test_formula(position, options, given):
    """Each token takes what attention layers of its experts say, by its weights; they see all tokens, whoever these chose."""
    at, x = encoding(position), numbers(BATCH, TIME, DIM)
    moa, where = make(options, at), context(**given)
    y = moa(x, where)
    weights = torch.zeros(BATCH * TIME, E, dtype=torch.float64).scatter(1, moa.routing.experts, moa.routing.weights)
    said = torch.stack([expert(moa, e, at)(x, replace(where, shared={})) for e in range(E)], -1)  # (B, T, C, E)
    torch.testing.assert_close(y, (said @ weights.view(BATCH, TIME, E, 1))[..., 0], rtol=1e-10, atol=1e-10)
    logits = x.flatten(0, 1) @ moa.router.gate.weight.T
    assert torch.equal(moa.routing.experts, logits.topk(moa.top_k, -1).indices)
    torch.testing.assert_close(moa.routing.weights, logits.topk(moa.top_k, -1).values.softmax(-1))


@torch.no_grad()
def test_all_experts_at_once_are_the_dense_softmax_mixture():
    at, x = encoding("rope"), numbers(BATCH, TIME, DIM)
    moa = make(f":top_k={E}", at)
    said = torch.stack([expert(moa, e, at)(x, context()) for e in range(E)], -1)
    shares = (x @ moa.router.gate.weight.T).softmax(-1)  # (B, T, E)
    torch.testing.assert_close(moa(x, context()), (said @ shares[..., None])[..., 0], rtol=1e-10, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("position", POSITION)
@pytest.mark.parametrize("top_k", range(1, E + 1))
def test_equal_experts_are_one_attention_layer(position, top_k):
    at, x = encoding(position), numbers(BATCH, TIME, DIM)
    moa = make(f":top_k={top_k}", at)
    for stack in (moa.query, moa.out):
        stack.weight.copy_(stack.weight[:1].expand_as(stack.weight))
    torch.testing.assert_close(moa(x, context()), expert(moa, 0, at)(x, context()), rtol=1e-10, atol=1e-10)


def test_the_decoding_state_does_not_know_the_experts():
    """As many bytes as one attention layer's, while parameters grow by the expert and FLOPs by the choice."""
    plain = GQA(DIM, heads=HEADS)
    for experts, top_k in ((1, 1), (4, 2), (16, 2), (16, 8)):
        moa = MoA(DIM, heads=HEADS, experts=experts, top_k=top_k)
        assert moa.state_bytes(3, 50, torch.float32) == plain.state_bytes(3, 50, torch.float32)
        assert moa.init_state(3, 50, dtype=torch.float32).bytes() == plain.state_bytes(3, 50, torch.float32)
        assert sum(p.numel() for p in moa.parameters()) == experts * (2 * DIM * DIM + DIM) + 2 * DIM * DIM
        assert moa.mixing_flops(9, 9) == top_k * plain.mixing_flops(9, 9)


@pytest.mark.parametrize("router", CHOOSING)
def test_every_router_in_which_tokens_choose(router):
    moa, x = make(f":router={router}"), numbers(BATCH, 40, DIM).requires_grad_()
    where = context(40)
    moa.router(x.flatten(0, 1), where)  # what the layer before has left, where routers remember
    loss = (moa(x, where) * numbers(BATCH, 40, DIM)).sum()
    if router == "rl":
        loss = loss + moa.router.policy_loss(numbers(BATCH * 40))
    (loss if moa.auxiliary is None else loss + moa.auxiliary).backward()
    for name, tensor in [("x", x), *moa.named_parameters()]:
        assert tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0, name


def test_auxiliary_losses():
    moa, x = make(":balance=0.3:z=0.02:top_k=3"), numbers(BATCH, TIME, DIM)
    moa(x, context())
    logits = x.flatten(0, 1) @ moa.router.gate.weight.T
    shares = shares_of(counts_of(logits.topk(3).indices, E))
    torch.testing.assert_close(moa.auxiliary, 0.3 * balance(shares.double(), logits.softmax(-1)) + 0.02 * z_loss(logits))
    moa.auxiliary = None
    moa.eval()(x, context())
    with torch.no_grad():
        moa.train()(x, context())
    assert moa.auxiliary is None  # nothing learns
    noisy = make(":router=noisy/importance=2:balance=0:z=0")
    for call in (lambda: noisy(x, context()), lambda: noisy.router(x.flatten(0, 1), context())):
        torch.manual_seed(4)  # the same noise
        call()
    assert noisy.auxiliary == noisy.router.own_loss > 0
    buffered = make(":scope=buffer")
    buffered(x, context())
    assert buffered.balance_loss.buffer.sum() == BATCH * TIME * 2
    after_step(buffered)
    assert buffered.balance_loss.buffer is None


def test_a_model_learns_by_the_losses_of_both_mixtures():
    """The gradient has the auxiliary losses of attention and of feed-forward layers; the value is that of predictions."""
    sizes = dict(model="jetmoe", vocab_size=VOCAB, dim=DIM, heads=2, depth=2, seq_len=8)
    tokens = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(3))
    values, gates = [], []
    for options in ("", ":balance=0:z=0"):
        mixtures = dict(mixer="moa:experts=4:top_k=2" + options, ffn="moe:experts=4:top_k=2:width=8" + options)
        model = build_model(Config.of(**sizes | mixtures))
        loss = model(tokens, tokens)
        loss.backward()
        values.append(loss.item())
        gates.append([s.layer.router.gate.weight.grad.norm().item() for s in model.stack])
    assert values[0] == values[1]
    assert min(gates[0]) > 0 and max(gates[1]) == 0  # since outputs begin at zero


def test_published_sizes():
    """24 layers of 8 experts: the sum of the paper's matrices, and routers and norms; tied as in the authors' code, or not."""
    matrices = 24 * (8 * 2 * 2048**2 + 2 * 2048**2 + 8 * 3 * 2048 * 5632)
    used = 24 * (2 * 2 * 2048**2 + 2 * 2048**2 + 2 * 3 * 2048 * 5632)
    beside = 24 * (2 * 8 * 2048 + 2 * 2048) + 2048
    for tie, tables in ((True, 32000 * 2048), (False, 2 * 32000 * 2048)):
        with torch.device("meta"):
            model = LanguageModel(Config.of(model="jetmoe-8b", tie=tie))
        assert sum(p.numel() for p in model.parameters()) == matrices + tables + beside
        assert active(model) == used + tables + beside and model.stack[0].layer.head_dim == 128
    assert f"{matrices + tables:.2e} {used + tables:.2e}" == "8.59e+09 2.40e+09"
    scores = 24 * 4 * 512 * 2 * 16 * 128  # FLOPs of a token, with 512 keys
    assert forward_flops(model, 512) == 512 * (2 * (used + 24 * 2 * 8 * 2048 + 32000 * 2048) + scores)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("router=expert_choice", "^router: with expert_choice a token has no fixed number of heads"),
        ("heads=0", "^heads: 0 is too small"),
        ("kv_heads=3", "^kv_heads: 4 query heads cannot be shared among 3"),
        ("heads=5", "^heads: a dim of 16 does not divide into 5 heads"),
        ("experts=2:top_k=3", "^top_k: 3 of 2 experts"),
        ("router=switch:top_k=2", "^top_k: the router switch makes 1 choices, not 2"),
        ("balance=-1", "^balance: -1"),
        ("router=topp", "^router: unknown router 'topp'.*did you mean 'topk'"),
    ],
)
def test_bad_options_are_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        build(f"moa:{options}", MIXERS, "mixer", DIM, heads=HEADS, vocab_size=VOCAB)
