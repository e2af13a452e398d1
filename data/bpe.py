"""Byte-pair encoding learnt from text: which 4096 byte strings are worth a token of their own?

Start from the 256 single bytes, then join the most frequent adjacent pair into a new piece, again and again:

    (a, b) = argmax over pairs of  sum over words w of  count(w) * [times a stands before b in w]

BPE as a vocabulary: Sennrich, Haddow, Birch 2016, arXiv:1508.07909 (after Gage 1994). On bytes, so that nothing is ever
out of vocabulary: GPT-2, Radford et al. 2019. Words never join across the cuts of a regular expression (`PATTERN`).

Recounting the text after each merge would cost O(merges * text). Two observations make it seconds: a word that occurs
1000 times is merged once and weighs 1000, and a merge changes the counts only inside the words that hold its pair.

The tie rule is that of the `tokenizers` package: the highest count wins, then the smaller pair of ids, a piece's id
being its place in the vocabulary. So the merges equal those of that package on the same words.
"""

import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import pairwise

import regex

# How GPT-4 (tiktoken's cl100k_base) cuts text into words: contractions, letters with one leading symbol, up to three
# digits, punctuation with the line ends after it, and white space, which leaves its last blank to the next word.
PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, {character: byte}, in the order in which bytes take the ids 0 to 255.

    Bytes that print in Latin-1 stand for themselves and come first; the other 68 take the characters from U+0100 on.
    GPT-2, GPT-4, Llama 3 and the `tokenizers` package number their single bytes in this order; so do we.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


def count_words(texts: Iterable[str], pattern: str = PATTERN) -> Counter[bytes]:
    """How often each pre-token, as UTF-8 bytes, occurs in the texts. Holds the distinct words only, never the text."""
    find, words = regex.compile(pattern).findall, Counter()
    for text in texts:
        words.update(find(text))
    return Counter({word.encode(): count for word, count in words.items()})


def learn(words: Mapping[bytes, int], vocab_size: int) -> tuple[dict[bytes, int], list[tuple[bytes, bytes]]]:
    """Learn merges from word counts until there are `vocab_size` pieces or no pair is left.

    words: {word: count}. Returns `(ranks, merges)`: {piece: id} in order of id, and the pairs in the order they joined.
    Each merge makes a new piece: how a stretch of bytes merges depends on those bytes alone unless a merge crosses its
    border, so no piece is ever spelt by two different pairs.
    Raises ValueError if vocab_size is below 257 (the 256 bytes and one merge).
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size is {vocab_size}; byte-level BPE needs at least 257: the 256 bytes and one merge")
    pieces = [bytes([byte]) for byte in byte_alphabet().values()]
    ranks = {piece: rank for rank, piece in enumerate(pieces)}
    merges = []

    spelt = [[ranks[bytes([byte])] for byte in word] for word in words]  # each word as a list of piece ids
    weight = list(words.values())
    counts = defaultdict(int)  # (a, b) -> times a stands before b in the text
    where = defaultdict(set)  # (a, b) -> the words that hold, or once held, a before b
    for w, ids in enumerate(spelt):
        for pair in pairwise(ids):
            counts[pair] += weight[w]
            where[pair].add(w)

    # Every change of a count pushes a new entry; an entry whose count is no longer true is stale and skipped when met.
    queue = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(queue)
    while queue and len(pieces) < vocab_size:
        count, pair = heapq.heappop(queue)
        if counts[pair] != -count:
            continue
        left, right = pieces[pair[0]], pieces[pair[1]]
        new = ranks[left + right] = len(pieces)
        pieces.append(left + right)
        merges.append((left, right))

        change = defaultdict(int)
        for w in where.pop(pair):
            before, after = spelt[w], join(spelt[w], pair, new)
            for old in pairwise(before):
                change[old] -= weight[w]
            for fresh in pairwise(after):
                change[fresh] += weight[w]
                where[fresh].add(w)
            spelt[w] = after
        for changed, delta in change.items():
            counts[changed] += delta
            if delta and counts[changed]:
                heapq.heappush(queue, (-counts[changed], changed))
    return ranks, merges


def join(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """`ids` with each `pair`, from left to right, replaced by `new`: join([1, 1, 1], (1, 1), 2) is [2, 1]."""
    joined, i = [], 0
    while i < len(ids):
        if i + 1 < len(ids) and ids[i] == pair[0] and ids[i + 1] == pair[1]:
            joined.append(new)
            i += 2
        else:
            joined.append(ids[i])
            i += 1
    return joined


def train(texts: Iterable[str], vocab_size: int, pattern: str = PATTERN) -> dict[bytes, int]:
    """Byte-level BPE ranks {piece: id}, ids 0 to len - 1, from the texts: what tiktoken calls mergeable_ranks.

    The 256 single bytes come first, in GPT-2's order (`byte_alphabet`), then the pieces in the order they were joined.
    A text too small for `vocab_size` pieces gives fewer, with a warning that says how many.
    Raises ValueError if vocab_size is below 257.
    """
    ranks, _ = learn(count_words(texts, pattern), vocab_size)
    if len(ranks) < vocab_size:
        warnings.warn(f"vocab_size {vocab_size}: the text has pairs for only {len(ranks)} pieces", stacklevel=2)
    return ranks
