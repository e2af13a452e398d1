# %% [markdown]
# # The ancestor: a network that reads, and a network that writes
#
# Before attention, a sentence was translated by two recurrent networks: one read it, word after word, into a state of fixed
# size; the other began with that state and wrote. Sutskever, Vinyals and Le 2014, "Sequence to Sequence Learning with Neural
# Networks" (arXiv:1409.3215), made it work, and found that one trick helped more than anything else: read the source
# backwards. Every question asked of Mamba today was asked of this model first: what fits into a state, and how does a
# gradient find its way through time?
#
# Letters: W cells, x_t what is read at time t.

# %%
import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from models.seq2seq import Seq2Seq, beam_search
from nn.recurrent import LSTMCells

torch.set_num_threads(1)
rng = np.random.default_rng(0)

# %% [markdown]
# ## A cell
#
# A cell c is kept by a forget gate f, written to through an input gate i, and read through an output gate o. The gates see
# what was said the step before, which a state space layer does not allow itself, and so each step has to wait for the last.


# %%
def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def step(x: np.ndarray, h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One time of an LSTM with W (4, W, C), U (4, W, W) and b (4, W): what it says and its cells."""
    i, f, g, o = W @ x + U @ h + b
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


C, CELLS, T = 3, 4, 20
torch.manual_seed(0)
layer = LSTMCells(C, CELLS).double()
W, U = (linear.weight.detach().numpy().reshape(4, CELLS, -1) for linear in (layer.input, layer.recur))
b = layer.input.bias.detach().numpy().reshape(4, CELLS)
x, h, c = rng.standard_normal((T, C)), np.zeros(CELLS), np.zeros(CELLS)
said = []
for x_t in x:
    h, c = step(x_t, h, c)
    said.append(h)
by_layer, _ = layer(torch.from_numpy(x)[None], layer.init_state(1, dtype=torch.float64))
error = np.abs(by_layer[0].detach().numpy() - said).max()
print(f"the layer of nn/recurrent differs from {T} steps by hand by {error:.1e}")
assert by_layer.shape == (1, T, CELLS)
assert error < 1e-12
assert np.abs(said).max() < 1  # an output gate and a tanh: what is said has a bound, the cells have none

# %% [markdown]
# ## How far a gradient gets
#
# A cell whose forget gate stands at f passes f of its gradient on at each step: after k steps, f^k. That is why the bias of
# the forget gates begins at 1, and why the distance between a word and its translation matters.

# %%


def left(bias: float, steps: int) -> float:
    """Of the gradient of a cell, how much reaches it that many steps before, if its gates see no input and no output."""
    cells = LSTMCells(1, 1).double()
    with torch.no_grad():
        for parameter in cells.parameters():
            parameter.zero_()
        cells.input.bias[1] = bias  # of the forget gate
    state = cells.init_state(1, dtype=torch.float64)
    state.c.requires_grad_()
    _, last = cells(torch.zeros(1, steps, 1, dtype=torch.float64), state)
    return torch.autograd.grad(last.c.sum(), state.c)[0].item()


print("\nof a gradient is left    " + "".join(f"{k:>9} steps" for k in (5, 20, 50)))
for bias in (0.0, 1.0, 4.0):
    f, found = sigmoid(np.array(bias)), [left(bias, k) for k in (5, 20, 50)]
    print(f"  forget gate {f:5.2f}      " + "".join(f"{share:15.1e}" for share in found))
    assert np.allclose(found, f ** np.array([5, 20, 50]), rtol=1e-9)
assert left(0.0, 20) < 1e-5
assert left(4.0, 20) > 0.5

# %% [markdown]
# ## Translation of a toy language
#
# Ten words of ten; each has one translation; and of a pair of words, an "adjective" goes behind the other. To say the first
# word of the target the decoder needs the first two of the source. Read forwards, these lie ten steps back, and so does every
# other word from its translation; read backwards, the first ones were read last, and the distances are 1, 3, 5, …: their
# mean is the same, but some are short, and there learning begins.

# %%
BEGIN, END, WORDS, LENGTH = 0, 1, 10, 10
said_at = LENGTH + np.arange(LENGTH)
forwards, backwards = said_at - np.arange(LENGTH), said_at - np.arange(LENGTH)[::-1]
print(f"\nsteps from a word to its translation: forwards {forwards}, backwards {backwards}")
assert (forwards == LENGTH).all()
assert backwards.mean() == forwards.mean()
assert backwards.min() == 1
MEANING = rng.permutation(WORDS) + 2


def sentences(n: int, random: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sources (n, LENGTH), what the decoder has said before, and what it is to say, both (n, LENGTH + 1)."""
    source = random.integers(2, WORDS + 2, size=(n, LENGTH))
    pairs = source.reshape(n, -1, 2)
    pairs = np.where(pairs[..., :1] % 2 == 0, pairs[..., ::-1], pairs)
    target = MEANING[pairs.reshape(n, -1) - 2]
    edge = np.ones((n, 1), np.int64)
    return tuple(map(torch.from_numpy, (source, np.hstack([BEGIN * edge, target]), np.hstack([target, END * edge]))))


STEPS, CURVES, MODELS = 700, {}, {}
for reverse in (True, False):
    torch.manual_seed(0)
    model = MODELS[reverse] = Seq2Seq(WORDS + 2, WORDS + 2, width=64, depth=1, reverse=reverse)
    random, losses = np.random.default_rng(1), []
    # the paper's plain gradient descent takes longer; its clipping of the norm at 5 is here too
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for done in range(STEPS):
        optimizer.param_groups[0]["lr"] = 0.005 * min(1, 2 * (1 - done / STEPS))
        source, before, target = sentences(64, random)
        loss = model(source, before, target) / target.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    CURVES[reverse] = np.convolve(losses, np.ones(20) / 20, "valid")

print(f"\nchance is {np.log(WORDS):.2f} nats a word")
for reverse, curve in CURVES.items():
    print(f"read {'backwards' if reverse else 'forwards':10} after {STEPS} steps {curve[-1]:.2f}")
assert CURVES[False][-1] < np.log(WORDS)
assert CURVES[True][-1] < 0.75 * CURVES[False][-1]

# %% [markdown]
# ## Searching for the likeliest sentence
#
# The likeliest next word is not always the beginning of the likeliest sentence. A beam goes on with the k likeliest
# beginnings; k = 1 is greedy. What it finds is scored by the same model, so its gain can be seen without a reference.

# %%
source, _, target = sentences(60, np.random.default_rng(2))
RIGHT, SCORES = {}, {}
for size in (1, 2, 12):
    best = [beam_search(MODELS[True], s, begin=BEGIN, end=END, size=size, max_len=LENGTH + 2) for s in source]
    RIGHT[size] = np.mean([bool(b) and b[0].words == t[:-1].tolist() for b, t in zip(best, target, strict=True)])
    SCORES[size] = np.mean([b[0].score for b in best if b])
    print(f"beam of {size:2}: log p {SCORES[size]:.3f} of what is found, {RIGHT[size]:.0%} of the sentences right")
assert SCORES[12] > SCORES[1]
assert RIGHT[12] >= RIGHT[1] - 0.05

# %% [markdown]
# All that the second network knows of the sentence went through one state. In 2014 that state had 8,000 numbers, and
# held sentences of up to 35 words; attention (Bahdanau et al. 2014, arXiv:1409.0473) let the decoder look back at the
# source instead, and ten years on, lecture 13 returns to the state, with gates that no longer wait for each other.

# %%
figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
for reverse, curve in CURVES.items():
    axis.plot(curve, label="read backwards" if reverse else "read forwards")
axis.axhline(np.log(WORDS), color="grey", linestyle=":", label="chance")
axis.set(xlabel="steps", ylabel="nats a word", title="the order in which a source is read")
axis.legend()
lectern.save_figure(figure, "19_the_ancestor")
