# %% [markdown]
# # What experts are worth
#
# A mixture of experts and a dense model may cost the same a token and yet differ in loss. By how much, in a unit that means
# something? Artetxe et al. 2021 ("Efficient Large Scale Language Modeling with Mixtures of Experts", arXiv:2112.10684) ask how
# much more compute a dense model needs for the same loss: about 4 times at modest budgets, less at larger ones, less on text
# of another kind. Clark et al. 2022 ("Unified Scaling Laws for Routed Language Models", arXiv:2202.01169) ask how large a dense
# model has the same loss, and find one law for three ways of routing.
#
# Letters: N parameters of a model without its experts, E experts, L loss, C compute of training. Logarithms to the base 10.

# %%
import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from lectures.routed import Chapters, law_of, routed_runs, show_laws
from models.laws.routed import PUBLISHED, fit
from models.laws.speedup import dense_compute, speedup
from models.stack import FFNS
from nn.context import Context
from nn.spec import build

torch.manual_seed(0)
torch.set_num_threads(1)

# %% [markdown]
# ## The speed-up factor
#
# Train dense models of a few sizes and join their losses over compute. A mixture that spent C and reached L stands somewhere
# left of that curve; the dense compute that the curve has at L, divided by C, is its speed-up. Nothing is extrapolated: a loss
# that no dense model of the ladder reached has no factor. A planted law: the mixture does with a quarter.

# %%
ladder = 1e12 * 2.0 ** np.arange(6)
curve = ladder, 30 * ladder**-0.08
for spent in (1e12, 4e12, 3e12):
    loss = 30 * (4 * spent) ** -0.08
    factor = speedup(loss, spent, *curve)
    print(f"loss {loss:.3f} for {spent:.0e} FLOPs; dense {dense_compute(loss, *curve):.2e}: {factor:.3f} times")
    assert abs(factor / 4 - 1) < (0.01 if spent == 3e12 else 1e-9)
try:
    speedup(1.0, 1e12, *curve)
    refused = False
except ValueError as error:
    refused = print(error) is None
assert refused

# %% [markdown]
# ## A square root for stability
#
# An expert sees a share of the tokens, and with E of them the stacked gradients of a layer are noisier. The paper divides those
# of experts by sqrt(E): `expert_gradients=sqrt`. Output and other gradients stay as they are. Adam and Muon divide lengths away
# again; what feels it is a bound on the norm of all gradients (`--clip`), and plain SGD.

# %%
grads = {}
for spelled in ("sum", "sqrt"):
    torch.manual_seed(0)
    moe = build(f"moe:experts=16:width=24:expert_gradients={spelled}", FFNS, "ffn", 16)
    x = torch.randn(1, 64, 16)
    moe(x, Context(torch.zeros(1, 64, dtype=torch.int64), torch.arange(64))).square().sum().backward()
    grads[spelled] = {name: parameter.grad.norm().item() for name, parameter in moe.named_parameters()}
print(f"{'':>20} {'sum':>8} {'sqrt':>8}")
for name in grads["sum"]:
    print(f"{name:>20} {grads['sum'][name]:>8.3f} {grads['sqrt'][name]:>8.3f}")
    ratio = grads["sqrt"][name] / grads["sum"][name]
    assert abs(ratio - (0.25 if name.startswith("experts.") else 1.0)) < 1e-5

# %% [markdown]
# ## One law for sizes and experts
#
#     log L(N, E) = a log N + b log Ê + c log N log Ê + d
#
# a: larger models are better; b: so are more experts; c > 0: but the one helps less where there is much of the other. Ê is E
# that begins at E_start and saturates at E_max, for nobody is better with infinitely many experts. Set to the loss of a dense
# model, the law gives the size that a mixture is worth, N̄, on which all mixtures lie on one line; and the size N = 10^(-b/c)
# from which on experts bring nothing. With the constants of the paper, for three routers: balanced assignment, a policy that
# learns by reward, a fixed table.

# %%
print(f"{'router':>9} {'5M x 128':>9} {'1B x 64':>9} {'30B x 64':>9} {'cut-off':>9}")
for router, law in PUBLISHED.items():
    worth = [float(law.effective(size, many)) for size, many in ((5e6, 128), (1e9, 64), (3e10, 64))]
    print(f"{router:>9} " + " ".join(f"{n:>9.2g}" for n in worth) + f" {law.cutoff:>9.2g}")
    assert abs(law.saturated(1) - law.start) < 1e-9 and abs(law.saturated(np.inf) - law.most) < 1e-9
    assert np.isclose(law.loss(worth[0], 1), law.loss(5e6, 128)) and np.isclose(law.effective(5e6, 1), 5e6)
    assert law.gain(1e8) > law.gain(1e9) > 0 and np.isclose(law.gain(law.cutoff), 0)
assert 50e6 < PUBLISHED["sinkhorn"].effective(5e6, 128) < 60e6  # the paper: about 55M

# %% [markdown]
# The constants are rounded, and 10^(-b/c) feels each digit of c: the paper has 937, 85 and 83 billion for the cut-offs. A fit
# finds constants that were planted, and how well it does on few experts is worth knowing before one believes it.

# %%
grid = np.array([(n, e) for n in (2e7, 1e8, 5e8, 2e9) for e in 2.0 ** np.arange(9)]).T
planted = PUBLISHED["sinkhorn"]
found = fit(*grid, planted.loss(*grid))
noisy = fit(*grid, planted.loss(*grid) * np.exp(0.002 * np.random.default_rng(0).normal(size=grid.shape[1])))
for name, law in (("planted", planted), ("found", found), ("in noise of 0.2 %", noisy)):
    print(f"{name:>18}: a {law.a:.4f}  b {law.b:.4f}  c {law.c:.4f}  d {law.d:.3f}  from {law.start:.2f} to {law.most:.0f}")
assert abs(found.b - planted.b) < 1e-6 and abs(found.most / planted.most - 1) < 1e-3
assert abs(noisy.b - planted.b) < 0.05

# %% [markdown]
# ## A book of chapters
#
# Each of 16 chapters has a table of its own of which word follows which: 65,536 chances, more than small models can store. One
# layer, one expert a token, so that a mixture costs what the dense model does. Three sizes, up to eight experts.

# %%
book, dims, steps = Chapters(), [12, 24, 48], 110
points = routed_runs(book, dims, [1, 2, 8], ("sinkhorn", "hash"), steps=steps)
points += routed_runs(book, dims[::2], [1, 8], ("rl",), steps=steps)
laws = show_laws(points)
loss = {(point.router, point.size, point.experts): point.loss for point in points}
N = sorted({point.size for point in points})
for router in ("sinkhorn", "hash"):
    assert all(loss[router, size, 8] < loss[router, size, 1] - 0.02 for size in N[1:])  # experts are worth something …
    assert laws[router].a < 0 and laws[router].gain(N[-1]) > 0
assert loss["hash", N[-1], 8] < loss["sinkhorn", N[-1], 8]  # … and here a table of words is worth most

# %% [markdown]
# What the paper has and this has not: there balanced assignment is the best router, and gains shrink with size, c > 0. Here the
# word itself says which row of a table to read, so that a fixed table of words is a good router from the first step, and the
# policy, paid by noisy rewards, has not learned to choose after a hundred. And the smallest models, trained this briefly, have
# not yet filled what they have, so that gains grow with size: c < 0, and no cut-off. (The policy's four runs give its four
# constants exactly, which says nothing.) `nn/moe/RESULTS.md` has longer runs.

# %%
for router in ("sinkhorn", "hash"):
    law, off, alone = law_of([point for point in points if point.router == router])
    print(f"{router}: c = {law.c:+.4f}; log L is {off:.4f} off the law, {alone:.4f} off a line in log N")
    assert off < 0.7 * alone and law.c < 0  # losses are nearer to one axis
assert loss["rl", N[-1], 8] > loss["sinkhorn", N[-1], 8]

# %% [markdown]
# Speed-up factors of the same runs. The larger mixtures leave the dense curve behind: they have no factor, and none is made up.

# %%
dense = sorted((point for point in points if (point.router, point.experts) == ("sinkhorn", 1)), key=lambda point: point.size)
curve = [point.flops for point in dense], [point.loss for point in dense]
factors = {}
for point in points:
    if point.experts == 8 and curve[1][-1] <= point.loss <= curve[1][0]:
        factors[point.router, point.size] = speedup(point.loss, point.flops, *curve)
        print(f"{point.router:>9}, N {point.size:>6,}, {point.experts} experts: {factors[point.router, point.size]:.2f}")
    elif point.experts == 8:
        print(f"{point.router:>9}, N {point.size:>6,}, {point.experts} experts: {point.loss:.3f} is off the dense curve")
assert factors["hash", N[1]] > factors["sinkhorn", N[1]] > 1.1

# %% [markdown]
# ## On text, at home and abroad
#
# `python -m lectures.twins` trains pairs on Python's library, eight experts and two a token, and asks both about C++ headers
# too. Its table is in `nn/moe/RESULTS.md`: at home small mixtures win by two percent and larger ones, after as many steps, by
# nothing; abroad the small ones win by less, hardly more than chance; and after both twins have learned a little C++ the larger
# pairs are equal. In the paper, too, the factor shrinks with size and out of domain, and fine-tuning is the exception.

# %%
figure, axes = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
axes[0].plot(*curve, "k.-", label="dense")
for router, marker in (("sinkhorn", "s"), ("hash", "o"), ("rl", "x")):
    mixtures = [point for point in points if (point.router, point.experts) == (router, 8)]
    axes[0].plot([p.flops for p in mixtures], [p.loss for p in mixtures], marker + ":", label=f"8 experts, {router}")
axes[0].set(xscale="log", xlabel="FLOPs of training a word", ylabel="nats a word", title="the factor is a way to the right")
axes[0].legend()
for router, marker in (("sinkhorn", "s"), ("hash", "o")):
    runs = [point for point in points if point.router == router]
    worth = [laws[router].effective(p.size, p.experts) for p in runs]
    axes[1].scatter(worth, [p.loss for p in runs], c=np.log2([p.experts for p in runs]), marker=marker, label=router)
axes[1].set(xscale="log", yscale="log", xlabel="effective parameters", ylabel="nats a word", title="here: one line a router")
axes[1].legend()
sizes = np.geomspace(5e6, 1e12)
for router, law in PUBLISHED.items():
    axes[2].plot(sizes, law.effective(sizes, 64) / sizes, label=router)
axes[2].axhline(1, color="0.7")
axes[2].set(xscale="log", yscale="log", xlabel="N", ylabel="effective / N", title="64 experts, with the paper's constants")
axes[2].legend()
lectern.save_figure(figure, "29_what_experts_are_worth")
