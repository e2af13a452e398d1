"""The incremental trainer equals one that recounts everything after each merge."""

from collections import Counter
from itertools import pairwise

import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data import bpe

# A small alphabet makes ties and overlaps (aaa) frequent.
corpora = st.dictionaries(st.text("aab c", min_size=1, max_size=12).map(str.encode), st.integers(1, 5), max_size=12)


def naive(words, vocab_size):
    """BPE as its definition says: count every pair of every word anew, take the best, write every word anew."""
    pieces = [bytes([byte]) for byte in bpe.byte_alphabet().values()]
    spelt = {word: [pieces.index(bytes([byte])) for byte in word] for word in words}
    merges = []
    while len(pieces) < vocab_size:
        counts = Counter()
        for word, ids in spelt.items():
            for pair in pairwise(ids):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        left, right = pieces[best[0]], pieces[best[1]]
        merges.append((left, right))
        if left + right not in pieces:
            pieces.append(left + right)
        for ids in spelt.values():
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i : i + 2] = [pieces.index(left + right)]
                i += 1
    return {piece: i for i, piece in enumerate(pieces)}, merges


@given(corpora, st.integers(257, 300))
@settings(max_examples=300, deadline=None)
def test_incremental_equals_naive(words, vocab_size):
    assert bpe.learn(words, vocab_size) == naive(words, vocab_size)


def test_ties_go_to_the_smaller_pair_of_ids():
    _, merges = bpe.learn({b"cd": 2, b"ab": 2, b"ac": 2}, 258)
    assert merges == [(b"a", b"b"), (b"a", b"c")]


def test_space_comes_after_letters_as_in_gpt2():
    """In GPT-2's byte order `!` is 0 and the space 220: so a tie between ` a` and `ab` goes to `ab`."""
    assert list(bpe.byte_alphabet().values()).index(ord(" ")) == 220
    assert bpe.byte_alphabet()["Ġ"] == ord(" ")
    assert sorted(bpe.byte_alphabet().values()) == list(range(256))
    assert bpe.learn({b" ab": 1}, 257)[1] == [(b"a", b"b")]


@given(corpora)
@settings(max_examples=200, deadline=None)
def test_no_piece_is_spelt_by_two_pairs(words):
    ranks, merges = bpe.learn(words, 10_000)
    assert len(merges) == len(ranks) - 256
    assert list(ranks.values()) == list(range(len(ranks)))
    assert list(ranks)[256:] == [left + right for left, right in merges]


def test_vocab_size_below_257_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 256.*at least 257"):
        bpe.train(["text"], 256)


def test_a_text_with_too_few_pairs_gives_fewer_pieces_and_says_so():
    with pytest.warns(UserWarning, match="vocab_size 300: the text has pairs for only 258 pieces"):
        assert list(bpe.train(["abc"], 300))[256:] == [b"ab", b"abc"]
    with pytest.warns(UserWarning, match="only 256"):
        assert len(bpe.train([], 300)) == 256


@given(st.lists(st.text(), max_size=5))
@settings(deadline=None)
def test_words_cover_the_text(texts):
    assert all("".join(regex.findall(bpe.PATTERN, text)) == text for text in texts)
    assert sum(len(word) * n for word, n in bpe.count_words(texts).items()) == sum(len(t.encode()) for t in texts)


def test_words_are_cut_as_gpt4_cuts_them():
    cut = regex.findall(bpe.PATTERN, "We'll see 12345 things:\n\n    don't   stop\t!")
    assert "|".join(cut) == "We|'ll| see| |123|45| things|:\n\n|   | don|'t|  | stop|\t|!"


@given(st.lists(st.text("abc ", max_size=30), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
@pytest.mark.filterwarnings("ignore:vocab_size")
def test_tiktoken_encodes_the_training_text_with_the_pieces_learnt(texts):
    ranks = bpe.train(texts, 280)
    encoding = tiktoken.Encoding("t", pat_str=bpe.PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert all(encoding.decode(encoding.encode_ordinary(text)) == text for text in texts)
