# %% [markdown]
# # From counting bigrams to a transformer
#
# A language model answers one question: given the text so far, how likely is each thing that could come next? We build
# answers from a table of counts to a small transformer, each better than the one before, and hold all of them against
# one text, Python's own standard library, with one number, **bits per byte**.
#
# Letters: B rows of a batch, T bytes of a row, V size of the vocabulary, C width of a network.

# %%
import math

import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Loader, load, load_tokenizer, windows
from kernels.attention import attention
from models import Config, build_model
from models.generate import Sampler, generate
from models.score import bits_per_byte
from train import build_optimizer

torch.manual_seed(0)
torch.set_num_threads(1)  # networks this small gain little from a second core, and lose much where it is busy

# %% [markdown]
# ## One text, one number
#
# One token is one byte here; a 257th token marks the start of a document. (Lecture 02 joins bytes to larger tokens.) One
# file in ten is kept back. No model ever learns from it; every model is judged on it.
#
# A model gives each next token a probability. If the token that did come had probability p, the model *needs* -log2(p)
# bits for it: 1 bit at p = 1/2, 10 bits at p = 1/1024. That is how long its code is when an arithmetic coder writes the
# text down with the help of the model. To predict is to compress (Shannon 1948).
#
#     bits per byte = sum over the text of -log2 p(token | what stands before it)  /  number of bytes
#
# The mean of -log p is the **cross-entropy**. Training minimises it in nats (natural logarithm); a nat is 1.44 bits. A
# model, for us, is a function: from inputs and targets (B, T) to log p(target | the inputs up to there), in nats, (B, T).
# All of them see the same windows of 128 bytes, and nothing before a window.

# %%
tokenizer = load_tokenizer("byte")
training, validation = load("python", tokenizer)
V, T = tokenizer.vocab_size, 128
text = np.asarray(training.ids).astype(np.int64)  # (9 million,)
batches = list(windows(validation, batch_size=64, seq_len=T, limit=65536))  # 512 windows, spread over the files kept back
print(f"{len(training):,} bytes to learn from, {len(batches) * 64 * T:,} to be judged on, as these:\n")
print(tokenizer.decode(batches[2].inputs[0].tolist()), "\n")

ladder = {}  # name -> bits per byte


@torch.no_grad()
def climb(name: str, model, numbers: int = 0) -> float:
    """Bits per byte of a model on the text kept back."""
    nats, length = 0.0, 0
    for inputs, targets, _ in batches:
        nats -= model(inputs, targets).double().sum().item()
        length += tokenizer.token_bytes[targets.numpy()].sum()  # a start of document is 0 bytes long
    ladder[name] = nats / math.log(2) / length
    print(f"{name:28} {ladder[name]:6.3f} bits per byte, {numbers:9,} numbers kept")
    return ladder[name]


# %% [markdown]
# ## Steps 0 to 2: know nothing, count bytes, count pairs
#
# Knowing nothing, every token has probability 1/257. That costs log2(257) = 8.006 bits: a byte a byte.
#
# But some bytes are frequent: blanks, `e`, `t`. The best fixed guess, the **unigram** model, is their share of the text.
# (Of all distributions q, the cross-entropy -sum p log q is least at q = p, where it is the entropy of p.)
#
# A **bigram** model looks at one byte: after `(` comes something else than after a blank. Count how often b follows a,
# and divide. Without the k a pair that never occurred would cost infinitely many bits the day it does:
#
#     p(b | a) = (N(ab) + k) / (N(a) + k V)

# %%
uniform = climb("uniform", lambda inputs, targets: torch.full(targets.shape, -math.log(V)))
assert math.isclose(uniform, math.log2(V), rel_tol=1e-3)

p1 = (np.bincount(text, minlength=V) + 1) / (len(text) + V)  # (V,)
log_p1 = torch.tensor(np.log(p1))
unigram = climb("unigram counts", lambda inputs, targets: log_p1[targets], V)
other = np.roll(p1, 1)  # any other q is worse on the text that p was counted on
assert -(p1 * np.log(p1)).sum() < -(p1 * np.log(other)).sum()

c2 = np.bincount(text[:-1] * V + text[1:], minlength=V * V).reshape(V, V)  # (V, V): row = before, column = after
p2 = (c2 + 0.1) / (c2 + 0.1).sum(1, keepdims=True)
log_p2 = torch.tensor(np.log(p2))
bigram = climb("bigram counts", lambda inputs, targets: log_p2[inputs, targets], V * V)
for a in "(.d":
    print(f"after {a!r}: " + ", ".join(f"{chr(b)!r} {p2[ord(a), b]:.0%}" for b in np.argsort(-p2[ord(a)])[:5]))

# %% [markdown]
# ## Why counting runs out: sparsity
#
# So look at two bytes, or three, or six? The number of contexts is multiplied by 257 with each. The text is not. More
# and more of what comes was never seen before, and a table has nothing to say about what it never saw.
#
# `grams[n]` holds the distinct n-grams of the text and how often each occurs. An n-gram is packed into one 64-bit
# number, in base V + 1: one more symbol, V, will stand for "before the window".

# %%
BASE, ORDER = V + 1, 7


def ending(symbols: np.ndarray, n: int) -> np.ndarray:
    """The n-gram that ends at each place of (..., T) symbols, but for the first n - 1: (..., T - n + 1) numbers."""
    length = symbols.shape[-1] - n + 1
    return sum(symbols[..., i : i + length] * BASE ** (n - 1 - i) for i in range(n))


def look_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """values of the wanted keys; 0 for those that are not there. keys are sorted."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


grams = {n: np.unique(ending(text, n), return_counts=True) for n in range(1, ORDER + 1)}
judged = torch.cat([batch.targets for batch in batches]).numpy()  # (512, T)
unseen = {n: (look_up(ending(judged, n), *grams[n]) == 0).mean() for n in grams}
print(" n    possible n-grams   seen in training   new in the text kept back")
for n in grams:
    print(f"{n:2} {V**n:19,} {len(grams[n][0]):18,} {unseen[n]:20.2%}")
assert all(unseen[n] < unseen[n + 1] for n in range(1, ORDER)) and unseen[ORDER] > 0.1

# %% [markdown]
# ## Step 3: count triples, and fall back well
#
# The cure is to mix orders (interpolated Kneser-Ney: Kneser and Ney 1995; Chen and Goodman 1998). Where the long context
# was seen, believe it; take a little off each count, d = 0.75, and spread that as the shorter context says:
#
#     p(c | ab) = max(N(abc) - d, 0) / N(ab)  +  d kinds(ab) / N(ab) * p'(c | b)        kinds(ab): different c seen after ab
#
# The shorter p' is asked only about what was *not* seen after the long context. So it should not count how often c
# follows b, but after how many *different* a the pair bc occurred: a pair from one fixed phrase says little.


# %%
def kneser_ney(order: int, d: float = 0.75):
    tables = []
    for n in range(1, order + 1):
        keys, counts = grams[n]
        if n < order:  # in how many different places: the (n+1)-grams without their first symbol
            keys, counts = np.unique(grams[n + 1][0] % BASE**n, return_counts=True)
        contexts, first = np.unique(keys // BASE, return_index=True)
        tables.append((keys, counts, contexts, np.add.reduceat(counts, first), np.diff(first, append=len(keys))))

    def log_p(inputs: Tensor, targets: Tensor) -> Tensor:
        past = np.pad(inputs.numpy(), [(0, 0), (order, 0)], constant_values=V)  # (B, order + T)
        p = np.full(targets.shape, 1 / V)
        for n, (keys, counts, contexts, totals, kinds) in enumerate(tables, 1):
            before = ending(past, n - 1)[:, -T:] if n > 1 else np.zeros_like(targets)  # (B, T)
            count = look_up(before * BASE + targets.numpy(), keys, counts)
            seen, rest = look_up(before, contexts, totals), d * look_up(before, contexts, kinds)
            p = np.where(seen > 0, (np.maximum(count - d, 0) + rest * p) / np.maximum(seen, 1), p)
        return torch.tensor(np.log(p))

    return log_p


kept = {order: sum(len(grams[n][0]) for n in range(1, order + 1)) for order in grams}  # numbers in all the tables
trigram = climb("trigram counts, Kneser-Ney", kneser_ney(3), kept[3])

every = torch.arange(V)[:, None].expand(V, T)  # chances must sum to one: try every next byte after one window
total = kneser_ney(3)(batches[0].inputs[:1].expand(V, T), every).exp().sum(0)  # (T,)
assert torch.allclose(total, torch.ones_like(total))

# %% [markdown]
# ## Step 4: the bigram again, as a network
#
# Counting has no way to *share*: what it learns about `for i in` says nothing about `for j in`. A network can, because
# it learns numbers from which tables are computed. First one that shares nothing, to see that learning by gradient
# finds what counting finds. Row a of W (V, V) holds the scores of what may follow a; softmax makes them probabilities:
#
#     p(b | a) = exp W[a, b] / sum over c of exp W[a, c]              loss = mean of -log p(b | a)
#     d loss / d W[a, b] = (N(a) p(b | a) - N(ab)) / N                 N: pairs in the text
#
# The gradient is zero exactly where p(b | a) = N(ab) / N(a). The count table *is* the best network of this kind.
#
# Then the usual way: begin with zeros, take 1024 bytes, step against the gradient, repeat. Every network below is
# trained by this one loop on the same 450 batches in the same order. That is half a million bytes; the counts have read
# all 9 million. As in train.py, Muon moves the matrices inside a network and AdamW everything else, and the learning
# rates fall to zero. They begin higher here, because the run is short.

# %%
pairs = torch.tensor(c2, dtype=torch.float64)
W = (pairs + 1e-9).log().requires_grad_()  # scores from counts
loss = -(pairs * W.log_softmax(1)).sum() / pairs.sum()
(gradient,) = torch.autograd.grad(loss, W)
print(f"largest gradient at the counts: {gradient.abs().max():.1e}")
assert gradient.abs().max() < 1e-9

STEPS, ROWS = 450, 8
rates = dict(optimizer="muon:lr=0.04", rest_optimizer="adamw:lr=0.02:betas=0.8+0.95", embedding_lr=0.1)


def climb_network(name: str, model: nn.Module) -> float:
    """Train a network (B, T) -> logits (B, T, V), then judge it."""

    def log_p(inputs: Tensor, targets: Tensor) -> Tensor:
        return -F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)

    optimizer, loader = build_optimizer(Config.of(**rates), model), Loader(training, batch_size=ROWS, seq_len=T, seed=0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * (1 - step / STEPS)
        inputs, targets, _ = next(loader)
        loss = -log_p(inputs, targets).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return climb(name, log_p, sum(p.numel() for p in model.parameters()))


table = nn.Embedding(V, V)  # looking a row up is all this network does
nn.init.zeros_(table.weight)
neural_bigram = climb_network("bigram network", table)
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
# contexts of 8 bytes would have 257^8 = 10^19 rows. This has 74,016 numbers.


# %%
class Window(nn.Module):
    """The last 8 bytes, embedded, through one hidden layer: (B, T) -> (B, T, V)."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, 32)
        self.hidden = nn.Linear(8 * 32, 128)
        self.head = nn.Linear(128, V, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        e = F.pad(self.embedding(tokens), (0, 0, 7, 0))  # (B, 7 + T, 32): zeros before the window
        x = torch.cat([e[:, i : i + tokens.shape[1]] for i in range(8)], -1)  # (B, T, 8 * 32)
        return self.head(torch.tanh(self.hidden(x)))


window = climb_network("window network, 8 bytes", Window())

# %% [markdown]
# ## Attention, by hand
#
# A window is short, and each place in it has its own weights: a `self` three bytes ago and one four bytes ago are
# learnt apart. Attention takes a weighted *average* of everything before instead. First the plainest, all weights
# alike: of vectors x (T, C), one per position, y[t] is the mean of x[0] … x[t]. As a loop, as a product with a
# triangular matrix, and as a softmax. The zeros above the diagonal make it *causal*: nothing from the future.
#
# Then let the scores depend on the *content*. Position t asks with a query q[t], position s offers a key k[s] and a
# value v[s], all of them linear maps of x. (The product of two random vectors of D numbers has standard deviation
# sqrt(D); without the division the softmax would take one position and leave all others.)
#
#     y[t] = sum over s <= t of  softmax_s( q[t] · k[s] / sqrt(D) )  v[s]                   (Vaswani et al. 2017, equation 1)

# %%
x = torch.randn(6, 4, dtype=torch.float64)  # (T, C)
loop = torch.stack([x[: t + 1].mean(0) for t in range(6)])  # (T, C)

A = torch.ones(6, 6, dtype=torch.float64).tril()
A = A / A.sum(1, keepdim=True)  # (T, T): row t holds the weights that position t gives to all positions
print(A.numpy().round(2))
assert torch.allclose(A @ x, loop)

scores, future = torch.zeros(6, 6, dtype=torch.float64), torch.ones(6, 6, dtype=torch.bool).triu(1)
weights = scores.masked_fill(future, -torch.inf).softmax(1)  # equal scores, equal weights; minus infinity, weight 0
assert torch.allclose(weights @ x, loop)

q, k, v = torch.randn(3, 6, 4, dtype=torch.float64)  # T = 6, D = 4
by_hand = (q @ k.T / math.sqrt(4)).masked_fill(future, -torch.inf).softmax(1) @ v
ours = attention(*(u[None, None] for u in (q, k, v)), causal=True)[0, 0]  # the project's: one batch, one head
assert torch.allclose(by_hand, ours)

# %% [markdown]
# ## Step 6: a transformer
#
# The project's parts. First a stack of a single sublayer: embedding, attention, head. An average forgets order, so
# `rope` turns queries and keys by their position: the score then depends on how far apart two positions are. It is
# better than the bigram, which it contains. But it stays behind the window network: attention alone only mixes vectors,
# it computes nothing *from* the mixture.
#
# So a feed-forward layer follows, the same small network at every position. The pair is one transformer layer. It makes
# up what attention lacked, and passes the window. A transformer is layers one on another; each adds to a stream of
# vectors and reads what those below it wrote. Two will do here.


# %%
def network(stack: str) -> nn.Module:
    return build_model(Config.of(stack=stack, dim=64, heads=2, position="rope", seq_len=T, vocab_size=V))


attention_alone = climb_network("one attention layer", network("gqa:qk_norm=unit"))
assert window < attention_alone < neural_bigram
layer = climb_network("one transformer layer", network("gqa:qk_norm=unit mlp:activation=relu2"))
model = network("(gqa:qk_norm=unit mlp:activation=relu2)*2")
transformer = climb_network("transformer, two layers", model)
assert uniform > unigram > bigram > trigram > window > layer > transformer  # each step is a step down

assert math.isclose(transformer, bits_per_byte(model, batches, tokenizer.token_bytes), rel_tol=1e-4)  # as eval.py measures

# %% [markdown]
# ## What counting still does better
#
# Counting is not beaten yet. Longer counts, well mixed and made of all 9 million bytes, are ahead of a network that has
# read half a million:

# %%
fivegram = climb("fivegram counts, Kneser-Ney", kneser_ney(5), kept[5])
sevengram = climb("sevengram counts, Kneser-Ney", kneser_ney(7), kept[7])
assert sevengram < fivegram < transformer
assert fivegram - sevengram < 0.5 * (trigram - fivegram) and kept[7] > 3 * kept[5]

figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
names = list(ladder)[::-1]
colours = ["C0" if "network" in name or "layer" in name else "C1" for name in names]
axes.bar_label(axes.barh(names, [ladder[name] for name in names], color=colours), fmt="%.2f", padding=2)
axes.set(xlabel="bits per byte (orange: counted, blue: learnt by gradient)", xlim=(0, 9))
lectern.save_figure(figure, "01_from_bigrams_to_a_transformer")

# %% [markdown]
# Part of the reason is this text: its files share licences, idioms and whole phrases. But the counts gain less with
# every byte of context, and keep more numbers for it: from 5 to 7 bytes a fraction of what 3 to 5 brought, for several
# times the table. The network has only begun: `python train.py` is this lecture's last step with minutes instead of
# seconds, larger tokens and a larger stack.
#
# ## Let them speak
#
# Sampling turns it round: draw the next byte from the model, append it, ask again.

# %%
random, spoken = np.random.default_rng(0), [ord("\n")]
for _ in range(200):
    spoken.append(random.choice(V, p=p2[spoken[-1]]))
print("--- bigram counts:" + tokenizer.decode(spoken))

prompt = [tokenizer.eot, *tokenizer.encode("def ")]
sampler = Sampler(temperature=0.8, top_p=0.95, seed=0)
spoken = [token.item() for token in generate(model, torch.tensor([prompt]), new_tokens=200, sampler=sampler)]
print("--- transformer:\n" + tokenizer.decode(prompt[1:] + spoken))

# %% [markdown]
# The bigram has the letters right. The transformer has words, indentation and the shape of a line of Python, and little
# sense. Nobody told it any of this: behind each letter stands one distribution over 257 symbols, computed from what
# came before.
