# %% [markdown]
# # Encoders: seeing both sides
#
# A decoder guesses what comes next. An encoder reads a whole text at once, and is asked for something about it: the words
# that were hidden from it, a label for each token, one label for all. The stack is the same, without the causal mask:
# `python train.py --objective masked:rate=0.3 --position alibi --ffn geglu` trains one. This lecture looks at four ideas:
# how much to hide, what padding costs, how position and content can meet (DeBERTa), and how long texts are read
# (Longformer, BigBird).
#
# Letters: B texts, T tokens of a text, V vocabulary.

# %%
import lectern
import matplotlib.pyplot as plt
import numpy as np
import torch

from data import Loader, load, load_tokenizer, windows
from models import Config, LanguageModel, build_model
from models.score import bits_per_byte, posed
from nn.objective import MaskedTokens
from nn.position import ALiBi

torch.manual_seed(0)
torch.set_num_threads(1)
RATES = dict(optimizer="muon:lr=0.02", rest_optimizer="adamw:lr=0.01:betas=0.8+0.95", embedding_lr=0.05)


def encoder(mixer: str, *, vocab_size: int, dim: int = 64, heads: int = 4, depth: int = 2, position: str = "none"):
    sizes = dict(vocab_size=vocab_size, dim=dim, heads=heads, depth=depth, stem="", tie=False)
    parts = dict(mixer=mixer, ffn="geglu", norm="layernorm", position=position, objective="masked")
    return build_model(Config.of(**sizes, **parts, **RATES))


# %% [markdown]
# ## How much to hide
#
# BERT (Devlin et al. 2018, arXiv:1810.04805) hides 15 % of the tokens; MosaicBERT (Portes et al. 2023, arXiv:2312.17482)
# twice as many: each text then gives twice as many answers to learn from, and each is a little harder. Eight of ten hidden
# tokens become the mask, one another token, one stays.
#
# Everything here is MosaicBERT's: symmetric ALiBi instead of position vectors, gated GELU, a vocabulary rounded up to a
# multiple of 64 so that its matrices fit the hardware: 257 bytes and the mask become 320 rows. The rows that no token uses
# change nothing once their logits are minus infinity.

# %%
tokenizer = load_tokenizer("byte")
training, validation = load("python", tokenizer)
size = tokenizer.vocab_size
V = MaskedTokens().vocabulary(size)
assert (size, V, MaskedTokens().vocabulary(30522)) == (257, 320, 30528)
logits = torch.randn(5, size)
padded = torch.cat([logits, torch.full((5, V - size), -torch.inf)], 1)
assert torch.allclose(padded.softmax(-1)[:, :size], logits.softmax(-1))
slopes = ALiBi().slopes(8)
assert torch.allclose(slopes, 0.5 ** torch.arange(1, 9))  # 1/2 to 1/256
print("slopes of eight heads:", " ".join(f"1/{round(1 / s)}" for s in slopes.tolist()))


def hidden(rate: float):
    objective, loader = MaskedTokens(rate=rate), Loader(training, batch_size=16, seq_len=96, seed=0)
    for step, (inputs, targets, _) in enumerate(loader):
        yield objective(inputs, targets, size, (step,))


def judged(model: LanguageModel) -> float:
    """Bits per byte of what is hidden when 15 % are, on text kept back."""
    batches = windows(validation, batch_size=32, seq_len=96, limit=24576)
    return bits_per_byte(model, posed(batches, MaskedTokens(rate=0.15), size), tokenizer.token_bytes)


BY_RATE = {}
for rate in (0.05, 0.15, 0.3, 0.6):
    model = encoder("gqa", vocab_size=V, position="alibi")
    lectern.learn(model, hidden(rate), steps=110)
    BY_RATE[rate] = judged(model)
    print(f"{rate:4.0%} hidden in training: {BY_RATE[rate]:.3f} bits per byte of a hidden byte")
assert min(BY_RATE[0.15], BY_RATE[0.3]) < BY_RATE[0.05]

# %% [markdown]
# All are judged alike, with 15 % hidden. Hiding very little teaches slowly. Between 15 and 30 % the gain of MosaicBERT's choice
# is a matter of the length of training and the size of the model; these runs of half a minute do not settle it.
#
# ## What padding costs
#
# Texts have different lengths, and a batch is as wide as its longest. MosaicBERT takes the padding out: all tokens in one
# row, with the borders of the texts beside it. Here that is what `documents` are for, and no token sees another text's.

# %%
lengths = np.random.default_rng(0).geometric(1 / 30, size=16).clip(3, 120).tolist()
texts = [torch.randint(size, (n,)) for n in lengths]
row = torch.cat(texts)[None]
documents = torch.repeat_interleave(torch.arange(16), torch.tensor(lengths))[None]
with torch.no_grad():
    packed = model(row, documents=documents)[0]
    alone = torch.cat([model(text[None])[0] for text in texts])
assert torch.allclose(packed, alone, atol=1e-4)
share = 1 - sum(lengths) / (16 * max(lengths))
print(f"16 texts of {min(lengths)} to {max(lengths)} tokens: padded to one width {share:.0%} of the work is for nothing")
assert share > 0.3

# %% [markdown]
# ## Where content meets position
#
# DeBERTa (He et al. 2020, arXiv:2006.03654) gives each distance a vector of its own and lets it meet the contents: a query may
# ask for a *distance* (content to position, c2p), and a key may answer by distance (position to content, p2c):
#
#     A_ij = q_i . k_j + q_i . K(i - j) + k_j . Q(i - j)
#
# A task that needs it: say for each token what stood three before it. Content alone has no way to know.


# %%
def three_before(count: int = 32, T: int = 24, symbols: int = 12):
    while True:
        tokens = torch.randint(symbols, (count, T))
        yield tokens, torch.cat([torch.full((count, 3), -100), tokens[:, :-3]], 1)


def accuracy(model: LanguageModel, batches, count: int = 4) -> float:
    right = total = 0
    with torch.no_grad():
        for _ in range(count):
            inputs, targets = next(batches)
            wanted = targets >= 0
            right += (model(inputs).argmax(-1) == targets)[wanted].sum().item()
            total += wanted.sum().item()
    return right / total


FOUND = {}
for name, spec in {
    "content alone": "deberta:c2p=false:p2c=false", "and c2p": "deberta:p2c=false", "and p2c": "deberta:c2p=false",
    "all three": "deberta",
}.items():  # fmt: skip
    model = encoder(spec, vocab_size=64, dim=32, depth=1, position="relative:span=8", heads=2)
    lectern.learn(model, three_before(), steps=150)
    FOUND[name] = accuracy(model, three_before())
    print(f"  {name:14}{FOUND[name]:6.1%}")
assert FOUND["content alone"] < 0.25 < 0.9 < min(FOUND["and c2p"], FOUND["all three"])
assert FOUND["all three"] > FOUND["content alone"] + 0.5

# %% [markdown]
# ## Long texts
#
# Full attention compares all pairs. Longformer (Beltagy et al. 2020, arXiv:2004.05150) looks at a window, and lets a few
# global tokens see and be seen by all; BigBird (Zaheer et al. 2020, arXiv:2007.14062) works by blocks: near ones, the first
# ones, some at random. Clinical-Longformer and Clinical-BigBird (Li et al. 2022, arXiv:2201.11838) read notes of 4,096
# tokens so, where BERT ends at 512.
#
# A record here is noise with two facts far apart, and begins with two questions, one for each. A window alone cannot carry the
# facts there: two layers of reach 15 see 30 tokens. A reader that keeps the first third sees one of them. Guessing is right
# in half of the cases.


# %%
def records(count: int = 16, T: int = 144):
    while True:
        tokens = torch.randint(8, 32, (count, T))
        places = torch.stack([torch.randint(T // 4, T // 3, (count,)), torch.randint(2 * T // 3, T, (count,))], 1)
        facts = torch.randint(2, (count, 2))
        tokens.scatter_(1, places, facts + torch.tensor([0, 2]))  # fact one is 0 or 1, fact two is 2 or 3
        tokens[:, :2] = torch.tensor([4, 5])
        targets = torch.full((count, T), -100)
        targets[:, :2] = facts
        yield tokens, targets


def shortened(batches, length: int):
    for tokens, targets in batches:
        yield tokens[:, :length], targets[:, :length]


READERS = {
    "first third, full": ("mha", True), "window of 16": ("gqa:window=16", False),
    "Longformer": ("longformer:window=16:global_tokens=2", False), "BigBird": ("bigbird:block=16:random_blocks=1", False),
    "full": ("mha", False),
}  # fmt: skip
READ = {}
for name, (spec, short) in READERS.items():
    torch.manual_seed(1)
    model = encoder(spec, vocab_size=64, dim=32, heads=2)
    batches = shortened(records(), 48) if short else records()
    lectern.learn(model, batches, steps=200)
    READ[name] = accuracy(model, batches, count=16)
    print(f"  {name:20}{READ[name]:6.1%}")
assert READ["window of 16"] < 0.65 and 0.6 < READ["first third, full"] < 0.85
assert min(READ["Longformer"], READ["BigBird"], READ["full"]) > 0.9

# %% [markdown]
# What is compared, counted: n tokens with a window of w on each side and g global ones make n (2 w + 1) + 2 g n pairs or a
# little less, a share of n^2 that shrinks with n.


# %%
def pairs(n: int, w: int, g: int) -> int:
    i, j = np.arange(n)[:, None], np.arange(n)
    return int(((abs(i - j) <= w) | (i < g) | (j < g)).sum())


for n in (512, 1024, 2048, 4096):
    found, bound = pairs(n, 64, 2), n * 129 + 2 * 2 * n
    assert found <= bound and found > 0.93 * bound
    print(f"  {n:5} tokens: {found:10,} pairs of {n * n:11,}, {found / n**2:5.1%}")

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
axes[0].plot([100 * rate for rate in BY_RATE], list(BY_RATE.values()), "o-")
axes[0].set(xlabel="% hidden in training", ylabel="bits per byte, 15 % hidden", title="how much to hide")
for axis, found, title in ((axes[1], FOUND, "what stood three before"), (axes[2], READ, "two facts far apart")):
    axis.barh(list(found), list(found.values()))
    axis.set(xlim=(0, 1), xlabel="accuracy", title=title)
lectern.save_figure(figure, "11_encoders")
