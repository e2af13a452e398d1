"""Against the `tokenizers` package: the same merges from the same words, the same ids from the same tokenizer.json."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import load_tokenizer, python_library
from data.bpe import byte_alphabet, count_words, learn

tokenizers = pytest.importorskip("tokenizers")
SPELL = {byte: char for char, byte in byte_alphabet().items()}
TEXTS = [document.text for document in python_library()][::8]


def theirs(words, vocab_size, specials=()):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(specials),
        show_progress=False,
    )
    tokenizer.train_from_iterator((word.decode() for word, n in words.items() for _ in range(n)), trainer)
    return tokenizer, json.loads(tokenizer.to_str())["model"]


def assert_equal(words, vocab_size):
    ranks, merges = learn(words, vocab_size)
    _, model = theirs(words, vocab_size)
    assert [["".join(SPELL[b] for b in side) for side in merge] for merge in merges] == [list(m) for m in model["merges"]]
    assert {"".join(SPELL[b] for b in piece): i for piece, i in ranks.items()} == model["vocab"]


def test_merges_on_real_text():
    assert_equal(count_words(TEXTS), 4096)


@given(st.dictionaries(st.text("ab é", min_size=1, max_size=12).map(str.encode), st.integers(1, 5), max_size=10))
@settings(max_examples=100, deadline=None)
def test_merges_with_ties(words):
    assert_equal(words, 290)


@pytest.mark.parametrize("form", ["gpt2", "llama3"])
def test_tokenizer_json(tmp_path, form):
    eot = "<|endoftext|>" if form == "gpt2" else "<|end_of_text|>"
    tokenizer, _ = theirs(count_words(TEXTS[:20]), 1000, [eot])
    if form == "gpt2":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern + r"|\s+(?!\S)|\s+"), "isolated")
        byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(str(tmp_path))
    assert (ours.vocab_size, ours.eot) == (tokenizer.get_vocab_size(), tokenizer.token_to_id(eot))
    for text in [*TEXTS[20:30], "naïve café 12345 \n\n  x 日本語"]:
        ids = tokenizer.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == tokenizer.decode(ids) == text
