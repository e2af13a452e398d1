"""Clusters of texts: what they are made of, what the command writes, what comes back from a folder, and contexts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data import documents, load_tokenizer, tokenize, training_documents, validation_documents, windows
from data.balanced import balanced_kmeans
from data.cluster import Clusters, main, telling_words
from data.contexts import context_distances, last_document, measured_windows
from data.contexts import main as measure
from data.corpus import Document
from data.tfidf import fit_embedding

ROOT = Path(__file__).parents[2]
TOPICS = ["apple pear plum cherry quince", "iron copper zinc silver lead", "oboe flute harp viola drum"]


def corpus(size: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
    """Texts of nine words of one topic and three words of any, and their topics."""
    random = np.random.default_rng(seed)
    topics = random.integers(len(TOPICS), size=size)
    every = " ".join(TOPICS).split()
    return [" ".join([*random.choice(TOPICS[t].split(), 9), *random.choice(every, 3)]) for t in topics], topics


@pytest.fixture(scope="module")
def clusters() -> Clusters:
    return Clusters.fit(corpus(91)[0], 3)


@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_topics_are_found_in_equal_parts(scaling):
    texts, topics = corpus(91)
    clusters = Clusters.fit(iter(texts), 3, seed=1, scaling=scaling)
    assert sorted(np.bincount(clusters.labels)) == [30, 30, 31]
    table = np.array([[((clusters.labels == j) & (topics == t)).sum() for t in range(3)] for j in range(3)])
    assert table.max(1).sum() > 0.8 * 91 and set(table.argmax(1)) == {0, 1, 2}
    later, kinds = corpus(200, seed=5)  # each to its nearest, by chance 1 in 3 rightly
    homes = clusters.assign(later)
    assert (table.argmax(1)[homes] == kinds).mean() > (0.9 if scaling == "unit" else 0.75)  # `standard` lifts what is noise
    for j, words in enumerate(telling_words(clusters, 3)):
        assert set(words) <= set(TOPICS[table[j].argmax()].split())


def test_distances(clusters):
    texts = [*corpus(7, seed=3)[0], "", "nothing known"]
    points, distances = clusters.embedding(texts), clusters.distances(texts)
    expected = [[np.linalg.norm(point - centre) for centre in clusters.centres] for point in points]
    np.testing.assert_allclose(distances, expected, atol=1e-12)
    assert (clusters.assign(texts) == np.argmin(expected, 1)).all()
    assert clusters.distances([]).shape == (0, 3) and len(clusters.assign([])) == 0


def test_the_seed_draws_everything():
    texts, labels = corpus(60)[0], []
    for seed in (2, 2, 3):
        clusters = Clusters.fit(texts, 4, seed, restarts=1)
        expected = balanced_kmeans(fit_embedding(texts, seed=seed)[1], 4, seed=seed, restarts=1)
        assert np.array_equal(clusters.labels, expected[0]) and np.array_equal(clusters.centres, expected[1])
        labels.append(clusters.labels)
    assert np.array_equal(labels[0], labels[1]) and not np.array_equal(labels[0], labels[2])


@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_a_round_trip_is_exact(tmp_path, scaling):
    texts = [*corpus(40)[0], "ünï \U0001d7d9x ünï"]
    clusters = Clusters.fit(texts, 2, scaling=scaling)
    clusters.save(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    again = Clusters.load(tmp_path)
    assert again.embedding.words == clusters.embedding.words and again.embedding.scaling == scaling
    assert np.array_equal(again.distances(texts), clusters.distances(texts)) and np.array_equal(again.labels, clusters.labels)
    assert again.centres.dtype == np.float64


def test_damaged_folders_are_named(clusters, tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=f"^clusters: .*{message}") as caught:
            Clusters.load(tmp_path)
        assert "\n" not in str(caught.value)

    refused("clusters.safetensors' cannot be read")
    clusters.save(tmp_path)
    told = json.loads((tmp_path / "clusters.json").read_text())
    for broken in ("{", "[]", "{}", json.dumps(told | dict(scaling="none")), json.dumps(told | dict(words=told["words"][1:])),
                   json.dumps(told | dict(format="other"))):  # fmt: skip
        (tmp_path / "clusters.json").write_text(broken)
        refused("are not of clusters of ours")
    (tmp_path / "clusters.json").unlink()
    refused("clusters.json' cannot be read")
    clusters.save(tmp_path)
    whole = (tmp_path / "clusters.safetensors").read_bytes()
    (tmp_path / "clusters.safetensors").write_bytes(whole[:-9])
    refused("clusters.safetensors' cannot be read")


def test_bad_input():
    texts = corpus(5)[0]
    for k in (0, 6, -1):
        with pytest.raises(ValueError, match="^k: "):
            Clusters.fit(texts, k)


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    """Texts in files of a folder."""
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(corpus(60)[0]):
        (tmp_path / "texts" / f"{number}.txt").write_text(text + "\n")
    return tmp_path


def test_the_command_writes_what_training_reads(folder, capsys):
    """The documents of `--data`: those for training, once each in the file of their cluster, and those for validation."""
    spec, out = str(folder / "texts"), folder / "out"
    assert main(["--data", spec, "--k", "3", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    training, validation = (sorted(d.text for d in side(spec)) for side in (training_documents, validation_documents))
    parts = [[d.text for d in documents(str(out / f"cluster-{j}.jsonl"))] for j in range(3)]
    assert sorted(text for part in parts for text in part) == training and validation
    assert sorted(d.text for d in documents(str(out / "validation.jsonl"))) == validation
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    read = Clusters.load(out)
    fitted = Clusters.fit([d.text for d in training_documents(spec)], 3)
    assert np.array_equal(read.centres, fitted.centres)
    for j, part in enumerate(parts):
        assert f"{j:>8} {len(part):>10} {sum(map(len, part)):>12,}" in printed
    assert main(["--data", spec, "--k", "3", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_other_documents_for_validation(folder):
    val = folder / "val.txt"
    val.write_text("apple zinc\n")
    assert main(["--data", str(folder / "texts"), "--val-data", str(val), "--k", "2", "--out", str(folder / "out")]) == 0
    assert [d.text for d in documents(str(folder / "out/validation.jsonl"))] == ["apple zinc\n"]
    assert sum(len(list(documents(str(folder / f"out/cluster-{j}.jsonl")))) for j in range(2)) == 60


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data {}/absent --k 2 --out {}/out", "data: "),
        ("--data {}/texts --k 0 --out {}/out", "k: 0 clusters"),
        ("--data {}/texts --k 99 --out {}/out", "k: 99 clusters of"),
        ("--data {}/texts --k 2 --dims 0 --out {}/out", "dims: 0"),
        ("--data {}/texts --k 2 --common 2 --out {}/out", "common: 2.0"),
        ("--data {}/texts --k two --out {}/out", "argument --k: invalid int value: 'two'"),
        ("--data {}/texts --k 2 --scaling no --out {}/out", "argument --scaling"),
        ("--data {}/texts --out {}/out", "the following arguments are required: --k"),
        ("--data {}/texts --k 2 --out {}/texts/0.txt/out", "Not a directory"),
    ],
)
def test_mistakes_are_one_line_and_status_2(folder, capsys, flags, message):
    try:
        status = main(flags.replace("{}", str(folder)).split())
    except SystemExit as ended:
        status = ended.code
    err = capsys.readouterr().err
    assert status == 2 and message in err and err.count("\n") == 1, err
    assert not (folder / "out").exists()


# --- contexts ----------------------------------------------------------------------------------------------------


def test_last_document():
    assert last_document([1, 2, 3], 9) == [1, 2, 3] and last_document([1, 9, 2, 9, 3, 4], 9) == [3, 4]
    assert last_document([9], 9) == [] and last_document([], 9) == [] and last_document([9, 9, 5], 9) == [5]


def test_a_context_is_the_text_of_its_last_document(clusters):
    tokenizer = load_tokenizer("byte")
    eot, texts = tokenizer.eot, corpus(2)[0]
    first, second = map(tokenizer.encode, texts)
    distances = context_distances(clusters, tokenizer)([torch.tensor(ids) for ids in ([*first, eot, *second], first, [eot])])
    np.testing.assert_array_equal(distances.numpy(), clusters.distances([texts[1], texts[0], ""]))


def test_measured_windows(clusters):
    """Distance number p of a window is that of the text up to and with its input p * stride, whatever comes later."""
    tokenizer, texts = load_tokenizer("byte"), corpus(4)[0]
    tokens = tokenize(lambda: (Document(str(i), text) for i, text in enumerate(texts)), tokenizer)
    found = measured_windows(clusters, tokenizer, tokens, seq_len=50, stride=7)
    (batch,) = windows(tokens, batch_size=99, seq_len=50)
    assert all(torch.equal(found[name], getattr(batch, name)) for name in batch._fields)
    assert found["distances"].shape == (len(batch.inputs), 8, 3) and found["distances"].dtype == torch.float64
    for row, measured in zip(batch.inputs.tolist(), found["distances"], strict=True):
        for p in range(8):
            said = bytes(i for i in last_document(row[: 7 * p + 1], tokenizer.eot)).decode()
            np.testing.assert_array_equal(measured[p].numpy(), clusters.distances([said])[0])
    assert found["stride"] == 7 and found["token_bytes"].tolist() == [1] * 256 + [0]
    with pytest.raises(ValueError, match="^stride: 0"):
        measured_windows(clusters, tokenizer, tokens, seq_len=50, stride=0)


def test_the_command_that_measures(folder, capsys):
    out, file = folder / "out", folder / "contexts.safetensors"
    assert main(["--data", str(folder / "texts"), "--k", "2", "--out", str(out)]) == 0
    flags = ["--clusters", str(out), "--tokenizer", "byte", "--seq-len", "32", "--stride", "8"]
    assert measure([*flags, "--out", str(file)]) == 0
    tokenizer = load_tokenizer("byte")
    tokens = tokenize(lambda: documents(str(out / "validation.jsonl")), tokenizer)
    expected = measured_windows(Clusters.load(out), tokenizer, tokens, seq_len=32, stride=8)
    found = load_file(file)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert measure([*flags, "--data", str(folder / "texts/0.txt"), "--tokens", "40", "--out", str(folder / "other")]) == 0
    assert load_file(folder / "other")["inputs"].shape == (2, 32)
    capsys.readouterr()
    for change, message in (
        (["--out", str(file)], "out: "),
        (["--out", str(folder / "new"), "--stride", "0"], "stride: 0"),
        (["--out", str(folder / "new"), "--clusters", str(folder)], "clusters: "),
        (["--out", str(folder / "new"), "--tokenizer", "absent"], "tokenizer absent"),
        (["--out", str(folder / "new"), "--seq-len", "0"], "seq_len is 0"),
        (["--out", str(folder / "absent" / "new")], "absent"),
    ):
        assert measure([*flags, *change]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and not (folder / "new").exists(), err


def test_it_runs_as_a_module(folder):
    command = [sys.executable, "-m", "data.cluster", "--data", str(folder / "texts"), "--k", "2", "--out", str(folder / "out")]
    ended = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0 and (folder / "out" / "cluster-1.jsonl").exists(), ended.stderr
