# %% [markdown]
# # Norms and depth: what a LayerNorm does, what depth does to it, and how to be rid of it
#
# Every sublayer of a transformer reads a residual stream through a norm. LayerNorm (Ba, Kiros and Hinton 2016,
# arXiv:1607.06450) takes the mean of a token's numbers away and divides by their spread. Is the mean needed? What becomes
# of the stream when many layers add to it? Why norm a token and not a batch? And does a trained model still need its norms?
#
# B rows of a batch, T bytes of a row, C width of the stream, L layers. Losses are nats a byte of text kept back.

# %%
import copy

import lectern
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from data import Loader, load, load_tokenizer, windows
from models import Config, LanguageModel, build_model
from models.convert_norm import convert
from models.fold_norm import fold
from models.probe import layer_effects
from models.recast import norms_of
from models.remove_norms import removal_order, remove_next, std_penalty, with_fake_norms
from models.residual import PLACES, Residual
from nn.norm import LayerNorm, RMSNorm
from train import build_optimizer

torch.set_num_threads(1)
SEED, T = 0, 64
tokenizer = load_tokenizer("byte")
training, validation = load("python", tokenizer)
held = list(windows(validation, batch_size=64, seq_len=T, limit=4 * 64 * T))
tokens, targets, _ = held[0]
ADAMW = dict(optimizer="adamw:lr=0.004", rest_optimizer="adamw:lr=0.006", embedding_lr=0.03)
GENTLE = dict(optimizer="adamw:lr=0.002", rest_optimizer="adamw:lr=0.003", embedding_lr=0.015)


def network(stack: str = "(gqa:qk_norm=unit mlp)*2", dim: int = 64, **options) -> LanguageModel:
    shape = dict(stack=stack, dim=dim, heads=2, position="rope", seq_len=T, vocab_size=tokenizer.vocab_size)
    return build_model(Config.of(**shape, **options), seed=SEED)


@torch.no_grad()
def judge(model: LanguageModel) -> float:
    model.eval()
    return sum(model(inputs, wanted).item() / wanted.numel() for inputs, wanted, _ in held) / len(held)


def learn(model: LanguageModel, steps: int, rates: dict, *, text: int = 0, penalty: float = 0.0, gap: int = 0) -> list[float]:
    """Train on 8 rows a step, at rates that fall to zero. With a gap a norm is removed every so many steps. The losses."""
    model.train()
    optimizer, loader = build_optimizer(Config.of(**rates), model), Loader(training, batch_size=8, seq_len=T, seed=SEED + text)
    losses = []
    for step, (inputs, wanted, _) in zip(range(steps), loader, strict=False):
        if gap and step and step % gap == 0:
            remove_next(model)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1, (step + 1) / 10) * (1 - step / steps)
        with std_penalty(model) if penalty else torch.enable_grad() as unequal:
            loss = model(inputs, wanted) / wanted.numel()
        (loss + penalty * unequal() if penalty else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# %% [markdown]
# ## The mean is not needed
#
# RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) only divides by the root mean square: LayerNorm(x) = RMSNorm(x - mean(x))
# at the same eps. In a *pre-LN* model, where nothing reads the stream but norms, the mean of the stream is never seen. Let
# nothing write one: centre the embedding and every output matrix, W <- (I - 11^T / C) W, once. Then the two norms are the
# same (Jiang, Gu, Zhu and Pan 2023, arXiv:2305.14858). Of C numbers that sum to zero the last can go: their **CRMSNorm**.

# %%
generator = torch.Generator().manual_seed(SEED)
x = 3 + 2 * torch.randn(10, 64, dtype=torch.float64, generator=generator)
layer_norm, rms_norm = (norm(64, eps=1e-5).double() for norm in (LayerNorm, RMSNorm))
assert torch.allclose(layer_norm(x), rms_norm(x - x.mean(-1, keepdim=True)), rtol=0, atol=1e-14)
base = network(norm="layernorm")
learn(base, 130, ADAMW)
LOSSES, exact = {"layernorm": judge(base)}, copy.deepcopy(base).double()
print(f"a trained pre-LN model of width 64: loss {LOSSES['layernorm']:.3f}, logits of spread {exact(tokens).std():.2f}")
for to in ("rmsnorm", "crmsnorm"):
    made = convert(exact, to)
    difference = (made(tokens) - exact(tokens)).abs().max().item()
    print(f"  as {made.config.norm.split(':')[0]:9} width {made.config.dim}: largest difference of a logit {difference:.1e}")
    assert difference < 1e-11
assert convert(network(norm="layernorm:bias=false"), "crmsnorm").config.dim == 63

# %% [markdown]
# (Biases need a constant to multiply, in place of the coordinate saved.) The paper's gain is time, 1% to 10%.
#
# ## Depth: the stream grows
#
# In pre-LN a sublayer adds f(norm(x)), however large x is. If each f makes unit variance of unit variance, independent of x,
# the variance after L sublayers is 1 + L, and the later a layer, the smaller its part. By *The Curse of Depth* (Sun et al.
# 2025, arXiv:2502.05795) that is why deep layers of large models can be left out almost without loss. **LayerNorm Scaling**
# divides the norm's output in layer l by sqrt(l); it is 1 + 1 + 1/2 + … + 1/L then. Random matrices as sublayers show it:


# %%
class Unit(nn.Module):  # a new random matrix each time, which keeps the variance
    def forward(self, x: Tensor, context: object) -> Tensor:
        return x @ torch.randn(256, 256, generator=generator) / 256**0.5


linear, harmonic = [1 + n for n in range(1, 65)], [1 + sum(1 / k for k in range(1, n + 1)) for n in range(1, 65)]
EXPECTED = dict(pre=linear, scaled=harmonic, sandwich=linear, output=linear, post=[1] * 64, deepnorm=[1] * 64)
depths = "".join(f"{depth:9}" for depth in (1, 4, 16, 64))
print(f"\nvariance of the stream after L random unit sublayers\nL =      {depths}  64 by formula")
with torch.no_grad():
    for place in PLACES:
        x, found = torch.randn(64, 256, generator=generator), []
        for number in range(1, 65):
            x = Residual(Unit(), 256, norm="layernorm", place=place, number=number, sublayers=64)(x, None)
            found.append(x.var().item())
        print(f"{place:9}" + "".join(f"{found[i]:9.2f}" for i in (0, 3, 15, 63)) + f"{EXPECTED[place][-1]:15.2f}")
        assert all(abs(v / wanted - 1) < 0.15 for v, wanted in zip(found, EXPECTED[place], strict=True))

# %% [markdown]
# Now train: 16 thin layers, each attention and an MLP side by side, with output matrices that are random and of unit gain,
# not made small as is usual (the paper drops that, too). Beside them DeepNorm (Wang et al. 2022, arXiv:2203.00555), which
# norms the sum, x <- norm(a x + f(x)) with a = n^(1/4), and has its own initialisation. `layer_effects` tells of each
# layer what it costs to skip it, by which angle (in units of pi) it turns the stream, and the variance behind it.

# %%
MUON = dict(optimizer="muon:lr=0.01", rest_optimizer="adamw:lr=0.004", embedding_lr=0.02)
effects, means = {}, {}
for place in ("pre", "scaled", "deepnorm"):
    options = dict(norm="layernorm", norm_place=place, init="deepnorm" if place == "deepnorm" else "fan_in")
    model = network("gqa+mlp:width=96*16", dim=48, **options)
    for module in model.modules():
        if getattr(module, "writes_residual", False) and place != "deepnorm":
            nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=generator)
    learn(model, 90, MUON)
    LOSSES[place], effects[place] = judge(model), layer_effects(model, tokens, targets)
print("\n16 layers   loss   variance after layer    cost of skipping a layer (mnats)    angle it turns by")
print(f"{'':19}{'1':>6}{'8':>7}{'16':>7}{'first':>11}{'2 to 8':>9}{'9 to 16':>9}{'2 to 8':>15}{'9 to 16':>9}")
for place, rows in effects.items():
    for what in ("skipped", "angle"):
        means[place, what] = [sum(row[what] for row in part) / len(part) for part in (rows[:1], rows[1:8], rows[8:])]
    variance = "".join(f"{rows[i]['variance']:7.2f}" for i in (0, 7, 15))
    skips = "".join(f"{1e3 * skip:9.1f}" for skip in means[place, "skipped"])
    print(f"{place:9}{LOSSES[place]:8.3f} {variance}  {skips}      " + "".join(f"{a:9.4f}" for a in means[place, "angle"][1:]))
growth = {place: rows[-1]["variance"] / rows[0]["variance"] for place, rows in effects.items()}
assert growth["pre"] > 3 * growth["scaled"] and growth["scaled"] > 1.5 * growth["deepnorm"]
assert means["pre", "angle"][2] < 0.7 * means["pre", "angle"][1]  # deeper layers turn the stream less …
assert means["scaled", "angle"][2] < 0.7 * means["pre", "angle"][2]  # … and with scaling less still
assert LOSSES["deepnorm"] < min(LOSSES["pre"], LOSSES["scaled"]) - 0.05

# %% [markdown]
# The variance does as it should in training too: it grows 17 times over the layers, with scaling 3 to 4 times. Under pre-LN
# deep layers turn the stream half as much as earlier ones. The rest of the claim does not show here. With scaling deep
# layers do *less*: they turn the stream less still, and skipping one costs less still. Over three seeds scaling won 0.01,
# 0.12 and 0.08 nats in 90 steps; after 110 steps it was behind by 0.005 on one of two. No layer but the first of these two
# is worth much after so few steps. DeepNorm, with its own initialisation, is 0.17 to 0.29 ahead; its deeper half costs more.
#
# ## Statistics of the batch see the future
#
# Networks for images norm each *feature* over the batch. Once training is over, the division is by a constant, which folds
# into the next matrix. **PowerNorm** (Shen et al. 2020, arXiv:2003.07845) divides by a running root mean square, with a
# running statistic for the gradient too, after a warm-up with the batch's own. **UnifiedNorm** (Yang et al. 2022,
# arXiv:2208.01313) takes the geometric mean of the last four batches'. But a statistic over batch and time contains the
# *later* tokens. Change the second half of each row and look at the logits of the first: a causal model's may not move.

# %%
trained, WARM = {"layernorm": base}, "powernorm:warmup=20"
for norm in ("none", "rmsnorm", WARM, "powernorm:warmup=0"):
    trained[norm] = network(norm=norm)
    learn(trained[norm], 130, ADAMW)
    LOSSES[norm] = judge(trained[norm])
warming, unified = copy.deepcopy(trained[WARM]), network(norm="unifiednorm:warmup=0")
unified.load_state_dict(trained[WARM].state_dict(), strict=False)
for norm in [*norms_of(warming), *norms_of(unified)]:
    norm.steps.zero_()
for inputs, _, _ in held:  # UnifiedNorm's window of 4 batches
    unified.train()(inputs)
changed = torch.cat([tokens[:, : T // 2], held[1].inputs[:, T // 2 :]], 1)


def leak(model: LanguageModel, training: bool) -> float:
    """The largest change of a logit in the first half of the rows when only the second half changes."""
    first, second = (copy.deepcopy(model).train(training)(ids)[:, : T // 2] for ids in (tokens, changed))
    return (first - second).abs().max().item()


models = {"layernorm": base, "powernorm, warm-up": warming, "powernorm, later": trained[WARM], "unifiednorm": unified}
LEAKS = {name: (leak(model, True), leak(model, False)) for name, model in models.items()}
print("\nchange of earlier logits   training   evaluation")
for name, leaks in LEAKS.items():
    print(f"  {name:22}{leaks[0]:11.1e}{leaks[1]:13.1e}")
    assert leaks[1] < 1e-4
assert LEAKS["powernorm, warm-up"][0] > 0.03 and LEAKS["unifiednorm"][0] > 0.01
assert LEAKS["layernorm"][0] < 1e-4 and LEAKS["powernorm, later"][0] < 1e-4
print("\ntwo layers, 130 steps:", ", ".join(f"{norm} {LOSSES[norm]:.3f}" for norm in trained))
assert max(LOSSES["none"], LOSSES["powernorm:warmup=0"]) < LOSSES["layernorm"] - 0.03
assert LOSSES[WARM] > LOSSES["powernorm:warmup=0"] + 0.05
power = copy.deepcopy(trained[WARM]).double().eval()
folded = fold(power)
difference = (folded(tokens) - power(tokens)).abs().max().item()
print(f"powernorm folded: norm {folded.config.norm}, width {folded.config.dim}, largest difference of a logit {difference:.1e}")
assert difference < 1e-11 and folded.config.norm == "none"

# %% [markdown]
# After its warm-up PowerNorm leaks nothing: its statistic is that of the steps before. UnifiedNorm leaks in every step:
# compare losses in evaluation mode. 20 steps of warm-up harm here: without it PowerNorm is 0.13 to 0.28 nats better on three
# seeds, and ahead of LayerNorm by 0.07 to 0.17, as in the paper. But *no norm at all* is best on all three: two layers with
# queries and keys normed, embeddings of variance 1 and outputs that begin at zero need none. Large models may differ.
#
# ## Taking the norms out of a trained model
#
# LayerNorm would be linear if its spread were a constant: y = (x - mean(x)) / sigma * gain + bias. Put the mean spread in the
# place of each token's own, **one norm at a time, with training in between**, MLPs' first, the final one last, and GPT-2 XL
# does without any for +0.03 nats (Baroni et al. 2025, arXiv:2507.02559). A penalty keeps the spread before the final norm
# alike for all tokens. Against it: all of them at once; and the same training with none removed.

# %%
STEPS, names = 100, removal_order(base)
gap, curves, FINAL = STEPS // (len(names) + 1), {}, {}
fake = with_fake_norms(base)
assert torch.allclose(fake.eval()(tokens), base.eval()(tokens), atol=1e-5)  # a FakeNorm begins as the LayerNorm it was
fake.train()(tokens)  # it sees the mean spreads
while remove_next(fake):
    pass
broken = judge(fake)
print(f"\nbefore: {LOSSES['layernorm']:.3f}; all at once, before training on: {broken:.3f}; the order: {', '.join(names)}")
for name in ("none removed", "all at once", "one by one", "one by one, penalty"):
    model, slowly = fake if name == "all at once" else with_fake_norms(base), name.startswith("one")
    curves[name] = Tensor(learn(model, STEPS, GENTLE, text=1, penalty=0.1 * name.endswith("penalty"), gap=slowly * gap))
    FINAL[name], left = judge(model), sum(not norm.removed for norm in norms_of(model))
    more = [part.mean() for part in (curves[name] - curves["none removed"]).split(len(names) * gap)]
    print(f"  {name:20} norms left {left}: loss {FINAL[name]:.3f}; training {more[0]:+.3f} up to step 80, {more[1]:+.3f} after")
    assert left == (len(names) if name == "none removed" else 0)
assert 0.05 < broken - LOSSES["layernorm"] < 0.25 and more[0] < 0.02 < more[1]
assert FINAL["none removed"] < FINAL["all at once"] < FINAL["one by one"] < FINAL["none removed"] + 0.1
assert FINAL["none removed"] < FINAL["one by one, penalty"] < FINAL["one by one"]

# %% [markdown]
# Without norms the model is 0.05 nats behind the same training with them, with the penalty 0.03: on three seeds it helped.
# Most of that is the final norm's, which goes 20 steps before the end, when rates are small. That all at once should break a
# model does not show: it costs 0.08 to 0.11 at first, has 100 steps to mend, and ends 0.02 better than one by one.
#
# What it is for: with no norm left, the logits are exactly a *sum* of what each part has written; with LayerNorm they are not.


# %%
@torch.no_grad()
def parts(model: LanguageModel) -> list[Tensor]:
    """What the embedding and each sublayer write, each through the final norm and the head: (B, T, V) each."""
    written, places = [], [model.embedding, *(sublayer.layer for sublayer in model.stack)]
    hooks = [place.register_forward_hook(lambda module, inputs, y: written.append(y)) for place in places]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return [model.head(model.final_norm(y)) for y in written]


free = fold(model.double().eval())  # the last one, trained with the penalty
pieces = parts(free)
error = (sum(pieces) - free(tokens)).abs().max().item()
with_norms = (sum(parts(exact)) - exact(tokens)).abs().max().item()
print(f"\nlogits less the sum of contributions: {error:.1e} without norms, {with_norms:.1e} with LayerNorm")
assert error < 1e-11 and with_norms > 0.1 and (free(tokens) - model(tokens)).abs().max() < 1e-10
for name, piece in zip(["embedding", *free.specs], pieces, strict=True):
    print(f"  {name.split(':')[0]:12} writes logits of spread {(piece - piece.mean(-1, keepdim=True)).std():.2f}")

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for place, rows in effects.items():
    axes[0].semilogy(range(1, 17), [row["variance"] for row in rows], "o-", markersize=3, label=place)
axes[0].set(xlabel="layer", ylabel="variance of the stream", title="16 trained layers")
for name, losses in curves.items():
    axes[1].plot(range(9, STEPS), (losses - curves["none removed"]).unfold(0, 10, 1).mean(-1), label=name)
axes[1].set(xlabel="step of fine-tuning", ylabel="training loss above none removed", title="norms removed")
for axis in axes:
    axis.legend()
lectern.save_figure(figure, "09_norms_and_depth")
