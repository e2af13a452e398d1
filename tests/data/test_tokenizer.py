"""Tokenizers: any text and any bytes come back; specials cannot be forged; every kind of file loads or is refused."""

import warnings

import numpy as np
import pytest
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Tokenizer, load_tokenizer, python_library
from data.bpe import learn
from data.hf_tokenizer import GPT2_PATTERN
from data.tokenizer import _parts

WORDS = {b"hello": 9, b" world": 8, b" the": 20, b"aaaa": 3, "é".encode(): 5, b"    ": 6, b"<|end": 4}
RANKS, _ = learn(WORDS, 275)
BYTE = load_tokenizer("byte")
BPE = Tokenizer("tiny", RANKS)
both = pytest.mark.parametrize("tokenizer", [BYTE, BPE], ids=["byte", "bpe"])


@both
@given(st.text())
@settings(deadline=None)
def test_text_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.eot not in ids


@both
@given(st.binary())
@settings(deadline=None)
def test_bytes_round_trip(tokenizer, data):
    assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


@both
@given(st.lists(st.integers(0, 255)))
@settings(deadline=None)
def test_any_ids_decode(tokenizer, ids):
    assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def test_specials_in_text_are_ordinary_text():
    assert BYTE.eot not in BYTE.encode("a<|endoftext|>b")
    assert BYTE.encode_batch(["<|endoftext|>", ""]) == [list(b"<|endoftext|>"), []]
    assert BYTE.decode([104, 105, BYTE.eot]) == "hi<|endoftext|>"


def test_sizes():
    assert (BYTE.eot, BYTE.vocab_size) == (256, 257)
    assert BYTE.token_bytes.dtype == np.int64 and BYTE.token_bytes.tolist() == [1] * 256 + [0]
    gap = Tokenizer("gap", BYTE.ranks | {b"ab": 300}, specials={"<|endoftext|>": 400})
    assert (gap.vocab_size, len(gap.token_bytes)) == (401, 401)
    assert (gap.token_bytes[300], gap.token_bytes[256], gap.token_bytes[400]) == (2, 0, 0)


@pytest.mark.parametrize("ids", [[257], [-1], [2**40], [65, 300]])
def test_unknown_ids_are_named(ids):
    with pytest.raises(ValueError, match=f"ids: {ids[-1]} is no token of byte, which has 257"):
        BYTE.decode(ids)


def test_lone_surrogate_is_refused():
    with pytest.raises(ValueError, match="text: character 1 is a lone surrogate"):
        BPE.encode("a\ud800")


@pytest.mark.parametrize("unit", [" ", "\n", "a", "!", "ab ", "x\n\n  "])
def test_long_stretches(unit):
    """A million blanks overflow the stack of tiktoken's regular expressions; parts cut at word ends do not."""
    text = unit * (2_000_000 // len(unit))
    assert BPE.decode(BPE.encode(text)) == text
    assert BPE.encode_arrays([text, "b"])[0].tolist() == BPE.encode(text)


@given(st.lists(st.from_regex(r"[,._1]{0,2}[aé1]{1,3}[ \n\t]{1,3}[,._\n]{0,3}", fullmatch=True)), st.integers(12, 20))
@settings(max_examples=300, deadline=None)
def test_parts_encode_as_the_whole(pieces, limit):
    """Where a word ends in white space at least once every `limit` characters, cutting there changes nothing."""
    text = "".join(pieces)
    parts = _parts(text, limit)
    assert "".join(parts) == text and all(len(part) <= limit for part in parts)
    assert [i for part in parts for i in SPLITS.encode_ordinary(part)] == SPLITS.encode_ordinary(text)


# Every pair is a piece, so that a cut in the wrong place does show.
SPLITS = tiktoken.Encoding(
    "splits",
    pat_str=BPE.pattern,
    mergeable_ranks=BYTE.ranks | {bytes([a, b]): 256 + 128 * a + b for a in range(128) for b in range(128)},
    special_tokens={},
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(ranks={b"a": 0}), "single byte 0x00 is missing"),
        (dict(specials={"<|endoftext|>": 5}), "ids, specials' too, must differ"),
        (dict(specials={"<|endoftext|>": -1}), "must differ and be from 0"),
        (dict(specials={"<|endoftext|>": 1 << 24}), "must differ and be from 0 to 16777215"),
        (dict(specials={"<s>": 256}), r"<\|endoftext\|> is not among \['<s>'\]"),
        (dict(pattern="("), "pattern of x does not compile"),
    ],
)
def test_unsound_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(**{"name": "x", "ranks": BYTE.ranks} | change)


def test_save_and_load(tmp_path):
    BPE.save(tmp_path / "t")
    again = load_tokenizer(str(tmp_path / "t"))
    assert again.fingerprint == BPE.fingerprint != BYTE.fingerprint
    assert (again.name, again.ranks, again.specials, again.pattern) == ("tiny", BPE.ranks, BPE.specials, BPE.pattern)
    assert again.encode("hello the world") == BPE.encode("hello the world")
    plain = load_tokenizer(str(tmp_path / "t" / "tokenizer.tiktoken"))
    assert plain.ranks == BPE.ranks and plain.eot == len(BPE.ranks)
    published = tiktoken.load.load_tiktoken_bpe(str(tmp_path / "t" / "tokenizer.tiktoken"))
    assert published == BPE.ranks  # tiktoken itself reads the file


def test_fingerprint_sees_ranks_pattern_and_specials():
    others = [
        Tokenizer("tiny", BPE.ranks, pattern=GPT2_PATTERN),
        Tokenizer("tiny", BPE.ranks, specials={"<|endoftext|>": 999}),
        Tokenizer("tiny", {piece: i for i, piece in enumerate(reversed(BPE.ranks))}),
    ]
    assert len({t.fingerprint for t in [BPE, *others]}) == 4
    assert Tokenizer("other name", BPE.ranks).fingerprint == BPE.fingerprint


def test_damaged_files_are_named(tmp_path):
    BPE.save(tmp_path)
    ranks, config = tmp_path / "tokenizer.tiktoken", tmp_path / "tokenizer_settings.json"
    whole, settings_text = ranks.read_bytes(), config.read_text()
    ranks.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="tokenizer.tiktoken is not the file .* belongs to"):
        Tokenizer.load(tmp_path)
    ranks.write_bytes(whole.replace(b" 3\n", b" three\n"))
    with pytest.raises(ValueError, match="tokenizer.tiktoken line 4: expected a piece in base64"):
        load_tokenizer(str(ranks))
    ranks.unlink()
    with pytest.raises(ValueError, match="tokenizer.tiktoken is missing"):
        load_tokenizer(str(tmp_path))
    ranks.write_bytes(whole)
    for text in ["", "[]", "{}", settings_text.replace('"pattern"', '"p"'), settings_text.replace("275", '"x"')]:
        config.write_text(text)
        with pytest.raises(ValueError, match="tokenizer_settings.json is not the settings"):
            Tokenizer.load(tmp_path)


def test_bpe_is_trained_once(tmp_path, monkeypatch):
    texts = ["hello world, hello there. " * 20, "def hello(): pass\n" * 20]
    first = load_tokenizer("bpe", texts=lambda: iter(texts), vocab_size=270, cache=tmp_path)
    assert (first.vocab_size, first.eot) == (270, 269)
    monkeypatch.setattr("data.tokenizer.train", lambda *_: pytest.fail("trained again"))
    assert load_tokenizer("bpe", texts=lambda: iter(texts), vocab_size=270, cache=tmp_path).ranks == first.ranks
    with pytest.raises(pytest.fail.Exception):
        load_tokenizer("bpe", texts=lambda: iter(texts[:1]), vocab_size=270, cache=tmp_path)
    with pytest.raises(pytest.fail.Exception):
        load_tokenizer("bpe", texts=lambda: iter(texts), vocab_size=271, cache=tmp_path)
    with pytest.raises(ValueError, match="needs texts and vocab_size"):
        load_tokenizer("bpe")


def test_tiktoken_names(monkeypatch):
    """Known names go to tiktoken; a failed download is one line."""
    stand_in = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=BYTE.ranks, special_tokens=BYTE.specials)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: stand_in)
    assert load_tokenizer("gpt2").pattern == GPT2_PATTERN

    def offline(name):
        raise requests.ConnectionError("long\nstory")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match=r"^tokenizer cl100k_base: tiktoken could not download it[^\n]*$"):
        load_tokenizer("cl100k_base")


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_any_spec_loads_or_is_a_value_error(spec):
    try:
        load_tokenizer("./" + spec)
    except ValueError as error:
        assert "\n" not in str(error) or "\n" in spec


def test_default_corpus_round_trip():
    """Real text, with the shape of the vocabulary train.py uses, on a part of the default corpus."""
    texts = [document.text for document in python_library()][::30]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer("bpe", texts=lambda: texts, vocab_size=512)
    arrays = tokenizer.encode_arrays(texts)
    assert [tokenizer.decode(ids.tolist()) for ids in arrays] == texts
    assert all(ids.dtype == np.uint32 for ids in arrays)
    assert sum(map(len, arrays)) < 0.6 * sum(len(text.encode()) for text in texts)
