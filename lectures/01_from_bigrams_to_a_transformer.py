# %% [markdown]
# # From counting bigrams to a transformer
#
# A language model answers one question: given the text so far, how likely is each thing that could come next?
#
# We build answers from a table of counts to a small transformer, each better than the one before, and hold all of them
# against one text with one number. That text is Python's own standard library, which every machine has. The number is
# **bits per byte**.
#
# Letters: B rows of a batch, T bytes of a row, V size of the vocabulary, C width of a network.

# %%
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from lectern import save_figure
from torch import Tensor, nn

from data import Loader, load, load_tokenizer, windows
from models import Config, build_model
from models.generate import Sampler, generate
from models.machine import autocast, choose_dtype, tune_cpu
from models.score import bits_per_byte
from nn.attention.softmax import attend
from optim import AdamW, Combined, Muon, split_parameters

tune_cpu()
torch.manual_seed(0)
device = torch.device("cpu")
dtype = choose_dtype("auto", device)

# %% [markdown]
# ## The text
#
# One token is one byte here, so that nothing stands between us and the text. A 257th token marks the start of a
# document. (Lecture 02 joins bytes to larger tokens.)
#
# One file in ten is kept back. No model ever learns from it; every model is judged on it.

# %%
tokenizer = load_tokenizer("byte")
training, validation = load("python", tokenizer)
V, T = tokenizer.vocab_size, 128
text = np.asarray(training.ids).astype(np.int64)  # (9 million,)
batches = list(windows(validation, batch_size=64, seq_len=T, limit=65536))  # 512 windows, spread over the files kept back
print(f"{len(training):,} bytes to learn from, {sum(b.targets.numel() for b in batches):,} to be judged on\n")
print(tokenizer.decode(batches[2].inputs[0].tolist()))

# %% [markdown]
# ## One number: bits per byte
#
# A model gives each next token a probability. If the token that did come had probability p, the model *needs* -log2(p)
# bits for it: 1 bit at p = 1/2, 10 bits at p = 1/1024. That is how long its code is when an arithmetic coder writes the
# text down with the help of the model. To predict is to compress (Shannon 1948).
#
#     bits per byte = sum over the text of -log2 p(token | what stands before it)  /  number of bytes
#
# The mean of -log p is the **cross-entropy**. Training minimises it in nats (natural logarithm); a nat is 1/ln 2 = 1.44
# bits.
#
# A model, for us, is a function: from inputs and targets (B, T) to log p(target | the inputs up to there), in nats, (B,
# T). All of them see the same windows of 128 bytes, and nothing before a window.


# %%
def measure(model) -> float:
    """Bits per byte of a model on the text kept back."""
    nats, length = 0.0, 0
    for inputs, targets, _ in batches:
        counts = targets >= 0  # the very last window may be filled up
        nats -= model(inputs, targets.clamp_min(0))[counts].double().sum().item()
        length += tokenizer.token_bytes[targets[counts].numpy()].sum()  # a start of document is 0 bytes long
    return nats / math.log(2) / length


ladder = {}  # name -> (bits per byte, numbers that were learnt, seconds)


def climb(name: str, model, numbers: int = 0, seconds: float = 0.0) -> float:
    bits = measure(model)
    ladder[name] = bits, numbers, seconds
    print(f"{name:32} {bits:6.3f} bits per byte")
    return bits


# %% [markdown]
# ## Step 0: know nothing
#
# Every token has probability 1/257. That costs log2(257) = 8.006 bits: a byte a byte.

# %%
uniform = climb("uniform", lambda inputs, targets: torch.full(targets.shape, -math.log(V)))
assert math.isclose(uniform, math.log2(V), rel_tol=1e-3)

# %% [markdown]
# ## Step 1: count
#
# Some bytes are frequent: blanks, `e`, `t`. The best fixed guess is their share of the text. (Best in the sense of our
# number: of all distributions q, the cross-entropy -sum p log q is least at q = p, where it is the entropy of p.)

# %%
c1 = np.bincount(text, minlength=V)  # (V,)
p1 = (c1 + 1) / (c1 + 1).sum()
log_p1 = torch.tensor(np.log(p1))
unigram = climb("unigram counts", lambda inputs, targets: log_p1[targets], V)

other = np.roll(p1, 1)  # any other q is worse on the text that p was counted on
assert -(p1 * np.log(p1)).sum() < -(p1 * np.log(other)).sum()
assert unigram < uniform

# %% [markdown]
# ## Step 2: count pairs
#
# What comes next depends on what came before. A **bigram** model looks at one byte: after `(` another distribution than
# after a blank. Count how often b follows a, and divide:
#
#     p(b | a) = (N(ab) + k) / (N(a) + k V)
#
# The k is there because a pair that never occurred would have probability 0, and cost infinitely many bits the day it
# does.

# %%
c2 = np.bincount(text[:-1] * V + text[1:], minlength=V * V).reshape(V, V)  # (V, V): row = before, column = after


def add_k(k: float):
    table = torch.tensor(np.log((c2 + k) / (c2 + k).sum(1, keepdims=True)))
    return lambda inputs, targets: table[inputs, targets]


bigram = climb("bigram counts", add_k(0.1), V * V)
assert bigram < unigram

for a in "(.d":
    best = np.argsort(-c2[ord(a)])[:5]
    print(f"after {a!r}: " + ", ".join(f"{chr(b)!r} {c2[ord(a), b] / c2[ord(a)].sum():.0%}" for b in best))

# %% [markdown]
# ## Why counting runs out: sparsity
#
# So look at two bytes, or three, or six? The number of contexts is multiplied by 257 with each. The text is not. More
# and more of what comes was never seen before, and a table has nothing to say about what it never saw.
#
# `grams[n]` holds the distinct n-grams of the text, each packed into one 64-bit number, and how often each occurs. One
# more symbol, V, will stand for "before the window"; it never occurs in the text.

# %%
start, BASE, ORDER = time.perf_counter(), V + 1, 7


def pack(columns: list[np.ndarray]) -> np.ndarray:
    """n arrays of symbols, oldest first -> one array of n-grams as numbers."""
    packed = np.zeros_like(columns[0], dtype=np.uint64)
    for column in columns:
        packed = packed * np.uint64(BASE) + column.astype(np.uint64)
    return packed


def look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values of the wanted keys; 0 for those that are not there. keys are sorted."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


grams = {
    n: np.unique(pack([text[i : len(text) - n + 1 + i] for i in range(n)]), return_counts=True) for n in range(1, ORDER + 1)
}
counting = time.perf_counter() - start

rows = torch.cat([torch.cat([b.inputs[:, :1], b.targets], 1) for b in batches]).clamp_min(0).numpy()  # (512, T + 1)
unseen = {}
print(" n    possible n-grams   seen in training   new in the text kept back")
for n, (keys, counts) in grams.items():
    here = pack([rows[:, i : T + 2 - n + i] for i in range(n)])
    unseen[n] = (look_up(here, keys, counts) == 0).mean()
    print(f"{n:2} {V**n:19,} {len(keys):18,} {unseen[n]:20.2%}")
assert all(unseen[n] < unseen[n + 1] for n in range(1, ORDER)) and unseen[ORDER] > 0.1

# %% [markdown]
# ## Step 3: count triples, and fall back well
#
# The cure is to mix orders. Where the long context was seen, believe it; give away a little of each count, d = 0.75,
# and spread what was saved as the shorter context says (interpolated Kneser-Ney, Kneser and Ney 1995; Chen and Goodman
# 1998):
#
#     p(c | ab) = max(N(abc) - d, 0) / N(ab)  +  d kinds(ab) / N(ab) * p'(c | b)        kinds(ab): different c seen after ab
#
# The shorter p' has a fine point. It is asked only about what was *not* seen after the long context. So it should not
# count how often c follows b, but after how many *different* a the pair bc occurred: a pair from one fixed phrase says
# little.


# %%
def kneser_ney(order: int, d: float = 0.75):
    tables = []
    for n in range(1, order + 1):
        keys, counts = grams[n]
        if n < order:  # in how many different places: the (n+1)-grams without their first symbol
            keys, counts = np.unique(grams[n + 1][0] % np.uint64(BASE**n), return_counts=True)
        contexts, first = np.unique(keys // np.uint64(BASE), return_index=True)
        total = np.add.reduceat(counts, first)
        kinds = np.diff(np.append(first, len(keys)))
        tables.append((keys, counts, contexts, total, kinds))

    def log_p(inputs: Tensor, targets: Tensor) -> Tensor:
        past = np.pad(inputs.numpy(), [(0, 0), (order, 0)], constant_values=V)
        p = np.full(targets.shape, 1 / V)
        for n, (keys, counts, contexts, total, kinds) in enumerate(tables, 1):
            before = pack([past[:, order + 1 - i : order + 1 - i + T] for i in range(n - 1, 0, -1)] or [0 * targets.numpy()])
            count = look_up(before * np.uint64(BASE) + targets.numpy().astype(np.uint64), keys, counts)
            seen = look_up(before, contexts, total)
            rest = d * look_up(before, contexts, kinds)
            p = np.where(seen > 0, (np.maximum(count - d, 0) + rest * p) / np.maximum(seen, 1), p)
        return torch.tensor(np.log(p))

    return log_p


def kept(order: int) -> int:
    return sum(len(grams[n][0]) for n in range(1, order + 1))


trigram = climb("trigram counts, Kneser-Ney", kneser_ney(3), kept(3))
assert trigram < bigram

# Chances must sum to one: try every next byte after one window.
every = torch.arange(V)[:, None].expand(V, T)
total = kneser_ney(3)(batches[0].inputs[:1].expand(V, T), every).exp().sum(0)
assert torch.allclose(total, torch.ones_like(total))

# %% [markdown]
# ## Step 4: the bigram again, as a network
#
# Counting has no way to *share*: what it learns about `for i in` says nothing about `for j in`. A network can share,
# because it learns numbers from which tables are computed. First the simplest one, which shares nothing, to see that
# learning by gradient finds what counting finds.
#
# One matrix W (V, V). Row a holds the scores of what may follow a; softmax makes them probabilities:
#
#     p(b | a) = exp W[a, b] / sum over c of exp W[a, c]              loss = mean of -log p(b | a)
#     d loss / d W[a, b] = (N(a) p(b | a) - N(ab)) / N                 N: pairs in the text
#
# The gradient is zero exactly where p(b | a) = N(ab) / N(a). The count table *is* the best network of this kind.

# %%
pairs = torch.tensor(c2, dtype=torch.float64)
W = (pairs + 1e-9).log().requires_grad_()  # scores from counts
loss = -(pairs * W.log_softmax(1)).sum() / pairs.sum()
(gradient,) = torch.autograd.grad(loss, W)
print(f"largest gradient at the counts: {gradient.abs().max():.1e}")
assert gradient.abs().max() < 1e-9

# %% [markdown]
# Now the usual way: begin with zeros, take 4096 bytes, step against the gradient, repeat. Every network below is
# trained by this one loop on the same 300 batches in the same order. That is 1.2 million bytes; the counts have read
# all 9 million.
#
# Matrices inside a network are moved by Muon, everything else by AdamW, the learning rate falling to zero, as in
# train.py.

# %%
STEPS, ROWS = 300, 32


def learn(model: nn.Module, *, embedding_lr: float = 0.02) -> float:
    """Train a network (B, T) -> logits (B, T, V); the seconds it took."""
    hidden, head, embedding, vector = split_parameters(model)
    groups = [dict(params=head), dict(params=embedding, lr=embedding_lr), dict(params=vector)]
    rest = AdamW([g for g in groups if g["params"]], lr=0.004, betas=(0.8, 0.95), weight_decay=0.0)
    optimizer = Combined([Muon(hidden, lr=0.02), rest] if hidden else [rest])
    loader, start = Loader(training, batch_size=ROWS, seq_len=T, seed=0), time.perf_counter()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * min(1, (step + 1) / 10) * (1 - step / STEPS)
        inputs, targets, _ = next(loader)
        with autocast(device, dtype):
            logits = model(inputs)  # (B, T, V)
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - start


def climb_network(name: str, model: nn.Module, **options) -> float:
    seconds = learn(model, **options)

    @torch.no_grad()
    def log_p(inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(device, dtype):
            logits = model(inputs)
        return logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]

    return climb(name, log_p, sum(p.numel() for p in model.parameters()), seconds)


table = nn.Embedding(V, V)  # looking a row up is all this network does
nn.init.zeros_(table.weight)
neural_bigram = climb_network("bigram network", table, embedding_lr=0.2)
print(f"{'':32} {neural_bigram - bigram:+6.3f} beside the counts")
assert abs(neural_bigram - bigram) < 0.1

# %% [markdown]
# ## Step 5: a window, and meanings for symbols
#
# Bengio et al. 2003 ("A Neural Probabilistic Language Model") gave each symbol a short vector, learnt with everything
# else. The vectors of the last n symbols, side by side, go through a hidden layer to the scores of the next:
#
#     x = [e(t-n+1), …, e(t)]          h = tanh(A x + a)          scores = U h
#
# Symbols that behave alike get vectors alike, and what is learnt about one then holds for the other. A table of all
# contexts of 8 bytes would have 257^8 = 10^19 rows. This has some 200,000 numbers.


# %%
class Window(nn.Module):
    """The last `size` bytes, embedded, through one hidden layer: (B, T) -> (B, T, V)."""

    def __init__(self, size: int = 8, dim: int = 32, hidden: int = 256):
        super().__init__()
        self.size = size
        self.embedding = nn.Embedding(V, dim)
        self.hidden = nn.Linear(size * dim, hidden)
        self.head = nn.Linear(hidden, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        e = F.pad(self.embedding(tokens), (0, 0, self.size - 1, 0))  # (B, T + size - 1, dim): zeros before the window
        x = torch.cat([e[:, i : i + tokens.shape[1]] for i in range(self.size)], -1)  # (B, T, size dim)
        return self.head(torch.tanh(self.hidden(x)))


window = climb_network("window network, 8 bytes", Window())
assert window < neural_bigram

# %% [markdown]
# ## Attention, in three equal forms
#
# A window is short, and each place in it has its own weights: a `self` three bytes ago and one four bytes ago are
# learnt apart. Attention takes a weighted *average* of everything before instead. First the plainest average, all
# weights alike. With vectors x (T, C), one per position, y[t] is the mean of x[0] … x[t]. As a loop:

# %%
x = torch.randn(6, 4, dtype=torch.float64)  # (T, C)
loop = torch.stack([x[: t + 1].mean(0) for t in range(len(x))])  # (T, C)

# %% [markdown]
# The same as one product with a lower-triangular matrix: row t holds the weights that position t gives to all
# positions. The zeros above the diagonal are what makes it *causal*: nothing from the future.

# %%
A = torch.tril(torch.ones(6, 6, dtype=torch.float64))
A = A / A.sum(1, keepdim=True)  # (T, T), each row sums to 1
print(A.numpy().round(2))
assert torch.allclose(A @ x, loop)

# %% [markdown]
# The same again as a softmax of scores: equal scores give equal weights, and a score of minus infinity gives weight
# zero.

# %%
scores = torch.zeros(6, 6, dtype=torch.float64)
future = torch.ones(6, 6, dtype=torch.bool).triu(1)
assert torch.allclose(scores.masked_fill(future, -torch.inf).softmax(1) @ x, loop)

# %% [markdown]
# Now let the scores depend on the *content*. Position t asks with a query q[t], position s offers a key k[s] and a
# value v[s]:
#
#     y[t] = sum over s <= t of  softmax_s( q[t] · k[s] / sqrt(D) )  v[s]                   (Vaswani et al. 2017, equation 1)
#
# Queries, keys and values are linear maps of x. Why sqrt(D): the product of two random vectors of D numbers has
# standard deviation sqrt(D), and without the division the softmax would take one position and leave all others.
#
# This is what `nn/attention` computes, for many heads at once:

# %%
q, k, v = torch.randn(3, 6, 4, dtype=torch.float64)  # T = 6, D = 4
by_hand = (q @ k.T / math.sqrt(4)).masked_fill(future, -torch.inf).softmax(1) @ v
ours = attend(*(u[None, None] for u in (q, k, v)), causal=True)[0, 0]  # one batch, one head
assert torch.allclose(by_hand, ours)

# %% [markdown]
# ## Step 6: one attention layer
#
# The project's parts, in a stack of a single sublayer: embedding, attention, head. An average forgets order, so `rope`
# turns queries and keys by their position: the score then depends on how far apart two positions are.


# %%
def network(stack: str) -> nn.Module:
    shape = dict(dim=128, heads=4, seq_len=T, vocab_size=V, tie=False, softcap=0.0)
    parts = dict(norm="rmsnorm:gain=false", norm_place="pre", position="rope", init="fan_in")
    return build_model(Config.of(stack=stack, **shape, **parts))


attention = climb_network("one attention layer", network("gqa:qk_norm=true"))
assert window < attention < neural_bigram

# %% [markdown]
# Better than the bigram, which it contains. But behind the window network: attention alone only mixes vectors, it
# computes nothing *from* the mixture. So a feed-forward layer follows, the same small network at every position. The
# pair is one transformer layer. It makes up what attention lacked, and passes the window by a little.

# %%
layer = climb_network("one transformer layer", network("gqa:qk_norm=true mlp:activation=relu2"))
assert layer < window < attention

# %% [markdown]
# ## Step 7: a transformer
#
# Three such layers, one on another. Each adds to a stream of vectors and reads what those below it wrote.

# %%
model = network("(gqa:qk_norm=true mlp:activation=relu2)*3")
transformer = climb_network("transformer, three layers", model)
steps = [uniform, unigram, bigram, trigram, window, layer, transformer]
assert all(after < before for before, after in zip(steps, steps[1:], strict=False))  # each step is a step down

# The project's own measure gives the same number, to the rounding of its matrix products:
with autocast(device, dtype):
    check = bits_per_byte(model, batches, tokenizer.token_bytes)
assert math.isclose(check, transformer, rel_tol=5e-3)

# %% [markdown]
# ## What counting still does better
#
# It would be easy to stop here and call counting beaten. It is not, yet. Longer counts, well mixed and made of all 9
# million bytes, are ahead of a network that has read 1.2 million:

# %%
fivegram = climb("fivegram counts, Kneser-Ney", kneser_ney(5), kept(5), counting)
sevengram = climb("sevengram counts, Kneser-Ney", kneser_ney(7), kept(7), counting)
assert sevengram < fivegram < transformer

# %% [markdown]
# Part of the reason is this text: its files share licences, idioms and whole phrases. But see where the two go from
# here. The counts gain less with every byte of context, and keep more numbers for it: from 5 to 7 bytes a fraction of
# what 3 to 5 brought, for several times the table. The network has only begun. More steps, more layers, longer windows:
# `python train.py` is this lecture's last step with minutes instead of seconds, larger tokens and a larger stack.

# %%
assert fivegram - sevengram < 0.5 * (trigram - fivegram)
assert kept(7) > 3 * kept(5)
print(f"{'model':30} {'bits per byte':>13} {'numbers kept':>14} {'seconds':>8}")
for name, (bits, numbers, seconds) in ladder.items():
    print(f"{name:30} {bits:13.3f} {numbers:14,} {seconds:8.1f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
names = list(ladder)[::-1]
colours = ["C0" if "network" in name or "layer" in name else "C1" for name in names]
bars = left.barh(names, [ladder[name][0] for name in names], color=colours)
left.bar_label(bars, fmt="%.2f", padding=2)
left.set(xlabel="bits per byte (orange: counted, blue: learnt by gradient)", xlim=(0, 9))
left.spines[["top", "right"]].set_visible(False)
shown = slice(32, 127)  # the printable bytes
right.imshow(np.log1p(c2[shown, shown]), cmap="Blues")
ticks = [ord(c) - 32 for c in " (0Aaz"]
right.set_xticks(ticks, [chr(t + 32) for t in ticks])
right.set_yticks(ticks, [chr(t + 32) for t in ticks])
right.set(xlabel="byte", ylabel="byte before it", title="The bigram table: log(1 + count)")
save_figure(figure, "01_from_bigrams_to_a_transformer")

# %% [markdown]
# ## Let them speak
#
# Sampling turns it round: draw the next byte from the model, append it, ask again. First the bigram counts, then the
# transformer.

# %%
random, byte, spoken = np.random.default_rng(0), ord("\n"), []
for _ in range(200):
    byte = int(random.choice(V, p=(c2 / c2.sum(1, keepdims=True).clip(1))[byte]))
    spoken.append(byte)
print("--- bigram counts:\n" + tokenizer.decode([b for b in spoken if b != tokenizer.eot]))

prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode("def ")]])
spoken = [b.item() for b in generate(model, prompt, new_tokens=300, sampler=Sampler(temperature=0.7, top_p=0.95, seed=0))]
print("--- transformer:\ndef " + tokenizer.decode([b for b in spoken if b != tokenizer.eot]))

# %% [markdown]
# The bigram has the letters right. The transformer has words, indentation and the shape of a line of Python, and little
# sense. Nobody told it any of this: behind each letter stands one distribution over 257 symbols, computed from what
# came before.
