"""Mixtures of experts against those of the `transformers` package, with the same weights.

Its routers compute weights in float32 whatever the dtype, so in float64 that much of a difference is left; where weights are
given, or there is one choice only, whose weight is 1, there is none.
"""

import pytest
import torch
from torch import Tensor, nn

from models import Config, LanguageModel
from models.generate import Sampler, generate
from nn.context import Context
from nn.moe import MoA, MoE
from nn.moe.losses import Balance, balance, shares_of
from nn.moe.routing import counts_of
from nn.position.rope import RoPE

transformers = pytest.importorskip("transformers")
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter  # noqa: E402
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention, JetMoeMoE  # noqa: E402
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func  # noqa: E402
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock  # noqa: E402
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock  # noqa: E402

BATCH, TIME, DIM, E, WIDTH, VOCAB, THETA = 2, 20, 24, 8, 10, 31, 500.0
DEEPSEEK = dict(moe_intermediate_size=WIDTH, num_experts_per_tok=3, num_local_experts=E, n_group=4, topk_group=2)
BLOCKS = {  # a block of theirs, its configuration, and how ours is spelled
    "mixtral": (MixtralSparseMoeBlock, transformers.MixtralConfig, dict(num_local_experts=E), dict()),
    "mixtral, three": (MixtralSparseMoeBlock, transformers.MixtralConfig,
                       dict(num_local_experts=E, num_experts_per_tok=3), dict(top_k=3)),
    "olmoe": (OlmoeSparseMoeBlock, transformers.OlmoeConfig, dict(num_experts=E, num_experts_per_tok=4),
              dict(top_k=4, router="topk/over=all")),
    "olmoe, renormalised": (OlmoeSparseMoeBlock, transformers.OlmoeConfig,
                            dict(num_experts=E, num_experts_per_tok=4, norm_topk_prob=True), dict(top_k=4)),
    "qwen2": (Qwen2MoeSparseMoeBlock, transformers.Qwen2MoeConfig,
              dict(num_experts=E, moe_intermediate_size=WIDTH, shared_expert_intermediate_size=17, num_experts_per_tok=3),
              dict(top_k=3, router="topk/over=all", shared=1, shared_width=17, shared_gate=True)),
    "deepseek": (DeepseekV3MoE, transformers.DeepseekV3Config, DEEPSEEK | dict(n_shared_experts=2, routed_scaling_factor=2.5),
                 dict(top_k=3, router="bias/groups=4/top_groups=2/scaling=2.5", shared=2)),
    "deepseek, not renormalised": (
        DeepseekV3MoE, transformers.DeepseekV3Config,
        DEEPSEEK | dict(n_shared_experts=1, norm_topk_prob=False, n_group=1, topk_group=1, routed_scaling_factor=1.5),
        dict(top_k=3, router="bias/renormalise=false/scaling=1.5", shared=1)),
    "jetmoe": (JetMoeMoE, transformers.JetMoeConfig, dict(num_local_experts=E), dict()),
}  # fmt: skip
PARTS = (  # names of the router, of gate and up in one, and of down: in all of them, and in JetMoE
    ("gate.weight", "experts.gate_up_proj", "experts.down_proj"),
    ("router.layer.weight", "input_linear.weight", "output_linear.weight"),
)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def drawn(block: nn.Module) -> nn.Module:
    """With random weights of such a size that logits differ and nothing is small."""
    torch.manual_seed(0)
    for tensor in block.parameters():
        nn.init.normal_(tensor, std=0.4)
    for name, tensor in block.named_buffers():
        if "bias" in name:
            nn.init.normal_(tensor, std=0.2)
    return block.eval()


def pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, MoE]:
    kind, config, options, spelled = BLOCKS[name]
    config = config(hidden_size=DIM, intermediate_size=WIDTH, **options)
    config._experts_implementation = "eager"
    block = drawn(kind(config)).to(dtype)
    moe = MoE(DIM, experts=E, width=WIDTH, **spelled).to(dtype).eval()
    theirs = block.state_dict()
    gate, gate_up, down = (theirs[part] for part in PARTS[name == "jetmoe"])
    ours = {"router.gate.weight": gate, "experts.down.weight": down}
    ours |= dict(zip(("experts.gate.weight", "experts.up.weight"), gate_up.chunk(2, 1), strict=True))
    for key, tensor in theirs.items():
        if key.startswith("shared_expert") and "gate.weight" not in key:  # shared_experts.up_proj.weight, say
            ours[f"shared.{key.split('.')[1].removesuffix('_proj')}.weight"] = tensor[None]
    if name == "qwen2":
        ours["shared_gate.weight"] = theirs["shared_expert_gate.weight"]
    if "gate.e_score_correction_bias" in theirs:
        ours["router.bias"] = theirs["gate.e_score_correction_bias"]
    moe.load_state_dict(ours)
    return block, moe


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*(shape or (BATCH, TIME, DIM)), dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(
        dtype
    )


def context(start: int = 0, end: int = TIME, state: object = None) -> Context:
    return Context(torch.zeros(BATCH, end - start, dtype=torch.int64), torch.arange(start, end), state=state)


def assert_close(found: Tensor, expected: Tensor, limit: float = 1e-6) -> None:
    """Equal to within `limit` of the largest number."""
    torch.testing.assert_close(found, expected, rtol=0, atol=limit * expected.abs().max().item())


@each_dtype
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name, dtype):
    """Outputs, and gradients of the input, the router and the experts."""
    block, moe = pair(name, dtype)
    x, y, way = numbers(dtype).requires_grad_(), numbers(dtype).requires_grad_(), numbers(dtype, BATCH, TIME, DIM).sin()
    expected, found = block(x), moe(y, context())
    if name == "jetmoe":
        expected = expected - block.bias  # which ours do not have
    assert_close(found, expected)
    assert moe.routing.experts.unique().numel() == E  # all of them were asked
    (expected * way).sum().backward()
    (found * way).sum().backward()
    assert_close(y.grad, x.grad)
    theirs = dict(block.named_parameters())
    gate, gate_up, down = (theirs[part].grad for part in PARTS[name == "jetmoe"])
    assert_close(moe.router.gate.weight.grad, gate)
    assert_close(torch.cat([moe.experts.gate.weight.grad, moe.experts.up.weight.grad], 1), gate_up)
    assert_close(moe.experts.down.weight.grad, down)


@torch.no_grad()
def test_experts_in_float64():
    block, moe = pair("mixtral", torch.float64)
    x, weights = numbers(torch.float64, 40, DIM), numbers(torch.float64, 40, 3)
    experts = numbers(torch.float64, 40, E).topk(3).indices
    assert_close(moe.experts(x, experts, weights), block.experts(x, experts, weights), 1e-14)


@pytest.mark.parametrize("options", [dict(), dict(n_group=1, topk_group=1), dict(topk_group=3, norm_topk_prob=False)])
def test_the_gate_of_deepseek_v3(options):
    """Chosen with the bias, within groups; weighed without it."""
    config = transformers.DeepseekV3Config(hidden_size=DIM, routed_scaling_factor=2.5, **DEEPSEEK | options)
    gate = drawn(DeepseekV3TopkRouter(config))
    given = dict(groups=config.n_group, top_groups=config.topk_group, renormalise=config.norm_topk_prob, scaling=2.5)
    spelled = "/".join(["bias", *(f"{key}={str(value).lower()}" for key, value in given.items())])
    router = MoE(DIM, experts=E, top_k=3, router=spelled, width=1).router.eval()
    router.load_state_dict({"gate.weight": gate.weight, "bias": gate.e_score_correction_bias})
    x = numbers(torch.float32, 400, DIM)
    (logits, weights, indices), routing = gate(x), router(x, context())
    table = torch.zeros(400, E)
    assert torch.equal(routing.logits, logits)
    assert_close(table.scatter(1, routing.experts, routing.weights), table.scatter(1, indices, weights))
    unbiased = routing.logits.topk(3).indices.sort().values
    assert (unbiased != routing.experts.sort().values).any(1).float().mean() > 0.3  # bias and groups have a say


@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("layers", [1, 3])
def test_load_balancing_loss(top_k, layers):
    """One layer: ours is theirs / top_k. Of several they pool shares and scores before they multiply; ours are summed."""
    logits = [numbers(torch.float32, 50 + i, E)[:50] + torch.linspace(-1, 1, E) for i in range(layers)]
    theirs = load_balancing_loss_func(tuple(logits), E, top_k)
    scores = torch.cat(logits).softmax(-1)
    experts = torch.cat(logits).topk(top_k).indices
    pooled = balance(shares_of(counts_of(experts, E)), scores)
    torch.testing.assert_close(theirs, top_k * pooled)
    if layers == 1:
        torch.testing.assert_close(theirs, top_k * Balance("micro", E)(experts, scores, 5))
    assert pooled > 1.1


def jetmoe(top_k: int, **more) -> transformers.JetMoeConfig:
    sizes = dict(hidden_size=DIM, kv_channels=4, num_key_value_heads=3, intermediate_size=WIDTH)
    rope = dict(rope_parameters=dict(rope_type="default", rope_theta=THETA))
    made = transformers.JetMoeConfig(num_local_experts=E, num_experts_per_tok=top_k, **sizes, **rope, **more)
    made._attn_implementation = "sdpa"  # the other one takes its softmax in float32
    return made


def attention_of(block: nn.Module) -> dict[str, Tensor]:
    """The weights of their attention by our names."""
    key, value = block.kv_proj.weight.chunk(2)
    experts = block.experts
    return {
        "router.gate.weight": experts.router.layer.weight, "query.weight": experts.input_linear.weight, "key.weight": key,
        "value.weight": value, "out.weight": experts.output_linear.weight,
    }  # fmt: skip


@each_dtype
@pytest.mark.parametrize("top_k", [1, 2, 5])
@torch.no_grad()
def test_the_attention_of_jetmoe(top_k, dtype):
    """In training's form and in decoding's."""
    block = drawn(JetMoeAttention(jetmoe(top_k), layer_idx=0)).to(dtype)
    moa = MoA(DIM, RoPE(theta=THETA), heads=3, head_dim=4, experts=E, top_k=top_k).to(dtype)
    moa.load_state_dict(attention_of(block))
    x = numbers(dtype)
    angles = torch.arange(TIME)[:, None] * torch.tensor([1, THETA**-0.5, 1, THETA**-0.5], dtype=torch.float64)
    tables = angles.cos()[None].to(dtype), angles.sin()[None].to(dtype)
    hidden = torch.full((TIME, TIME), -torch.inf, dtype=dtype).triu(1)[None, None]
    expected = block(x, hidden, tables)[0] - block.experts.bias
    limit = 1e-14 if top_k == 1 and dtype == torch.float64 else 1e-6
    assert_close(moa(x, context()), expected, limit)
    state = moa.init_state(BATCH, TIME, dtype=dtype)
    parts = [moa(x[:, a:b], context(a, b, state)) for a, b in ((0, 4), (4, 5), (5, 6), (6, TIME))]
    assert_close(torch.cat(parts, 1), expected, limit)
    assert state.bytes() == BATCH * 2 * TIME * 3 * 4 * dtype.itemsize  # no number more for the experts


@torch.no_grad()
def test_a_whole_jetmoe():
    """Logits, and the text it goes on with, token for token."""
    config = jetmoe(2, vocab_size=VOCAB, num_hidden_layers=2, bos_token_id=0, eos_token_id=None)
    peer = drawn(transformers.JetMoeForCausalLM(config))
    ours = {"embedding.weight": peer.model.embed_tokens.weight, "final_norm.weight": peer.model.norm.weight}
    for i, layer in enumerate(peer.model.layers):
        layer.mlp.bias.zero_()
        layer.self_attention.experts.bias.zero_()
        ours |= {f"stack.{2 * i}.layer.{name}": tensor for name, tensor in attention_of(layer.self_attention).items()}
        gate, up = layer.mlp.input_linear.weight.chunk(2, 1)
        mlp = {"router.gate": layer.mlp.router.layer.weight, "experts.gate": gate, "experts.up": up}
        mlp["experts.down"] = layer.mlp.output_linear.weight
        ours |= {f"stack.{2 * i + 1}.layer.{name}.weight": tensor for name, tensor in mlp.items()}
        norms = layer.input_layernorm, layer.post_attention_layernorm
        ours |= {f"stack.{2 * i + j}.norm.weight": norm.weight for j, norm in enumerate(norms)}
    ours["head.weight"] = ours["embedding.weight"]
    sizes = dict(dim=DIM, heads=3, depth=2, vocab_size=VOCAB, seq_len=64, position=f"rope:theta={THETA}")
    mixtures = dict(mixer=f"moa:experts={E}:top_k=2:head_dim=4", ffn=f"moe:experts={E}:top_k=2:width={WIDTH}")
    model = LanguageModel(Config.of(model="jetmoe-8b", **sizes, **mixtures))
    model.load_state_dict(ours)
    tokens = torch.randint(VOCAB, (2, 30), generator=torch.Generator().manual_seed(1))
    assert_close(model(tokens), peer(tokens).logits)
    prompt = tokens[:, :7]
    expected = peer.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False, pad_token_id=0)
    found = torch.stack(list(generate(model.eval(), prompt, new_tokens=20, sampler=Sampler(temperature=0))), dim=1)
    assert torch.equal(found, expected[:, 7:])
