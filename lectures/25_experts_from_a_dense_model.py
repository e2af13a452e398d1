# %% [markdown]
# # Experts from a dense model
#
# A mixture of experts trained from nothing throws away what was paid for a dense model. Three papers begin with one instead.
# Sparse upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055; for Llama 3 Vavre et al. 2024, arXiv:2412.09952) makes every
# expert a copy of the feed-forward layer. LLaMA-MoE (Zhu et al. 2024, arXiv:2406.16554) cuts the layer into experts.
# AquilaMoE (Zhang et al. 2024, arXiv:2408.06567) first grows the dense model and then upcycles it.
#
# What is the mixture at step 0? What tells copies apart? And what is it worth at equal cost?
#
# Letters: E experts, k of them a token, F neurons of a feed-forward layer, f the layer.

# %%
from copy import deepcopy
from dataclasses import replace

import lectern
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch import Tensor

from models import Config, LanguageModel, build_model
from models.checkpoint import model_tensors
from models.describe import forward_flops
from models.grow import grow
from models.split_ffn import split
from models.upcycle import dense_ffns, upcycle, upcycled
from train import build_optimizer

torch.set_num_threads(1)
SEED = 0

# %% [markdown]
# ## Facts
#
# A text without grammar: subject, relation, object, and the object of each of 96 x 64 pairs was drawn once. Nothing can be
# inferred, only stored, and only objects count. So a model's loss tells how much it knows, and a small one is soon full.

# %%
OBJECTS, ROW = 64, 16  # facts a row


class Facts:
    """Rows of facts, of which there are subjects x relations."""

    def __init__(self, subjects: int, relations: int):
        self.objects = torch.randint(OBJECTS, (subjects, relations), generator=torch.Generator().manual_seed(100 + SEED))
        self.vocab_size = subjects + relations + OBJECTS

    def rows(self, generator: torch.Generator, count: int = 32) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, 3 ROW), -100 where nothing is asked."""
        subjects, relations = (torch.randint(n, (count, ROW), generator=generator) for n in self.objects.shape)
        words = [subjects, len(self.objects) + relations, sum(self.objects.shape) + self.objects[subjects, relations]]
        inputs = torch.stack(words, -1).flatten(1)
        targets = torch.full_like(inputs, -100)
        targets[:, 1::3] = inputs[:, 2::3]
        return inputs, targets

    @torch.no_grad()
    def judge(self, model: LanguageModel) -> tuple[float, float]:
        """The loss in nats an object, and the share of the facts that are known."""
        inputs, targets = self.rows(torch.Generator().manual_seed(5), 64)
        logits, asked = model.eval()(inputs), targets >= 0
        model.train()
        right = (logits.argmax(-1) == targets)[asked]
        return F.cross_entropy(logits[asked], targets[asked]).item(), right.float().mean().item()


def learn(model: LanguageModel, facts: Facts, steps: int, *, seed: int, falls: bool = True, watch=None, every: int = 0) -> list:
    """Train in place at rates that, if `falls`, go to zero over the second half; what `watch(model)` said every few steps."""
    torch.manual_seed(seed)  # of noisy routers
    optimizer, generator, seen = build_optimizer(model.config, model), torch.Generator().manual_seed(seed), []
    for step in range(steps + 1):
        if watch and step % every == 0:
            seen.append((step, watch(model)))
        if step == steps:
            return seen
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (min(1, 2 * (1 - step / steps)) if falls else 1)
        inputs, targets = facts.rows(generator)
        (model(inputs, targets) / (targets >= 0).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()


MANY = Facts(96, 64)
FIELDS = dict(
    dim=64, heads=4, depth=1, stem="", seq_len=3 * ROW, position="rope", tie=False, mixer="gqa:kv_heads=2", norm="rmsnorm",
    optimizer="muon:lr=0.02", rest_optimizer="adamw:lr=0.005:betas=0.8+0.95", embedding_lr=0.02,
)  # fmt: skip
dense = build_model(Config.of(**FIELDS, vocab_size=MANY.vocab_size, ffn="swiglu:width=64"), seed=SEED)
learn(dense, MANY, 250, seed=SEED, falls=False)
START, known = MANY.judge(dense)
print(f"after 250 steps the dense model knows {known:.0%} of {MANY.objects.numel():,} facts; loss {START:.3f}")
assert 0.15 < known < 0.6

# %% [markdown]
# ## A mixture of equals
#
#     y = sum over the k chosen of g_e f(x) = f(x) sum g_e
#
# If all experts are the same layer f, only the sum of the weights counts. Mixtral's order, first the top k and then a softmax
# over them, gives 1 whatever the router says: `over=chosen`. The other order, a softmax over all of which the top k are kept,
# gives the sum of what is kept: `over=all`. In float64, with a router as good as random:

# %%
inputs, targets = MANY.rows(torch.Generator().manual_seed(6))
exact, SUM = deepcopy(dense).double(), {}
with torch.no_grad():
    for over in ("chosen", "all"):
        made = upcycle(exact, over=over, router_std=64**-0.5)
        apart = (made(inputs) - exact(inputs)).abs().max().item()
        SUM[over] = made.stack[1].layer.routing.weights.sum(-1)
        print(f"over={over:7} sum of weights {SUM[over].min():.2f} to {SUM[over].max():.2f}; logits move by {apart:.1e}")
        assert (apart < 1e-12) == (over == "chosen")
assert SUM["all"].max() < 1 and 0.25 < SUM["all"].mean() < 0.75
spread = [(std, (std * torch.randn(100_000, 8)).softmax(-1).topk(2).values.sum(-1).mean().item()) for std in (0, 0.5, 1, 1.5)]
print("kept by the first 2 of 8 random logits: " + ", ".join(f"{kept:.2f} at deviation {std}" for std, kept in spread))
assert abs(spread[0][1] - 0.25) < 1e-6 and 0.54 < spread[2][1] < 0.58

# %% [markdown]
# A sharded model is upcycled where it lies: who holds experts 0 to 3 makes only these, from the same dense tensors.

# %%
prefixes = [place.prefix for place in dense_ffns(dense)]
parts = [upcycled(model_tensors(dense), prefixes, 8, first=a, last=b, noise=0.1)["stack.1.layer.experts.up.weight"]
         for a, b in ((0, 4), (4, 8))]  # fmt: skip
whole = upcycle(dense, noise=0.1).stack[1].layer.experts.up.weight
print(f"experts 0 to 3 {tuple(parts[0].shape)} and 4 to 7 {tuple(parts[1].shape)} are the whole {tuple(whole.shape)}")
assert torch.equal(torch.cat(parts), whole)

# %% [markdown]
# ## What tells copies apart
#
# The router alone: copies are given different tokens, and different shares of them. If every token went to all of them with
# equal weight, their gradients would be the same number for number, and so would they, for ever.

# %%
for name, top_k, std in (("2 of 8 by a router", 2, 0.125), ("all 8, equal", 8, 0.0)):
    made = upcycle(exact, top_k=top_k, router_std=std, options="balance=0:z=0")
    made(inputs, targets).backward()
    gradient = made.stack[1].layer.experts.up.weight.grad.flatten(1)
    spread = ((gradient - gradient.mean(0)).norm() / gradient.norm()).item()
    print(f"{name:19} gradients differ from their mean by {spread:.1e} of their length")
    assert (spread > 0.3) == (top_k == 2) and (spread < 1e-12) == (top_k == 8)

# %% [markdown]
# ## At equal cost
#
# A token now goes through two feed-forward layers instead of one. So the dense model, if it is simply trained on, gets as many
# more steps as make the FLOPs equal. Beside it: both orders upcycled, and the same mixture from nothing. Rates stay where
# they were and fall to zero over the second half.


# %%
def likeness(model: LanguageModel) -> float:
    """The mean cosine between the experts, by all their matrices together."""
    experts = model.stack[1].layer.experts
    rows = F.normalize(torch.cat([linear.weight.detach().flatten(1) for linear in experts.children()], 1), dim=1)
    cosines = rows @ rows.T
    return ((cosines.sum() - len(rows)) / (len(rows) * (len(rows) - 1))).item()


def watch(model: LanguageModel) -> tuple[float, float, float]:
    return *MANY.judge(model), likeness(model) if hasattr(model.stack[1].layer, "experts") else 1.0


STEPS = 120
ways = {
    "dense, trained on": deepcopy(dense),
    "upcycled, over=chosen": upcycle(dense, router_std=0.125, seed=SEED),
    "upcycled, over=all": upcycle(dense, over="all", router_std=0.125, seed=SEED),
}
ways["mixture from nothing"] = build_model(ways["upcycled, over=chosen"].config, seed=SEED + 1)
COST = {name: forward_flops(model, 3 * ROW) for name, model in ways.items()}
LOSS, KNOWN, CURVE = {}, {}, {}
print(f"{'':22}{'parameters':>11}{'steps':>6}{'loss at 0':>11}{'halfway':>9}{'at the end':>11}{'known':>7}{'cosine':>8}")
for name, model in ways.items():
    steps = 6 * round(STEPS * COST["upcycled, over=all"] / COST[name] / 6)
    CURVE[name] = learn(model, MANY, steps, seed=SEED + 200, watch=watch, every=steps // 6)
    first, half, (LOSS[name], KNOWN[name], alike) = (CURVE[name][i][1] for i in (0, 3, 6))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name:22}{parameters:11,}{steps:6}{first[0]:11.3f}{half[0]:9.3f}{LOSS[name]:11.3f}{KNOWN[name]:7.0%}{alike:8.2f}")
trained_on, chosen, every, nothing = LOSS
assert abs(CURVE[chosen][0][1][0] - START) < 1e-5 < 0.05 < CURVE[every][0][1][0] - START
assert max(LOSS[chosen], LOSS[every]) < 0.7 * LOSS[trained_on]
assert LOSS[nothing] > 2 * LOSS[trained_on]
assert all(a[1][2] > b[1][2] for a, b in zip(CURVE[chosen], CURVE[chosen][1:], strict=False))
assert 0.5 < CURVE[chosen][-1][1][2] < 0.9

# %% [markdown]
# The upcycled model begins where the dense one stood and soon has room for what did not fit; the mixture from nothing has the
# room, but not the time to fill it. Experts grow apart from the first step and stay relatives to the end: the cosine falls
# slowly from 1. (In the papers: upcycled T5 and ViT pass their dense parents, and mixtures from nothing, at half of the cost
# of the parents' pretraining; Llama 3 gains 2 % of MMLU for less than 1 % of it.)
#
# The order of softmax and top k decides where training begins, and at this size nothing else: a model of one layer makes up
# for weights that are too small within some tens of steps, and which order is ahead then changes with the seed.
#
# ## Cutting instead of copying
#
# A gated layer is a sum over its F neurons, so parts of them are experts whose sum is the layer. With all of them on and
# weights of 1 nothing has changed. (`router=hash` with 8 choices of 8 weighs each 1/8, `scaling=8` makes that 1.)

# %%
for method in ("random", "kmeans"):
    made = split(exact, experts=8, method=method)
    config = replace(made.config, ffn="moe:experts=8:top_k=8:width=8:router=hash:scaling=8:balance=0:z=0")
    together = LanguageModel(config).double()
    together.load_state_dict(made.state_dict(), strict=False)  # all but the router
    with torch.no_grad():
        apart = (together(inputs) - exact(inputs)).abs().max().item()
    print(f"{method:7} 8 experts of 8 neurons, all of them on: logits move by {apart:.1e}")
    assert apart < 1e-12

# %% [markdown]
# With two of eight on, six parts are missing. The weights of the two sum to 1, where in the whole layer each had 1: a scaling
# of k gives them that back, of n / k (the authors' choice) more, of n as much as there was in all.

# %%
CUT = {}
for method, scaling in (("random", 2), ("random", 4), ("random", 8), ("kmeans", 4)):
    model = split(dense, experts=8, top_k=2, method=method, scaling=scaling, seed=SEED)
    begins = MANY.judge(model)[0]
    learn(model, MANY, STEPS, seed=SEED + 200)
    CUT[method, scaling] = begins, MANY.judge(model)[0]
    print(f"{method:7} scaling {scaling}: loss {begins:.3f} right after the cut, {CUT[method, scaling][1]:.3f} at the end")
small = build_model(replace(dense.config, ffn="swiglu:width=16"), seed=SEED + 1)
learn(small, MANY, STEPS, seed=SEED + 200)
FRESH = MANY.judge(small)[0]
print(f"a dense model with the neurons of two experts, from nothing: {FRESH:.3f}")
assert START + 0.5 < CUT["random", 2][0] < CUT["random", 4][0] < CUT["random", 8][0]
assert CUT["random", 2][1] < CUT["random", 8][1] < FRESH - 0.8
assert CUT["random", 2][1] < START + 0.1  # a quarter of the neurons does what all did
assert abs(CUT["random", 4][1] - CUT["kmeans", 4][1]) < 0.3

# %% [markdown]
# The cut hurts and heals: in the steps given to it the mixture comes back to where the layer was, with a quarter of its
# neurons a token, far ahead of a dense model of that size from nothing. (In the paper, after 200 billion tokens, ahead of dense
# models of as many active parameters.) Right after it the weights as they were are best, not n / k, which later catches up or
# nearly so; and k-means is better than chance for some seeds and worse for others (the paper's best is chance).
#
# ## Growing first
#
# Copies of channels, heads and neurons make a dense model wider (`models/widen.py`). Divided by how many there are where they
# are read, they change nothing (FPI), for RMSNorm sees the same mean of squares. But then they are copies of which nothing will
# ever tell one from the other: there is no router. AKI takes the new rows from the next layer instead: not the same function
# any more, but no symmetry either. With grouped queries a new query head stays in the group whose keys it reads.

# %%
FEW = Facts(64, 32)
base = build_model(Config.of(**FIELDS | dict(depth=2), vocab_size=FEW.vocab_size, ffn="swiglu:width=32"), seed=SEED)
learn(base, FEW, 150, seed=SEED, falls=False)
inputs, targets = FEW.rows(torch.Generator().manual_seed(6))
exact, WIDE = deepcopy(base).double(), {}
for method in ("fpi", "aki"):
    for width in (128, 96):
        wide = grow(exact, width=width, method=method, seed=SEED)
        (wide(inputs, targets) / (targets >= 0).sum()).backward()
        gradient, n = wide.stack[1].layer.up.weight.grad, 32
        heads = [f"{layer.heads} heads of {layer.kv_heads}" for layer in (exact.stack[0].layer, wide.stack[0].layer)]
        apart = (wide(inputs) - exact(inputs)).abs().max().item()
        WIDE[method, width] = FEW.judge(wide)[0]
        if width == 128:  # neuron 32 + i is neuron i once more
            twins = ((gradient[:n] - gradient[n:]).norm() / gradient.norm()).item()
            assert (twins < 1e-12) == (method == "fpi") and (twins > 0.1) == (method == "aki")
        told = f"; gradients of twins differ by {twins:.0e} of their length" if width == 128 else ""
        print(f"{method}, {' -> '.join(heads)}: logits move by {apart:.0e}, loss {WIDE[method, width]:.3f}{told}")
        assert (apart < 1e-12) == (method == "fpi")

# %% [markdown]
# Depth: every layer twice, next to its original (interpolation, as in AquilaMoE) or the whole stack twice. Against a fresh
# model of the same size, after 40 steps:

# %%
grown = {order: grow(base, depth=4, order=order) for order in ("interpolate", "stack")}
grown["from nothing"] = build_model(grown["stack"].config, seed=SEED + 1)
DEEP = {}
for name, model in grown.items():
    begins = FEW.judge(model)[0]
    learn(model, FEW, 40, seed=SEED + 200)
    DEEP[name] = begins, FEW.judge(model)[0]
    print(f"{name:12} loss {begins:.3f} at step 0, {DEEP[name][1]:.3f} after 40 (two layers: {FEW.judge(base)[0]:.3f})")
for order in ("interpolate", "stack"):
    assert FEW.judge(base)[0] < DEEP[order][0] < DEEP["from nothing"][0]
    assert DEEP[order][1] < 0.5 * DEEP["from nothing"][1]
assert DEEP["stack"][0] < DEEP["interpolate"][0] - 0.1 and abs(DEEP["stack"][1] - DEEP["interpolate"][1]) < 0.3

# %% [markdown]
# Both are far ahead of a model that begins with nothing. That interpolation is the better of the two, as AquilaMoE has it, does
# not show with two layers, which have little in common: stacking begins lower here, and is still a little ahead after 40 steps.
# Nor does it show that AKI gains: it begins far above FPI, and what its paper reports, 45 % less pretraining, comes over many
# more steps than can be had here.

# %%
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
for name, curve in CURVE.items():
    axes[0].plot([step * COST[name] / COST[chosen] for step, _ in curve], [seen[0] for _, seen in curve], "o-", label=name)
axes[0].set(xlabel="FLOPs (in steps of the mixture)", ylabel="loss", title="at equal cost", ylim=(0, 7))
axes[0].legend()
for name in (chosen, every, nothing):
    axes[1].plot([step for step, _ in CURVE[name]], [seen[2] for _, seen in CURVE[name]], "o-", label=name)
axes[1].set(xlabel="step", ylabel="mean cosine between experts", title="experts grow apart", ylim=(-0.05, 1.05))
axes[1].legend()
names = [f"{method}\ns = {scaling}" for method, scaling in CUT]
axes[2].bar(names, [begins for begins, _ in CUT.values()], color="lightgray", label="right after the cut")
axes[2].bar(names, [end for _, end in CUT.values()], label=f"after {STEPS} steps")
axes[2].axhline(START, color="k", ls=":", label="before it")
axes[2].set(ylabel="loss", title="two of eight parts", ylim=(0, 5))
axes[2].legend()
lectern.save_figure(figure, "25_experts_from_a_dense_model")
