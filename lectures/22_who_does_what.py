# %% [markdown]
# # Who does what: routing and balance
#
# A mixture of experts has many feed-forward layers and uses a few of them for each token, so that it knows more than it
# works. Which few, a router decides. Left alone it likes whom it liked before, and most experts starve. What keeps them in
# use, and does that keep them from becoming experts in anything? (Shazeer et al. 2017, arXiv:1701.06538; Fedus et al. 2021,
# arXiv:2101.03961; Qiu et al. 2025, "Demons in the Detail", arXiv:2501.11873.)
#
# Letters: N tokens, E experts, K choices a token, C width, f_e the share of the choices that expert e has, P_e its mean score.

# %%
import itertools

import lectern
import matplotlib.pyplot as plt
import torch

from lectures.two_kinds import T, held_out, learned, nats_a_token, rows, sentences, sums
from models import Config, build_model
from models.extract_domain import extract
from models.probe_experts import entropy, expert_loads, specialisation
from models.stack import FFNS
from nn.context import Context
from nn.moe.host_experts import moved_bytes
from nn.moe.losses import Balance, balance, shares_of
from nn.moe.routing import counts_of
from nn.spec import build
from optim import AdamW, Combined, SparseAdamW

torch.manual_seed(0)
torch.set_num_threads(1)
E, K = 8, 2

# %% [markdown]
# ## A mixture by hand
#
# The router gives a token E logits, and its output is the sum of what the K best experts say, each times its gate. The gate
# is a softmax, of the chosen logits ("top-k, then softmax": Mixtral, arXiv:2401.04088) or of all ("softmax, then top-k":
# OLMoE, arXiv:2409.02060). The two differ by the mass of those who were not asked: if all experts are the same, the first
# mixture is that one expert, the second is a smaller one.

# %%
x = torch.randn(1, 5, 16, dtype=torch.float64)
context = Context(torch.zeros(1, 5, dtype=torch.int64), torch.arange(5))
print(f"{'softmax over':>13} {'kept mass':>10} {'off one expert by':>18}")
for over in ("chosen", "all"):
    moe = build(f"moe:experts={E}:top_k={K}:width=24:router=topk/over={over}", FFNS, "ffn", 16).double()
    logits = x[0] @ moe.router.gate.weight.T
    by_hand = torch.zeros(5, 16, dtype=torch.float64)
    for n in range(5):
        best = logits[n].topk(K).indices
        gates = logits[n, best].softmax(0) if over == "chosen" else logits[n].softmax(0)[best]
        for e, gate in zip(best, gates, strict=True):
            inner = torch.nn.functional.silu(moe.experts.gate.weight[e] @ x[0, n]) * (moe.experts.up.weight[e] @ x[0, n])
            by_hand[n] += gate * (moe.experts.down.weight[e] @ inner)
    assert torch.allclose(moe(x, context)[0], by_hand, rtol=1e-10)
    for part in (moe.experts.gate, moe.experts.up, moe.experts.down):
        part.weight.data[:] = part.weight.data[:1].clone()
    dense = build("swiglu:width=24", FFNS, "ffn", 16).double()
    for name in ("gate", "up", "down"):
        getattr(dense, name).weight.data = getattr(moe.experts, name).weight.data[0]
    off = ((moe(x, context) - dense(x, context)).norm() / dense(x, context).norm()).item()
    print(f"{over:>13} {moe.routing.weights.sum(-1).mean():>10.3f} {off:>18.1e}")
    assert off < 1e-12 if over == "chosen" else off > 0.2

# %% [markdown]
# ## The balance loss
#
# L = E sum_e f_e P_e. It is 1 when all shares are equal and E when one expert has everything; the gradient goes through P
# alone, and pushes down the scores of those whose share is large. It is not a distance from balance: where f and P
# disagree it can be less than 1.

# %%
even, one = torch.full((E,), 1 / E), torch.eye(E)[0]
crossed = torch.tensor([0.2, 0.05] * (E // 2)), torch.tensor([0.05, 0.2] * (E // 2))
for name, (f, P) in {"even": (even, even), "one has all": (one, one), "f and P opposed": crossed}.items():
    print(f"{name:>16}: {balance(f, P[None]):.2f}")
assert abs(balance(even, even[None]) - 1) < 1e-6 and balance(one, one[None]) == E and balance(crossed[0], crossed[1][None]) < 1

# %% [markdown]
# ## Two kinds of text
#
# Sums, and sentences of a few words: one byte a token (`lectures/two_kinds.py`). A model of one layer of attention and one
# mixture learns both.

# %%
def train(ffn: str, *, together: bool = True, steps: int = 200, depth: int = 1):
    """A model that has learned from both kinds, `together` in one batch or each in a part of the step by itself."""
    config = Config.of(stem="", mixer="gqa", ffn=f"{ffn}:width=24:z=0", depth=depth, dim=48, heads=2, vocab_size=128, seq_len=T)
    return learned(build_model(config), steps, together=together)


HELD = held_out()


@torch.no_grad()
def judged(model) -> tuple[float, torch.Tensor]:
    """Nats a token over both kinds, and the loads (kinds, layers, E)."""
    return nats_a_token(model), torch.stack([expert_loads(model, [(held[:, :-1],)]) for held in HELD])


# %% [markdown]
# ## Without a balance loss
#
# One expert a token, as in Switch Transformers. Entropy of the loads is log2 E = 3 bits where they are even. Three ways to
# keep them even: the loss; a bias on the scores that chooses and never weighs, moved after each step against the load
# (Wang et al. 2024, arXiv:2408.15664); Sinkhorn's assignment in training (Clark et al. 2022, arXiv:2202.01169).

# %%
WAYS = {
    "no loss": "moe:experts=8:balance=0:router=switch",
    "balance loss": "moe:experts=8:balance=0.03:router=switch",
    "bias": "moe:experts=8:balance=0:top_k=1:router=bias/rate=0.01/renormalise=false",
    "Sinkhorn": "moe:experts=8:balance=0:router=sinkhorn",
}
print(f"{'':>14} {'entropy':>8} {'busiest / mean':>15} {'nats a token':>13}")
EVEN = {}
for name, ffn in WAYS.items():
    nats, loads = judged(train(ffn))
    total = loads.sum(0)[0]
    EVEN[name] = entropy(total).item(), (total.max() / total.double().mean()).item(), total / total.sum()
    print(f"{name:>14} {EVEN[name][0]:>8.2f} {EVEN[name][1]:>15.2f} {nats:>13.3f}")
assert EVEN["no loss"][0] < 2.7 and EVEN["no loss"][1] > 2
assert all(EVEN[name][0] > EVEN["no loss"][0] + 0.1 for name in ("balance loss", "bias", "Sinkhorn"))
assert EVEN["balance loss"][0] > 2.8 and EVEN["bias"][0] > 2.8

# %% [markdown]
# ## Balanced over what?
#
# A large model sees a step in parts: one on each machine, one after the other. The usual code works the loss out in each part
# and takes the mean. If a part holds one kind of text, every expert must then be used alike by every kind. Counting f over all
# parts (one all-reduce of E numbers) asks only that the whole be even. The loss is linear in P, so with one f the mean over the
# parts is the loss of the whole batch, exactly; the usual mean is larger by E sum_e Cov_j(f_e, P_e) over the parts j.

# %%
generator = torch.Generator().manual_seed(0)
experts = torch.randint(E, (4, 10, K), generator=generator)
scores = (2 * torch.randn(4, 10, E, generator=generator, dtype=torch.float64)).softmax(-1)
f = shares_of(torch.stack([counts_of(part, E) for part in experts])).double()
P = scores.mean(1)
usual = torch.stack([Balance("micro", E)(*part, 1) for part in zip(experts, scores, strict=True)]).mean()
whole = Balance("micro", E)(experts.flatten(0, 1), scores.flatten(0, 1), 4)
covariance = E * ((f - f.mean(0)) * (P - P.mean(0))).mean(0).sum()
print(f"parts {usual:.4f} - whole {whole:.4f} = {usual - whole:.4f}; E times the covariances {covariance:.4f}")
assert torch.allclose(usual - whole, covariance)
assert torch.allclose(torch.stack([balance(f.mean(0), part) for part in scores]).mean(), whole)

# %% [markdown]
# The same model, the same rows in each step, the same coefficient. How much an expert tells of the kind of text is their mutual
# information: 0 bits where both kinds use the experts alike, 1 bit where they share none.

# %%
print(f"{'counted over':>13} {'entropy':>8} {'told, bits':>11} {'nats a token':>13}")
TOLD = {}
for name, together in (("each part", False), ("the step", True)):
    nats, loads = judged(train(f"moe:experts={E}:top_k={K}:balance=0.3", together=together))
    TOLD[name] = specialisation(loads)[0].item(), loads[:, 0] / loads[:, 0].sum(-1, keepdim=True)
    print(f"{name:>13} {entropy(loads.sum(0)[0]):>8.2f} {TOLD[name][0]:>11.3f} {nats:>13.3f}")
    assert entropy(loads.sum(0)[0]) > 2.9  # both are balanced …
assert TOLD["the step"][0] > 5 * TOLD["each part"][0] and TOLD["the step"][0] > 0.03  # … and one has specialists

# %% [markdown]
# The paper reports better perplexity too, in models of billions; here, after 200 steps, the losses of the two differ by less
# than those of two seeds, in either direction.
#
# ## Routers that learn nothing
#
# A table from token ids to experts needs no balance loss: each expert owns as many ids as any other (Roller et al. 2021,
# arXiv:2106.04426; in two levels, first by the kind of text, Ren et al. 2023, "PanGu-Sigma", arXiv:2303.10845). But text is not
# uniform in its ids, and equal shares of ids are not equal shares of tokens.

# %%
model = train(f"moe:experts={E}:router=hash")
nats, loads = judged(model)
table, total = model.stack[1].layer.router.table[0, :, 0].long(), loads.sum(0)[0]
print("ids an expert   ", *(f"{int(n):>6}" for n in counts_of(table, E)))
print("tokens an expert", *(f"{int(n):>6}" for n in total), f"  entropy {entropy(total):.2f}, {nats:.3f} nats a token")
assert counts_of(table, E).eq(128 // E).all() and total.max() > 1.5 * total.double().mean()
assert not list(model.stack[1].layer.router.parameters())

# %% [markdown]
# Experts that few tokens ask can be stored elsewhere. In PanGu-Sigma they live in the host's memory, weights and Adam's state;
# those that a batch asks visit the device, and the step touches no others. Here each step is of one kind of text, and of 32
# experts each kind has 16 of its own, or all are for both. `host=true` computes what experts on the device compute.

# %%
print(f"{'experts of':>11} {'nats a token':>13} {'moved of all':>13} {'kept, other kind':>17}")
AWAY = {}
for name, domains in (("both kinds", 1), ("one kind", 2)):
    spec = f"moe:experts=32:width=24:z=0:router=hash/domains={domains}:host=true"
    model = build_model(Config.of(stem="", mixer="gqa", ffn=spec, depth=1, dim=48, heads=2, vocab_size=128, seq_len=T))
    experts, kind = [p for n, p in model.named_parameters() if ".experts." in n], [torch.tensor([[i]]) for i in (0, 1)]
    others = [p for n, p in model.named_parameters() if ".experts." not in n]
    options = dict(lr=3e-3, weight_decay=0.0)
    optimizer = Combined([SparseAdamW(experts, **options), AdamW(others, **options)])
    kept = []
    for step, pair in enumerate(itertools.islice(zip(rows(sums, 8, 1), rows(sentences, 8, 2), strict=True), 120)):
        part, before = pair[step % 2], [p.detach().clone() for p in experts]
        (model(part[:, :-1], part[:, 1:], domains=kind[step % 2]) / (8 * T)).backward()
        optimizer.step()
        optimizer.zero_grad()
        same = torch.stack([(p == old).flatten(1).all(1) for p, old in zip(experts, before, strict=True)]).all(0)
        kept.append(same[16:].double().mean() if step % 2 == 0 else same[:16].double().mean())
    moved = moved_bytes(model)["up"] / (120 * sum(p.numel() * 4 for p in experts))
    with torch.no_grad():
        nats = sum(model(h[:, :-1], h[:, 1:], domains=d).item() for h, d in zip(HELD, kind, strict=True))
    AWAY[name] = nats / sum(h[:, 1:].numel() for h in HELD), moved, torch.stack(kept).mean().item()
    print(f"{name:>11} {AWAY[name][0]:>13.3f} {AWAY[name][1]:>13.2f} {AWAY[name][2]:>17.2f}")
assert AWAY["one kind"][1] <= 0.5 and AWAY["one kind"][2] == 1.0

# %% [markdown]
# A kind of text with experts of its own can be cut out as a model of its own, which computes the same numbers
# (`python -m models.extract_domain`).

# %%
small = extract(model, domain=1).eval()
with torch.no_grad():
    assert torch.equal(small(HELD[1][:, :-1]), model.eval()(HELD[1][:, :-1], domains=kind[1]))
print("parameters:", *(f"{sum(p.numel() for p in m.parameters()):,}" for m in (model, small)))

# %% [markdown]
# ## Routers that remember
#
# A router of layer 2 does not know what the router of layer 1 saw. A gated recurrent unit over the depth, one for all layers,
# tells it (Qiu et al. 2024, "RMoE", arXiv:2408.06793). Do the choices of two layers then agree more? The mutual information of
# a token's first choices in both layers, beside that of a linear router.

# %%
SHARED = {}
for router in ("topk", "recurrent/hidden=32"):
    model = train(f"moe:experts={E}:top_k={K}:router={router}", depth=2, steps=150)
    nats, joint = 0.0, torch.zeros(E, E)
    for held in HELD:
        nats += model(held[:, :-1], held[:, 1:]).item()
        first, second = (model.stack[i].layer.routing.experts[:, 0] for i in (1, 3))
        joint.index_put_((first, second), torch.ones(len(first)), accumulate=True)
    SHARED[router] = (entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.flatten())).item()
    nats /= sum(held[:, 1:].numel() for held in HELD)
    print(f"{router:>20}: {SHARED[router]:.2f} bits shared, {nats:.3f} nats a token")
memories = [model.stack[i].layer.router.from_memory for i in (1, 3)]
assert memories[0] is memories[1] and all(bits > 0 for bits in SHARED.values())

# %%
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
for place, (name, (_, _, shares)) in enumerate(EVEN.items()):
    axes[0].bar(torch.arange(E) + 0.2 * place, shares.sort(descending=True).values, width=0.2, label=name)
axes[0].set(xlabel="experts, the busiest first", ylabel="share of the tokens", title="one expert a token")
axes[0].legend()
grid = torch.cat([shares for _, shares in TOLD.values()])
image = axes[1].imshow(grid, cmap="magma", vmin=0, aspect="auto")
labels = [f"{kind}\n({name})" for name in TOLD for kind in ("sums", "sentences")]
axes[1].set(xlabel="expert", yticks=range(4), yticklabels=labels, title="balance counted over each part, over the step")
figure.colorbar(image, ax=axes[1], label="share of the choices")
lectern.save_figure(figure, "22_who_does_what")
