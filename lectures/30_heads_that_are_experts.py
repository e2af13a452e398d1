# %% [markdown]
# # Heads that are experts
#
# Attention can be a mixture too: JetMoE makes both sublayers of a layer sparse (Shen et al. 2024, arXiv:2404.07413), with the
# mixture of attention heads of Zhang et al. 2022 (arXiv:2210.05144). An expert is a set of heads with queries and outputs of
# its own; keys and values belong to all, so that a token sees every earlier token, whoever these asked.
#
#     y = sum over the chosen i of g_i Attention(x W_q^i, x W_k, x W_v) W_o^i,      g = softmax over the chosen logits
#
# Letters: B rows, T tokens a row, E experts, A choices a token, C width.

# %%
import lectern
import matplotlib.pyplot as plt
import torch

from lectures.two_kinds import KINDS, T, held_out, learned, nats_a_token
from models import Config, build_model
from models.describe import active
from models.presets import PRESETS
from models.probe_experts import entropy, expert_loads, specialisation
from models.stack import MIXERS
from nn.attention import GQA
from nn.context import Context
from nn.spec import build

torch.manual_seed(0)
torch.set_num_threads(1)
E, A = 8, 2

# %% [markdown]
# ## A mixture by hand
#
# Each expert by itself is a plain attention layer. All of them are asked about all tokens, and a token takes what its two
# say. The layer does the same without asking the other six.

# %%
B, C = 2, 16
moa = build(f"moa:experts={E}:top_k={A}:heads=2:head_dim=4", MIXERS, "mixer", C).double()
x, context = torch.randn(B, T, C, dtype=torch.float64), Context(torch.zeros(B, T, dtype=torch.int64), torch.arange(T))
said = []
for e in range(E):
    alone = GQA(C, heads=2, head_dim=4).double()
    alone.query.weight.data, alone.out.weight.data = moa.query.weight.data[e], moa.out.weight.data[e]
    alone.key.weight.data, alone.value.weight.data = moa.key.weight.data, moa.value.weight.data
    said.append(alone(x, context))
logits = x @ moa.router.gate.weight.T  # (B, T, E)
best = logits.topk(A)
gates = torch.zeros_like(logits).scatter(-1, best.indices, best.values.softmax(-1))
by_hand = (torch.stack(said, -1) @ gates[..., None])[..., 0]
print(f"largest difference from the layer: {(moa(x, context) - by_hand).abs().max():.0e}")
assert torch.allclose(moa(x, context), by_hand, rtol=1e-10, atol=1e-12)
assert moa.routing.experts.shape == (B * T, A) and torch.allclose(gates.sum(-1), torch.ones(B, T).double())
assert moa.key.weight.numel() == 2 * 4 * C  # no axis of experts

# %% [markdown]
# Gates add up to one, so that eight equal experts are one attention layer, whoever is asked.

# %%
for part in (moa.query, moa.out):
    part.weight.data[:] = part.weight.data[:1].clone()
alone.query.weight.data, alone.out.weight.data = moa.query.weight.data[0], moa.out.weight.data[0]
print(f"equal experts are off one layer by {(moa(x, context) - alone(x, context)).abs().max():.0e}")
assert torch.allclose(moa(x, context), alone(x, context), rtol=1e-10, atol=1e-12)

# %% [markdown]
# ## What writing keeps
#
# If experts had keys of their own, a token would have to be kept by each of them, for nobody knows who will look for it. With
# shared ones the decoding state is that of one attention layer. What a token multiplies grows with A, what is stored with E.

# %%
print(f"{'experts':>8} {'parameters':>11} {'of a token':>11} {'state, bytes a token':>21}")
KEPT = {}
for many in (2, 8, 32):
    layer = build(f"moa:experts={many}:top_k={A}:heads=2:head_dim=16", MIXERS, "mixer", 64)
    state = layer.state_bytes(1, 1, torch.float32)
    KEPT[many] = sum(p.numel() for p in layer.parameters()), active(layer), state
    print(f"{many:>8} {KEPT[many][0]:>11,} {KEPT[many][1]:>11,} {state:>21,}")
    assert layer.init_state(1, T, dtype=torch.float32).keys.nbytes * 2 == T * state
assert {state for *_, state in KEPT.values()} == {GQA(64, heads=2, head_dim=16).state_bytes(1, 1, torch.float32)}
assert KEPT[32][0] > 10 * KEPT[2][0]
assert KEPT[32][1] - KEPT[2][1] == 30 * 64  # the router's rows alone

# %% [markdown]
# The published model, counted without memory for its numbers. The paper says 8 billion parameters, of which a token uses 2.2.

# %%
with torch.device("meta"):
    published = build_model(Config.of(stem="", **PRESETS["jetmoe-8b"]))
billions = sum(p.numel() for p in published.parameters()) / 1e9, active(published) / 1e9
words = sum(p.numel() for name, p in published.named_parameters() if name.startswith(("embedding", "head"))) / 1e9
print(f"jetmoe-8b: {billions[0]:.2f} billion, {billions[1]:.2f} of a token, {billions[1] - words:.2f} beside the words")
assert 8.5 < billions[0] < 8.6 and 2.2 < billions[1] - words < 2.3  # "8B" and "2.2B" of the paper

# %% [markdown]
# ## Equal parameters in use
#
# Sums and sentences (`lectures/two_kinds.py`), one layer, three models in which a token goes through equally many parameters
# but for the routers: a dense one, one whose neurons are experts, one whose neurons and heads are. Two seeds each.

# %%
SPARSE = f"moe:experts={E}:top_k={A}:width=24:z=0"
MODELS = {
    "dense": ("gqa:heads=4:kv_heads=2:head_dim=12", "swiglu:width=48"),
    "neurons": ("gqa:heads=4:kv_heads=2:head_dim=12", SPARSE),
    "neurons and heads": (f"moa:experts={E}:top_k={A}:heads=2:kv_heads=2:head_dim=12", SPARSE),
}


def train(mixer: str, ffn: str, seed: int):
    torch.manual_seed(seed)
    config = Config.of(stem="", mixer=mixer, ffn=ffn, depth=1, dim=48, vocab_size=128, seq_len=T)
    return learned(build_model(config), 200, seed=10 * seed)


print(f"{'experts are':>18} {'parameters':>11} {'of a token':>11} {'nats a token':>13}")
FIRST, ROUTERS = {}, {}
for name, spec in MODELS.items():
    models = [train(*spec, seed) for seed in (1, 2)]
    FIRST[name] = models[0]
    ROUTERS[name] = sum(p.numel() for n, p in models[0].named_parameters() if ".router." in n)
    whole = sum(p.numel() for p in models[0].parameters())
    nats = [nats_a_token(model) for model in models]
    print(f"{name:>18} {whole:>11,} {active(models[0]):>11,} " + " ".join(f"{one:>6.3f}" for one in nats))
    assert max(nats) < 2.0  # of 4.85 at first
assert len({active(model) - ROUTERS[name] for name, model in FIRST.items()}) == 1

# %% [markdown]
# The dense model is ahead: this text holds too little for spare parameters to store, and a few hundred steps are few for a
# router to learn from. On Python's library, 400 steps of `train.py` at width 64, the third is ahead of the first by 0.012 bits
# per byte (`nn/moe/RESULTS.md`); the paper's 8 billion do as well as 7 dense ones at a third of the work. What shows here is
# who is asked for what: bits that the expert of a choice tells of the kind of text, 0 for nothing and 1 for all.

# %%
TOLD = {}
for name in ("neurons", "neurons and heads"):
    loads = torch.stack([expert_loads(FIRST[name], [(h[:, :-1],)]) for h in held_out()])  # (kinds, mixtures, E)
    layers = ("heads", "neurons")[-loads.shape[1] :]
    for number, (what, told) in enumerate(zip(layers, specialisation(loads).tolist(), strict=True)):
        TOLD[f"{what} of '{name}'"] = told, loads[:, number] / loads[:, number].sum(-1, keepdim=True)
        print(f"{name:>18}, {what:>7}: {told:.3f} bits, entropy of the loads {entropy(loads.sum(0)[number]):.2f}")
        assert told > 0.05 and entropy(loads.sum(0)[number]) > 2.5  # specialists, and none that starves

# %%
figure, axes = plt.subplots(1, len(TOLD), figsize=(4 * len(TOLD), 2.6), layout="constrained")
for axis, (what, (told, shares)) in zip(axes, TOLD.items(), strict=True):
    axis.imshow(shares.numpy(), vmin=0, cmap="magma", aspect="auto")
    axis.set(yticks=range(2), yticklabels=[kind.__name__ for kind in KINDS], xlabel="expert", title=f"{what}: {told:.2f} bits")
lectern.save_figure(figure, "30_heads_that_are_experts")
