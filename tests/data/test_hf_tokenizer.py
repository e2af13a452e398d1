"""A Hugging Face tokenizer.json: GPT-2's and Llama 3's forms are read, all else is refused in one line."""

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import load_tokenizer
from data.bpe import byte_alphabet, learn
from data.hf_tokenizer import GPT2_PATTERN

WORDS = {b"hello": 9, b" world": 8, b" the": 20, b"aaaa": 3, "é".encode(): 5, b"    ": 6, b"<|end": 4}
RANKS, MERGES = learn(WORDS, 275)
SPELL = {byte: char for char, byte in byte_alphabet().items()}


def spell(piece):
    return "".join(SPELL[byte] for byte in piece)


def hf_document(pattern=None):
    """A tokenizer.json as the `tokenizers` package writes it, of GPT-2's form or, with a pattern, of Llama 3's."""
    vocab = {spell(piece): i for piece, i in RANKS.items()}
    merges = [[spell(left), spell(right)] for left, right in MERGES]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern is None}
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    eot = "<|endoftext|>" if pattern is None else "<|end_of_text|>"
    added = {"id": len(vocab), "content": eot, "single_word": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]} if pattern else byte_level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "vocab": vocab | ({eot: len(vocab)} if pattern is None else {}),  # GPT-2's vocabulary lists it too
            "merges": merges if pattern else [" ".join(merge) for merge in merges],
        },
    }


@pytest.mark.parametrize("pattern", [None, r"\p{L}+|\P{L}"], ids=["gpt2", "llama3"])
def test_hugging_face_file(tmp_path, pattern):
    (tmp_path / "tokenizer.json").write_text(json.dumps(hf_document(pattern)))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(str(path))
        assert loaded.ranks == RANKS
        assert loaded.pattern == (pattern or GPT2_PATTERN)
        assert (loaded.eot, loaded.vocab_size) == (275, 276)
        assert loaded.decode(loaded.encode("hello wörld\n")) == "hello wörld\n"


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("model", "type"), "Unigram", "the model is Unigram; only byte-level BPE"),
        (("model", "byte_fallback"), True, r"BPE with byte fallback \(sentencepiece\)"),
        (("normalizer",), {"type": "NFC"}, r"changes text before encoding \(normalizer NFC\)"),
        (("added_tokens",), [], "no added token named"),
        (("added_tokens", 0), {"content": "oh", "id": 280, "special": False, "normalized": True}, "as 'oh' are words"),
        (("pre_tokenizer", "add_prefix_space"), True, "pre_tokenizer .'ByteLevel'. so set"),
        (("pre_tokenizer",), None, "pre_tokenizer .None. so set"),
        (("pre_tokenizer",), {"type": "Metaspace"}, "pre_tokenizer .'Metaspace'. so set"),
        (("model", "vocab", "▁the"), 900, "not spelt in the byte alphabet"),
        (("model", "vocab", "A"), 900, None),
        (("model", "vocab", "he"), 999, "out of order"),
        (("model", "vocab", "A"), "x", r"not a tokenizer.json \(TypeError"),
        (("model",), {}, r"not a tokenizer.json \(KeyError: 'vocab'"),
        (("model", "merges"), [["q", "zz"]], r"not a tokenizer.json \(KeyError"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path, where, value, message):
    document = hf_document()
    node = document
    for key in where[:-1]:
        node = node[key]
    node[where[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    if message is None:
        assert load_tokenizer(str(tmp_path)).vocab_size == 901
        return
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
DOCUMENT = hf_document(r"\w+|\W")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_mangled_files_give_value_errors(tmp_path_factory, data):
    """Replace any one part of a good file by any JSON: it loads or is refused in one line."""
    document = copy.deepcopy(DOCUMENT)
    node = document
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], (dict, list)) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "mangled.json"
    path.write_text(json.dumps(document))
    try:
        load_tokenizer(str(path))
    except ValueError:
        pass
