# %% [markdown]
# # Byte-pair encoding, or which strings are worth a token
#
# A language model reads numbers, not text. Something has to cut text into pieces and number them: the tokenizer. Single
# bytes would do: 256 symbols spell every text there is. But a page becomes thousands of steps. Whole words make it
# short, but there is no end of words, and a word that is missing cannot be read at all. Byte-pair encoding stands in
# between: begin with bytes, and give a number of its own to what occurs often.

# %%
import math
import re
import time
from collections import Counter
from itertools import pairwise

import lectern
import matplotlib.pyplot as plt
import numpy as np
import regex

from data import Tokenizer, training_documents, validation_documents
from data.bpe import PATTERN, byte_alphabet, count_words, learn

text = "naïve 漢 🙂"
print(text, list(text.encode()))
assert len(text) == 9 and len(text.encode()) == 15

# %% [markdown]
# UTF-8 writes a character in one to four bytes, English and code in one. Whatever the text, it is some sequence of 256
# symbols. So a tokenizer on bytes is never without words.
#
# ## The idea, on one line
#
# Take the pair of neighbours that occurs most often. Give it a symbol of its own. Put that in everywhere. Repeat.
#
# Gage 1994 ("A New Algorithm for Data Compression") did this to make files smaller. Sennrich, Haddow and Birch 2016
# (arXiv:1508.07909) saw that the table of pairs is a vocabulary: what to read as one unit, learnt from the text. Pairs
# do not reach across words; so the text is a bag of words, each with its count.
#
# **Ties** have to be settled: when two pairs occur equally often, either choice is as good, but one has to be made, and
# it shapes all that follows. The rule here, and in the `tokenizers` package: of equal counts the pair of smaller ids
# wins. Ids are given in order, first the bytes, then the pieces as they are made.

# %%
toy = "low low low low lower lower newer newer newer wider wide new"
words = Counter(toy.split())
spelt = {word: list(word) for word in words}  # each word as a list of pieces


def pairs() -> Counter:
    counts = Counter()
    for word, pieces in spelt.items():
        for pair in pairwise(pieces):
            counts[pair] += words[word]
    return counts


def merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    """The pieces with each `pair`, from left to right, joined into one."""
    merged = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


ids = {character: number for number, character in enumerate(byte_alphabet())}
by_hand, ties = [], 0
while len(by_hand) < 8:
    counts = pairs()
    most = max(counts.values())
    best = min((pair for pair in counts if counts[pair] == most), key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    ties += list(counts.values()).count(most) > 1
    spelt = {word: merge(pieces, best) for word, pieces in spelt.items()}
    ids["".join(best)] = len(ids)
    by_hand.append(best)
    print(f"{'+'.join(best):10} {most} times   " + "  ".join("·".join(pieces) for pieces in spelt.values()))

assert ties > 0  # even here
assert "low" in ids and "er" in ids and spelt["low"] == ["low"]

_, merges = learn(Counter(word.encode() for word in toy.split()), 256 + len(by_hand))
assert [(a.decode(), b.decode()) for a, b in merges] == by_hand  # the project's own trainer makes the same choices

# %% [markdown]
# `low` has become one piece, `er` is an ending that several words share: nobody said so, the counts did.
#
# ## What makes it fast
#
# The loop above counts all pairs anew for each piece. But a merge changes counts only in the words that hold its pair;
# everything else stays as it was counted (see `data/bpe.py`). And words repeat: one that stands there 1000 times is
# merged once and weighs 1000.

# %%
training = [document.text for document in training_documents("python")]
validation = [document.text for document in validation_documents("python")]
held_out = sum(len(text.encode()) for text in validation)

start = time.perf_counter()
words = count_words(training)
counted = time.perf_counter() - start
ranks, merges = learn(words, 4096)
learnt = time.perf_counter() - start - counted
print(f"{sum(map(len, training)):,} characters are {words.total():,} words, but only {len(words):,} different ones")
spelt = {word: list(word) for word in words}
start = time.perf_counter()
pairs()
anew = 3840 * (time.perf_counter() - start)
print(f"{counted:.1f} s to count them, {learnt:.1f} s to learn 3840 pieces; 3840 whole counts: {anew / 60:.0f} minutes")
assert words.total() > 20 * len(words)
assert len(ranks) == 4096 and learnt < 0.1 * anew

# %% [markdown]
# ## What the pieces are
#
# The first are what Python is full of: indentation. Then ends of lines, `self`, common syllables; then whole words.

# %%
pieces = list(ranks)  # in the order in which they were made
for place in (256, 500, 1000, 2000, 4000):
    print(f"{place:5}: " + "  ".join(repr(piece.decode("utf-8", "replace")) for piece in pieces[place : place + 10]))
longest = sorted((piece for piece in pieces if piece.strip(b" -=#*_\n")), key=len)[-6:]
print("longest:", [piece.decode() for piece in longest])
assert set(pieces[256].decode()) == {" "}
assert {b" self", b" return", b"def", b" import"} <= set(pieces)

# %% [markdown]
# ## Encoding
#
# To cut a new word: split it into bytes, and of all neighbours that were ever merged join those that were merged
# *first*. Repeat until no neighbours have a merge. It replays the training, so a word ends up as training would have
# left it.


# %%
def encode(word: bytes) -> list[bytes]:
    parts = [bytes([byte]) for byte in word]
    while True:
        known = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not known:
            return parts
        _, i = min(known)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


tokenizer = Tokenizer("lecture", ranks)  # the same through tiktoken, in compiled code
line = "    def forward(self, tokens): return self.unembed(tokens)[:, -1]"
print("|".join(tokenizer.decode([i]) for i in tokenizer.encode(line)))
found = regex.findall(PATTERN, validation[0])
assert [piece for word in found for piece in encode(word.encode())] == [pieces[i] for i in tokenizer.encode(validation[0])]

# %% [markdown]
# It is *not* the same as taking the longest piece that fits, again and again. Here are words where the two differ:


# %%
def longest_first(word: bytes) -> list[bytes]:
    parts = []
    while word:
        size = max(n for n in range(1, len(word) + 1) if word[:n] in ranks)
        parts.append(word[:size])
        word = word[size:]
    return parts


names = sorted({word for text in validation for word in regex.findall(PATTERN, text) if word.strip().isalpha()})
different = [name for name in names if encode(name.encode()) != longest_first(name.encode())]
print(f"{len(different):,} of {len(names):,} words, as")
for name in different[-4:]:
    merged, greedy = (b"|".join(cut(name.encode())).decode() for cut in (encode, longest_first))
    print(f"    {name!r:20} merged: {merged:20} longest first: {greedy}")
assert 0 < len(different) < 0.5 * len(names)

# %% [markdown]
# ## Why words are cut first
#
# A regular expression cuts the text before anything is counted; pieces never cross the cuts. (Pre-tokenisation. This
# one is GPT-4's: letters with the blank before them, at most three digits, punctuation, blanks.)
#
# What happens without it? Let only line ends cut, on a small part of the text. It is slow, since hardly a line repeats.
# And the pieces become phrases: the same name is learnt again with each sign that may follow it.

# %%
assert regex.findall(PATTERN, "x = 12345:  # don't") == ["x", " =", " ", "123", "45", ":", " ", " #", " don", "'t"]

sample, results = training[::40], {}
for name, pattern in (("words", PATTERN), ("lines", r"[^\n]*\n|[^\n]+")):
    start = time.perf_counter()
    some, _ = learn(count_words(sample, pattern), 768)
    across = [piece for piece in some if re.search(rb"[A-Za-z][^A-Za-z_]", piece)]
    selves = [piece.decode() for piece in some if b"self" in piece]
    results[name] = len(across), len(selves), time.perf_counter() - start
    print(f"cut into {name}: {results[name][2]:.1f} s, {len(across)} of 768 pieces go on after a word; with self: {selves}")
assert results["words"][0] == 0 < 50 < results["lines"][0]
assert results["lines"][1] > results["words"][1]
assert results["lines"][2] > 2 * results["words"][2]

# %% [markdown]
# ## Nothing is lost, and how much shorter
#
# Every piece is a string of bytes, so decoding is writing them one after the other. Any text, and any bytes, come back
# as they were. Even text that spells the special token stays text: no document can pretend that it ends.
#
# Pieces are made one by one, so the first 512 of them *are* the vocabulary of size 512: one training gives all sizes.

# %%
assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in [*validation, "naïve 漢 🙂", ""])
noise = np.random.default_rng(0).bytes(1000)
assert tokenizer.decode_bytes(tokenizer.encode_bytes(noise)) == noise
assert tokenizer.eot not in tokenizer.encode("<|endoftext|>")
assert list(learn(words, 512)[0]) == pieces[:512]

sizes = (256, 512, 1024, 2048, 4096)
tokenizers = {size: Tokenizer(f"{size}", {piece: i for i, piece in enumerate(pieces[:size])}) for size in sizes}
streams = {}  # size -> (ids of a third of the training text, ids of the text kept back)
print("vocabulary   bytes a token   gained by each 100 pieces")
per_token, gains = {}, []
for size, each in tokenizers.items():
    streams[size] = [np.concatenate(each.encode_arrays(texts)).astype(np.int64) for texts in (training[::3], validation)]
    per_token[size] = held_out / len(streams[size][1])
    gains += [(per_token[size] - per_token[size // 2]) / (size / 2) * 100] if size > 256 else []
    print(f"{size:10,} {per_token[size]:15.2f}   " + (f"{gains[-1]:.3f}" if size > 256 else ""))
assert per_token[256] == 1
assert all(later < earlier for earlier, later in pairwise(gains)) and min(gains) > 0

# %% [markdown]
# Each doubling makes the text shorter, and each new piece is worth less than those before it: what is frequent has been
# taken. A piece also costs something: a row in the embedding, a row in the head, and it is met more rarely, so less is
# learnt of it.
#
# ## Why loss per token misleads
#
# A model's loss is -log p per *token*. With larger tokens there are fewer of them, each is harder, and the loss per
# token rises. That says nothing about the model. Divide by what does not depend on the tokenizer, the bytes of the
# text. Two simple models for each vocabulary show it: the unigram, each token by its share, and the bigram, after each
# token what followed it, mixed with the unigram (absolute discounting; lecture 01):
#
#     bits per byte = loss per token (nats) / ln 2  *  tokens / bytes


# %%
def count_models(size: int, d: float = 0.75) -> tuple[float, float]:
    """Nats a token on the text kept back, of unigram and bigram counts made of the training text."""
    train, test = streams[size]
    unigram = (np.bincount(train, minlength=size) + 1) / (len(train) + size)  # (V,)
    keys, counts = np.unique(train[:-1] * size + train[1:], return_counts=True)  # the bigrams that occur
    total = np.bincount(train[:-1], minlength=size)  # (V,) how often each token is followed by one
    kinds = np.bincount(keys // size, minlength=size)  # (V,) by how many different ones
    a, b = test[:-1], test[1:]
    place = np.searchsorted(keys, a * size + b).clip(max=len(keys) - 1)
    count = np.where(keys[place] == a * size + b, counts[place], 0)
    bigram = (np.maximum(count - d, 0) + d * kinds[a] * unigram[b]) / np.maximum(total[a], 1)
    bigram = np.where(total[a] > 0, bigram, unigram[b])
    return -np.log(unigram[test]).mean(), -np.log(bigram).mean()


nats, bits = {}, {}
print("             loss, nats a token       bits per byte")
print("vocabulary    unigram    bigram     unigram    bigram")
for size in sizes:
    nats[size] = count_models(size)
    bits[size] = [loss / math.log(2) / per_token[size] for loss in nats[size]]
    print(f"{size:10,} {nats[size][0]:10.3f} {nats[size][1]:9.3f} {bits[size][0]:11.3f} {bits[size][1]:9.3f}")
for small, large in pairwise(sizes):
    for model in (0, 1):
        assert nats[large][model] > nats[small][model]  # by loss per token the larger vocabulary looks worse …
        assert bits[large][model] < bits[small][model]  # … and by bits per byte it is better

# %% [markdown]
# The two halves tell opposite stories, about the same models and the same text. Only the second can be compared across
# tokenizers: it is the size of the compressed text. (Why do larger tokens help a *bigram*? One token before the next is
# then 3.6 bytes rather than one. A transformer, which sees the whole window anyway, has less to gain.)
#
# ## Beside a published law
#
# Tao et al. 2024 ("Scaling Laws with Vocabulary", arXiv:2407.13623) fit how many tokens a character takes: f(V) =
# 0.0064 ln² V - 0.1581 ln V + 1.2047. And they compare models of different vocabularies by how much better they are
# than the unigram *of the same tokens*:


# %%
def unigram_normalised(loss: float, unigram: float) -> float:
    """L_u of Tao et al. 2024, section 3: nats a token below what the unigram needs; it is 0 for the unigram itself."""
    return loss - unigram


characters, normalised = sum(map(len, validation)), {}
print("vocabulary   tokens a character   their f(V)   L_u of the bigram")
for size in sizes:
    here = len(streams[size][1]) / characters
    law = 0.0064 * math.log(size) ** 2 - 0.1581 * math.log(size) + 1.2047
    normalised[size] = unigram_normalised(nats[size][1], nats[size][0])
    print(f"{size:10,} {here:20.3f} {law:12.3f} {normalised[size]:19.3f}")
assert unigram_normalised(nats[512][0], nats[512][0]) == 0
assert 0.7 < here / law < 1.1  # at 4096
assert normalised[4096] > normalised[2048] < normalised[1024]

# %% [markdown]
# Tokens a character fall in the same way, ours lower from 1,024 on: code repeats itself more than the texts they fitted.
# (Their law is of vocabularies from some thousand pieces on. At 256 the tokens are bytes, and it does not apply.)
#
# L_u does not rank as bits per byte do: it finds the bigram best at 2,048 pieces, where bits per byte still gain from
# 4,096. The unigram is part of what a larger vocabulary improves, and L_u subtracts it. Which number to look at depends
# on the question; for "how well is this text predicted" it is bits per byte.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
left.semilogx(sizes, [per_token[size] for size in sizes], "o-", base=2)
left.set(xlabel="vocabulary", ylabel="bytes a token", title="Compression", ylim=(0, None))
right.semilogx(sizes, [nats[size][1] for size in sizes], "o-", color="C1", base=2, label="nats a token")
right.semilogx(sizes, [bits[size][1] for size in sizes], "o-", color="C0", base=2, label="bits per byte")
right.set(xlabel="vocabulary", title="The same bigram models, told in two ways", ylim=(0, None))
right.legend()
for axes in (left, right):
    axes.set_xticks(sizes, [f"{size}" for size in sizes])
lectern.save_figure(figure, "02_byte_pair_encoding")
