"""Token streams: the cache holds exactly the text, whole or not at all; every format of file is read or refused."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import Document, Tokenizer, Tokens, load, load_domains, load_tokenizer, tokenize, windows, write_shard
from data.sources import Source
from data.token_files import Stream, open_files

BYTE = load_tokenizer("byte")
ROOT = Path(__file__).parents[2]


def stream(texts):
    """What a corpus must become, spelt out: eot before every document."""
    ids, starts = [], []
    for text in texts:
        starts.append(len(ids))
        ids += [256, *text.encode()]
    return ids, starts


# --- tokenize and its cache --------------------------------------------------------------------------------------


@given(st.lists(st.text(max_size=20), min_size=1, max_size=8), st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_tokens_are_the_text(texts, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.tokens.BATCH", batch)
        for _ in ("written", "read from the cache"):
            tokens = tokenize(lambda: (Document(str(n), text) for n, text in enumerate(texts)), BYTE)
            assert (tokens.ids.tolist(), tokens.starts.tolist()) == stream(texts)
            assert tokens.ids.dtype == np.uint16 and tokens.starts.dtype == np.int64


def test_large_vocabularies_take_uint32(tmp_path):
    wide = Tokenizer("wide", BYTE.ranks, specials={"<|endoftext|>": 1 << 16})
    tokens = tokenize(lambda: [Document("", "a")], wide, tmp_path)
    assert tokens.ids.dtype == np.uint32 and tokens.ids.tolist() == [1 << 16, 97]


def test_cache_is_keyed_by_text_and_tokenizer(tmp_path):
    calls = []

    def once(texts, tokenizer):
        tokenize(lambda: (calls.append(1), [Document("", text) for text in texts])[1], tokenizer, tmp_path)
        passes, calls[:] = len(calls), []
        return passes  # one to hash; a second one only if it had to be made

    other = Tokenizer("other", BYTE.ranks, pattern=r"[\s\S]")
    assert [once(["ab"], BYTE), once(["ab"], BYTE)] == [2, 1]
    assert [once(["a", "b"], BYTE), once(["ab"], other), once(["ab "], BYTE)] == [2, 2, 2]
    assert [once(["a", "b"], BYTE), once(["ab"], other), once(["ab"], BYTE)] == [1, 1, 1]


def test_no_documents_leave_no_cache(tmp_path):
    with pytest.raises(ValueError, match="documents: there are none"):
        tokenize(lambda: [], BYTE, tmp_path)
    assert not list((tmp_path / "tokens").iterdir())


def test_a_failing_writer_leaves_no_cache(tmp_path):
    def documents():
        yield Document("", "fine")
        if next(calls):
            raise RuntimeError("disk on fire")

    calls = iter([False, True, False, False])
    with pytest.raises(RuntimeError):
        tokenize(documents, BYTE, tmp_path)
    assert not list((tmp_path / "tokens").iterdir())
    assert tokenize(documents, BYTE, tmp_path).ids.tolist() == [256, *b"fine"]


def test_killed_writers_leave_nothing_that_is_taken_for_a_cache(tmp_path):
    """SIGKILL a writer after each of its documents; the next one finds no cache and makes the right one."""
    program = textwrap.dedent("""
        import sys
        import data.tokens
        from data import Document, load_tokenizer, tokenize
        data.tokens.BATCH = 1
        calls, texts = [], ["one", "two", "three"]
        def documents():
            calls.append(1)
            for text in texts:
                yield Document("", text)
                if len(calls) == 2:
                    print(text, flush=True)
                    sys.stdin.readline()
        tokenize(documents, load_tokenizer("byte"), sys.argv[1])
    """)
    for survive in (0, 1, 2):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT, **pipes) as writer:
            for _ in range(survive):
                writer.stdout.readline()
                writer.stdin.write("\n")
                writer.stdin.flush()
            assert writer.stdout.readline()  # it is in the middle of writing
            writer.send_signal(signal.SIGKILL)
    left = list((tmp_path / "tokens").iterdir())
    assert left and all(folder.name.startswith(".") for folder in left)
    texts = ["one", "two", "three"]
    tokens = tokenize(lambda: [Document("", text) for text in texts], BYTE, tmp_path)
    assert (tokens.ids.tolist(), tokens.starts.tolist()) == stream(texts)


def test_two_writers_at_once(tmp_path):
    """A second process that finishes first, while we are in the middle, changes nothing."""
    texts, calls = ["some", "text"], []

    def documents():
        calls.append(1)
        for text in texts:
            if len(calls) == 2 and text == "text":
                tokenize(lambda: [Document("", t) for t in texts], BYTE, tmp_path)
            yield Document("", text)

    assert tokenize(documents, BYTE, tmp_path).ids.tolist() == stream(texts)[0]
    assert len(list((tmp_path / "tokens").iterdir())) == 1


@pytest.mark.parametrize("name", ["ids.bin", "starts.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["shorten", "empty", "remove"])
def test_altered_cache_is_named(tmp_path, name, damage):
    def again():
        return tokenize(lambda: [Document("", "text"), Document("", "more")], BYTE, tmp_path)

    again()
    (folder,) = (tmp_path / "tokens").iterdir()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-2] if damage == "shorten" else b"")
    if damage == "remove":
        os.unlink(folder / name)
    with pytest.raises(ValueError, match=f"token cache {folder} has been altered"):
        again()


# --- load --------------------------------------------------------------------------------------------------------


def test_load_text(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"{n}\n" for n in range(10)))
    training, validation = load(f"{tmp_path}/book.txt", BYTE)
    assert (training.ids.tolist(), validation.ids.tolist()) == ([256, *b"0\n1\n2\n3\n4\n5\n6\n7\n8\n"], [256, *b"9\n"])
    training, validation = load(f"{tmp_path}/book.txt", BYTE, val_spec=f"{tmp_path}/*.txt")
    assert training.ids.tolist() == validation.ids.tolist() == stream([(tmp_path / "book.txt").read_text()])[0]


def test_load_token_files(tmp_path):
    for name, ids in {"train_000.bin": [256, 1, 2], "train_001.bin": [3, 256, 4], "val_000.bin": [256, 5]}.items():
        write_shard(tmp_path / name, np.array(ids, np.uint16))
    for spec in (tmp_path, f"{tmp_path}/*.bin", f"{tmp_path}/train_000.bin,{tmp_path}/train_001.bin,{tmp_path}/val*"):
        training, validation = load(str(spec), BYTE)
        assert training.ids[np.arange(6)].tolist() == [256, 1, 2, 3, 256, 4]
        assert training.starts.tolist() == [0, 4] and validation.ids.tolist() == [256, 5]
    training, validation = load(f"{tmp_path}/train_000.bin", BYTE, val_spec=f"{tmp_path}/val_000.bin")
    assert (training.ids.tolist(), validation.ids.tolist()) == ([256, 1, 2], [256, 5])
    with pytest.raises(ValueError, match="all files have `val` in their name"):
        load(f"{tmp_path}/val*", BYTE)


@pytest.mark.parametrize("shards", [1, 3])
def test_last_tenth_of_a_stream(tmp_path, shards):
    ids = np.full(100, 7, np.uint16)
    ids[[0, 50, 85, 97]] = 256
    for n, part in enumerate(np.array_split(ids, shards)):
        part.tofile(tmp_path / f"{n}.bin")
    training, validation = load(str(tmp_path), BYTE)
    assert (len(training), len(validation)) == (85, 15)  # from the last document that begins before token 90
    assert (training.starts.tolist(), validation.starts.tolist()) == ([0, 50], [0, 12])
    assert validation.ids[np.arange(15)].tolist() == ids[85:].tolist()
    ids[:] = 7  # no document begins anywhere: exactly the last tenth
    for n, part in enumerate(np.array_split(ids, shards)):
        part.tofile(tmp_path / f"{n}.bin")
    assert [len(tokens) for tokens in load(str(tmp_path), BYTE)] == [90, 10]


@given(st.sets(st.integers(1, 30)), st.integers(1, 30))
def test_split_keeps_every_document_start(starts, position):
    ids = np.arange(31)
    whole = Tokens(ids, np.array(sorted({0} | starts)))
    before, after = whole.split(position)
    assert before.ids.tolist() + after.ids.tolist() == ids.tolist()
    assert after.starts[0] == 0
    assert {*before.starts.tolist(), *(after.starts + position).tolist()} == {0, position} | starts


# --- token files -------------------------------------------------------------------------------------------------


def opened(path, option=None, vocab_size=70_000, eot=256):
    return open_files([Source(path.name, path, "tokens", option)], vocab_size, eot)


@given(st.lists(st.integers(0, 65_535), min_size=1, max_size=20), st.sampled_from(["u2", "u4"]))
@settings(max_examples=60, deadline=None)
def test_formats_round_trip(tmp_path_factory, ids, dtype):
    folder, array = tmp_path_factory.getbasetemp(), np.array(ids, dtype)
    array.tofile(folder / "raw.bin")
    write_shard(folder / "shard.bin", array)
    np.save(folder / "array.npy", array)
    np.save(folder / "signed.npy", array.astype(np.int64))
    starts = sorted({0} | {i for i, token in enumerate(ids) if token == 256})
    for name in ("raw.bin", "shard.bin", "array.npy", "signed.npy"):
        found, begins = opened(folder / name, "uint32" if name == "raw.bin" and dtype == "u4" else None)
        assert (found.tolist(), begins.tolist()) == (ids, starts)
        assert isinstance(found.base, np.memmap)  # mapped, not copied


def test_header_is_the_published_one(tmp_path):
    for dtype, magic, version in [(np.uint16, 20240520, 1), (np.uint32, 20240801, 7)]:
        write_shard(tmp_path / "s.bin", np.array([5, 6, 7], dtype))
        raw = (tmp_path / "s.bin").read_bytes()
        header = np.frombuffer(raw[:1024], "<i4")
        assert header[:4].tolist() == [magic, version, 3, 0] and len(header) == 256
        assert np.frombuffer(raw[1024:], dtype).tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="ids: int64"):
        write_shard(tmp_path / "s.bin", np.arange(3))


def header(magic, version, count):
    return np.array([magic, version, count] + [0] * 253, "<i4").tobytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.bin", b"", "holds no tokens"),
        ("a.bin", b"abc", "3 bytes are no whole number of uint16 tokens"),
        ("a.bin#uint32", b"abcdef", "6 bytes are no whole number of uint32 tokens"),
        ("a.bin", header(20240520, 1, 3) + b"\0" * 4, "header counts 3 tokens, but 2 follow"),
        ("a.bin", header(20240520, 1, 3) + b"\0" * 7, "header counts 3 tokens, but 3.5 follow"),
        ("a.bin", header(20240520, 1, 1) + b"\0" * 4, "header counts 1 tokens, but 2 follow"),
        ("a.bin", header(20240520, 1, -1), "header counts -1 tokens"),
        ("a.bin", header(20240520, 1, 0), "holds no tokens"),
        ("a.bin", header(20240520, 2, 0), "shard version 2; of magic 20240520 only 1 is known"),
        ("a.bin", header(20240801, 1, 0), "shard version 1; of magic 20240801 only 7 is known"),
        ("a.bin#uint32", header(20240520, 1, 1) + b"\0\0", "#uint32, but its header says uint16"),
        ("a.bin", b"\0\0\x01\x01", "token 1 is 257, but the tokenizer has ids 0 to 256"),
        ("a.npy", b"no array", "not a whole .npy file of integers"),
        ("a.npy", b"", "not a whole .npy file of integers"),
        ("a.npy", np.zeros(3), "holds float64 .3,.; expected one dimension of integers"),
        ("a.npy", np.zeros((2, 2), int), "holds int64 .2, 2.; expected one dimension"),
        ("a.npy", np.zeros(0, int), "holds no tokens|not a whole"),
        ("a.npy", np.array([3, -1]), "token 1 is -1, but the tokenizer has ids 0 to 256"),
        ("a.npy", np.array([None]), "not a whole .npy file of integers"),
    ],
)
def test_malformed_token_files(tmp_path, name, content, message):
    path = tmp_path / name.partition("#")[0]
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ValueError, match=message) as caught:
        load(f"{tmp_path}/{name}", BYTE)
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_ids_are_checked_to_the_last(tmp_path, monkeypatch):
    monkeypatch.setattr("data.token_files.SCAN", 4)
    ids = np.zeros(11, np.uint16)
    ids[[4, 9]] = 256
    ids.tofile(tmp_path / "a.bin")
    assert opened(tmp_path / "a.bin")[1].tolist() == [0, 4, 9]
    ids[10] = 300
    ids.tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="token 10 is 300"):
        opened(tmp_path / "a.bin", vocab_size=257)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.data())
@settings(max_examples=200, deadline=None)
def test_a_stream_of_shards_reads_as_one_array(lengths, data):
    whole = np.arange(sum(lengths), dtype=np.uint32)
    view = Stream(np.split(whole, np.cumsum(lengths)[:-1]))
    assert len(view) == len(whole)
    start, stop = data.draw(st.tuples(*[st.integers(-40, 40) | st.none()] * 2))
    part = view[start:stop]
    assert len(part) == len(whole[start:stop])
    if len(part):
        index = np.array(data.draw(st.lists(st.lists(st.integers(0, len(part) - 1), min_size=3, max_size=3), max_size=4)))
        index = index.astype(np.int64).reshape(-1, 3)
        assert np.array_equal(part[index], whole[start:stop][index])


# --- kinds of text -----------------------------------------------------------------------------------------------


def test_each_entry_of_a_spec_is_a_domain(tmp_path):
    """One tenth of each is for validation, as if it stood alone; a row knows of each token which kind it is of."""
    texts = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for number, text in enumerate(texts):
        text.write_text(f"line {number}\n" * 20 * (number + 1))
    spec = ",".join(map(str, texts))
    alone = [load(str(text), BYTE, cache=tmp_path) for text in texts]
    for side, tokens in enumerate(load_domains(spec, BYTE, cache=tmp_path)):
        parts = [pair[side] for pair in alone]
        assert tokens.ids[np.arange(len(tokens))].tolist() == [id for part in parts for id in part.ids.tolist()]
        assert np.diff([*tokens.domains, len(tokens)]).tolist() == [len(part) for part in parts]
        assert set(tokens.domains) <= set(tokens.starts)
        assert (tokens.ids[tokens.starts] == BYTE.eot).all()
        every = np.repeat(range(3), [len(part) for part in parts])
        batches = list(windows(tokens, batch_size=4, seq_len=7))
        assert torch.cat([batch.domains.flatten() for batch in batches])[: len(every)].tolist() == every.tolist()
    held = load_domains(spec, BYTE, val_spec=",".join(map(str, reversed(texts))), cache=tmp_path)[1]
    assert held.ids[np.arange(5)].tolist() == [256, *b"line"] and held.domains[1] == 1 + 60 * len("line 2\n")
    with pytest.raises(ValueError, match="^val_data: 2 entries, where --data has 3 domains"):
        load_domains(spec, BYTE, val_spec=",".join(map(str, texts[:2])), cache=tmp_path)
