# %% [markdown]
# # From attention to a state space: distilling a trained Transformer
#
# A Transformer keeps every key and value it has seen; a state space keeps one matrix. Training the second from nothing costs
# what the first has cost. Bick et al. 2024, "Transformers to SSMs" (arXiv:2408.10189), **MOHAWK**, make the second of the
# first: both are a matrix that mixes tokens, with embeddings, norms and MLPs around it that can stay as they are. Bick et al.
# 2025, "Llamba" (arXiv:2502.14458), do so to Llama 3 of up to 8B parameters, with less than 0.1 % of its training tokens.
#
# Letters: T tokens, H heads of D numbers, M a matrix (T, T) a head.

# %%
import copy

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from data import Loader, load, load_tokenizer, windows
from models import Config, LanguageModel, build_model
from models.distill import Distillation, matrix_of, pairs, read
from models.learn_only import learn_only
from models.linearize import linearize, unmatched
from train import build_optimizer

torch.set_num_threads(1)
SEED, T, ROWS = 0, 64, 8
tokenizer = load_tokenizer("byte")
training, validation = load("python", tokenizer)
held = list(windows(validation, batch_size=64, seq_len=T, limit=2 * 64 * T))
tokens, targets, _ = held[0]

# %% [markdown]
# ## Two ways to make a matrix
#
# Attention: M_ts = softmax over s <= t of q_t . k_s. The recurrence S_t = a_t S_{t-1} + B_t X_t^T, y_t = S_t^T C_t, written
# out, is y_t = sum over s <= t of (C_t . B_s) a_{s+1} … a_t X_s: a matrix too. C plays the query, B the key, X the value;
# instead of a softmax there is a decay. By hand, with four tokens and D = 2:

# %%
rng = np.random.default_rng(0)
C, B, X = rng.standard_normal((3, 4, 2))
a = 1 / (1 + np.exp(rng.standard_normal(4)))  # exp(-softplus(x)): the decay is read from the token, there is no step size
M = np.array([[C[t] @ B[s] * a[s + 1 : t + 1].prod() if s <= t else 0 for s in range(4)] for t in range(4)])
S, y = np.zeros((2, 2)), []
for t in range(4):
    S = a[t] * S + np.outer(B[t], X[t])
    y.append(S.T @ C[t])
print("M of a state space\n", M.round(2), f"\nM X is the recurrence to {np.abs(M @ X - y).max():.0e}")
assert np.abs(M @ X - y).max() < 1e-14
scores = np.where(np.tri(4) > 0, np.exp(C @ B.T), 0)
print("and of attention, from the same numbers\n", (scores / scores.sum(1, keepdims=True)).round(2))

# %% [markdown]
# ## A teacher, and a student that has its weights
#
# Two layers of attention and MLP learn bytes of Python for 600 steps. `models/linearize.py` exchanges the attention for
# `discrete_mamba2` and copies what fits: all of the teacher. New are what makes the decay, a short convolution, a gate and a
# skip, which begin as a slow decay, the identity, 1 and 1.

# %%
RATES = dict(optimizer="adamw:lr=0.004", rest_optimizer="adamw:lr=0.006", embedding_lr=0.03)


def network(mixer: str) -> LanguageModel:
    shape = dict(dim=64, heads=4, position="rope", seq_len=T, vocab_size=tokenizer.vocab_size)
    return build_model(Config.of(stack=f"({mixer} mlp)*2", **shape), seed=SEED)


@torch.no_grad()
def judge(model: LanguageModel) -> float:
    """Nats a byte of text kept back."""
    return sum(model(inputs, wanted).item() / wanted.numel() for inputs, wanted, _ in held) / len(held)


def learn(model: LanguageModel, loss, steps: int, loader: Loader, curve: list | None = None) -> None:
    """`steps` steps on `loss(inputs, targets)`, at rates that fall to zero; the curve is judged every 15."""
    optimizer = build_optimizer(Config.of(**RATES), model)
    for step in range(steps):
        if curve is not None and step % 15 == 0:
            curve.append(judge(model))
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1, (step + 1) / 10) * (1 - step / steps)
        inputs, wanted, _ = next(loader)
        (loss(inputs, wanted) / wanted.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()


teacher = network("gqa")
learn(teacher, teacher, 600, Loader(training, batch_size=ROWS, seq_len=T, seed=SEED))
begun = linearize(teacher, "discrete_mamba2", seed=SEED)
new = unmatched(begun, teacher)
for name, tensor in teacher.state_dict().items():
    assert torch.equal(begun.state_dict()[name], tensor), name
TEACHER, BEGUN = judge(teacher), judge(begun)
print(f"{len(teacher.state_dict())} tensors copied, {len(new)} new: {', '.join(sorted({n.split('.', 3)[3] for n in new}))}")
print(f"the teacher: {TEACHER:.2f} nats a byte; the student with its weights: {BEGUN:.2f}; knowing nothing: {np.log(256):.2f}")
assert BEGUN > TEACHER + 1

# %% [markdown]
# ## Three stages
#
# 1. **matrices**: each layer reads what the teacher's layer reads, and min ||softmax(Q K^T) - M||_F a head;
# 2. **outputs**: likewise, but min ||y - y'||_2 of what the whole mixer gives;
# 3. **logits**: end to end, the cross-entropy to what the teacher says of the next token.
#
# In stages 1 and 2 only the mixers learn (`--only`), all layers at once, each by itself. All students see the same 150
# batches, 76,800 tokens, a quarter of what the teacher saw. One more learns from scratch: no teacher, random weights.

# %%
MATCH = {1: "matrices", 2: "outputs", 3: "logits"}
PLANS = {"{3}": {3: 150}, "{2, 3}": {2: 60, 3: 90}, "{1, 2, 3}": {1: 15, 2: 45, 3: 90}}
CURVES, STUDENTS, BETWEEN = {}, {}, {}


def loader() -> Loader:
    return Loader(training, batch_size=ROWS, seq_len=T, seed=SEED + 1)


for name, plan in PLANS.items():
    student, batches, curve = copy.deepcopy(begun), loader(), []
    for stage, steps in plan.items():
        student.requires_grad_()
        learn_only(student, "" if stage == 3 else "stack.0.layer.*,stack.2.layer.*")
        learn(student, Distillation(student, teacher, MATCH[stage]), steps, batches, curve)
        BETWEEN[name, stage] = copy.deepcopy(student)
    CURVES[name], STUDENTS[name] = [*curve, judge(student)], student
scratch, CURVES["from scratch"] = network("discrete_mamba2"), []
learn(scratch, scratch, 150, loader(), CURVES["from scratch"])
CURVES["from scratch"].append(judge(scratch))

print("nats a byte after so many tokens\n" + " " * 14 + "".join(f"{i * 15 * ROWS * T:8,}" for i in range(0, 11, 2)))
for name, curve in CURVES.items():
    print(f"{name:14}" + "".join(f"{value:8.2f}" for value in curve[::2]))
END = {name: curve[-1] for name, curve in CURVES.items()}
assert END["{3}"] < END["from scratch"] - 0.1
assert END["{2, 3}"] < END["{3}"] - 0.03
assert END["{1, 2, 3}"] < END["{3}"] - 0.03
assert END["{1, 2, 3}"] < END["from scratch"] - 0.3
assert END["{1, 2, 3}"] < TEACHER + 0.25  # within sight of the teacher

# %% [markdown]
# Copied weights and soft labels are worth much; to align the layers before the whole is worth as much again of what is left.
# Until the third stage the model as a whole is no better, often worse, than before: its layers have learned to read a
# teacher's activations, not each other's.
#
# Of the first stage the papers say that it makes the later ones reach further. At this size it cannot be told from nothing:
# over three seeds {1, 2, 3} ended between 0.03 below and 0.02 above {2, 3}. Does it do what it says, at least?

# %%


@torch.no_grad()
def distances(student: LanguageModel) -> tuple[float, float]:
    """On text kept back: of the matrices in Frobenius norm, of the outputs in share of their size."""
    matrix = Distillation(student, teacher, "matrices")(tokens, targets).item() / targets.numel()
    errors, context = [], student.context(tokens, None, None)
    for ours, _, x, y in read(student, teacher, tokens, None):
        errors.append(((ours(x, context) - y).norm() / y.norm()).item())
    return matrix, sum(errors) / len(errors)


SHOWN = {"as copied": begun, "after stage 1": BETWEEN["{1, 2, 3}", 1], "after 1, 2": BETWEEN["{1, 2, 3}", 2],
         "after 1, 2, 3": STUDENTS["{1, 2, 3}"], "after 2": BETWEEN["{2, 3}", 2], "after 3 alone": STUDENTS["{3}"]}  # fmt: skip
FAR = {name: distances(student) for name, student in SHOWN.items()}
for name, (matrix, output) in FAR.items():
    print(f"{name:14} ||A - M||_F {matrix:8.1f}   ||y - y'|| / ||y|| {output:6.2f}")
assert FAR["after stage 1"][0] < 0.7 * FAR["as copied"][0]
assert FAR["after 1, 2"][1] < 0.5 * FAR["as copied"][1]
assert FAR["after 2"][1] < FAR["after 3 alone"][1]

# %% [markdown]
# ## What it was done for
#
# To decode, the teacher holds 2 H D numbers a token and layer; the student H D^2 and the last inputs of its convolution.

# %%
student = STUDENTS["{1, 2, 3}"]
LENGTHS, BYTES = (64, 256, 1024, 4096, 16384), {}
for name, model in (("teacher", teacher), ("student", student)):
    BYTES[name] = [sum(s.layer.state_bytes(1, n, torch.float32) for s in model.stack if s.is_mixer) for n in LENGTHS]
    print(f"{name}: " + ", ".join(f"{size:,} bytes at {n:,}" for n, size in zip(LENGTHS, BYTES[name], strict=True)))
assert len({*BYTES["student"]}) == 1
assert BYTES["teacher"][-1] == 256 * BYTES["teacher"][0]
assert BYTES["student"][0] == model.init_state(1, 64).bytes()
with torch.no_grad():
    state, row = student.init_state(1, T), tokens[:1]
    steps = torch.cat([student(row[:, t : t + 1], state=state) for t in range(T)], 1)
    print(f"token by token the logits are those of the whole to {(steps - student(row)).abs().max():.0e}")
    assert (steps - student(row)).abs().max() < 1e-3

# %%
figure = plt.figure(figsize=(11, 6), layout="constrained")
above, below = figure.subfigures(2, 1)
curves, sizes = above.subplots(1, 2, width_ratios=(7, 5))
for name, curve in CURVES.items():
    curves.plot([i * 15 * ROWS * T / 1000 for i in range(len(curve))], curve, label=name)
curves.axhline(TEACHER, color="black", linestyle=":", label="the teacher")
curves.set(xlabel="thousand tokens", ylabel="nats a byte", ylim=(1.8, 6), title="equal tokens")
for name, found in BYTES.items():
    sizes.loglog(LENGTHS, found, "o-", label=name)
sizes.set(xlabel="tokens", ylabel="bytes of decoding state", title="what decoding holds")
[axes.legend(fontsize=7) for axes in (curves, sizes)]
with torch.no_grad():
    _, taught, x, _ = read(begun, teacher, tokens[:1], None)[0]
    context = begun.context(tokens[:1], None, None)
    layers = {"the teacher's first layer": taught}
    layers |= {name: pairs(SHOWN[name], teacher)[0][0] for name in ("as copied", "after stage 1", "after 1, 2, 3")}
    for axes, (name, layer) in zip(below.subplots(1, 4), layers.items(), strict=True):
        axes.imshow(matrix_of(layer, x, context)[0, 0, :32, :32], cmap="RdBu", vmin=-0.5, vmax=0.5)
        axes.set(title=name, xticks=[], yticks=[])
lectern.save_figure(figure, "15_from_attention_to_a_state_space")
