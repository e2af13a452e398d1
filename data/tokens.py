"""Text as one long stream of token ids on disk, read through a memory map as if it were in memory.

Every document begins with `<|endoftext|>`, which thereby also ends the one before:

    eot d1 d1 d1 eot d2 d2 eot d3 ...        starts = [0, 4, 7, ...]

the convention of llm.c's and modded-nanogpt's shards. A corpus is tokenized once and cached under the hash of its text
and of the tokenizer, so that no other text or tokenizer can ever meet these ids.
"""

import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np
from tqdm import tqdm

from data.cache import cache_folder, content_hash, new_folder
from data.corpus import Document, documents, training_documents, validation_documents
from data.sources import Source, entries, resolve
from data.token_files import Stream, open_files
from data.tokenizer import Tokenizer

BATCH = 1 << 24  # characters tokenized together


@dataclass(frozen=True)
class Tokens:
    """A stream of ids and the documents in it.

    ids: (tokens,) memory-mapped, uint16 where the vocabulary fits, else uint32; or a `Stream` of several shards.
    starts: (documents,) int64, increasing: the positions where documents begin. The first is 0.
    domains: (domains,) int64, increasing: the positions where each kind of text begins; None where kinds are not told apart.
    """

    ids: np.ndarray | Stream
    starts: np.ndarray
    domains: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def split(self, position: int) -> tuple["Tokens", "Tokens"]:
        """The streams before and from `position`. A document cut in two is a document in both."""
        cut = int(np.searchsorted(self.starts, position))
        later = np.unique(np.append(0, self.starts[cut:] - position))
        return Tokens(self.ids[:position], self.starts[:cut]), Tokens(self.ids[position:], later)


def load(
    spec: str, tokenizer: Tokenizer, *, val_spec: str | None = None, cache: str | os.PathLike | None = None
) -> tuple[Tokens, Tokens]:
    """`(training, validation)` tokens of a `--data` spec: text (`data.corpus`) or token files (`data.token_files`).

    With `val_spec`, it is the validation set and `spec` is trained on whole. Without, text is split by document as
    `training_documents` says; of token files those with `val` in their name are for validation, and if none has, the
    last tenth of the stream, from the start of a document where there is one. Raises ValueError as those modules do.
    """
    if val_spec:
        return _all(spec, tokenizer, cache), _all(val_spec, tokenizer, cache)
    sources = resolve(spec, cache)
    if not _are_tokens(sources):
        return (
            tokenize(lambda: training_documents(spec, cache=cache), tokenizer, cache),
            tokenize(lambda: validation_documents(spec, cache=cache), tokenizer, cache),
        )
    validation = [source for source in sources if "val" in PurePath(source.name).name]
    training = [source for source in sources if source not in validation]
    if not training:
        raise ValueError(f"data {spec}: all files have `val` in their name, so none is left to train on")
    tokens = _files(training, tokenizer)
    if validation:
        return tokens, _files(validation, tokenizer)
    position = len(tokens) * 9 // 10
    before = tokens.starts[np.searchsorted(tokens.starts, position, side="right") - 1]
    return tokens.split(int(before) or position)


def load_domains(
    spec: str, tokenizer: Tokenizer, *, val_spec: str | None = None, cache: str | os.PathLike | None = None
) -> tuple[Tokens, Tokens]:
    """The same, each entry of the spec being a domain: a kind of text of its own, one tenth of which is for validation.

    ValueError where `val_spec` has not as many entries, besides.
    """
    specs = entries(spec)
    held = entries(val_spec) if val_spec else [None] * len(specs)
    if len(held) != len(specs):
        raise ValueError(f"val_data: {len(held)} entries, where --data has {len(specs)} domains")
    sides = zip(*(load(one, tokenizer, val_spec=val, cache=cache) for one, val in zip(specs, held, strict=True)), strict=True)
    training, validation = (_in_a_row(side) for side in sides)
    return training, validation


def _in_a_row(streams: Sequence[Tokens]) -> Tokens:
    """Streams one behind the other, each a domain."""
    arrays = [array for one in streams for array in (one.ids.arrays if isinstance(one.ids, Stream) else [one.ids])]
    begins = np.cumsum([0, *map(len, streams)])[:-1]
    starts = np.concatenate([one.starts + begin for one, begin in zip(streams, begins, strict=True)])
    return Tokens(Stream(arrays), starts, begins)


def tokenize(
    documents: Callable[[], Iterable[Document]], tokenizer: Tokenizer, cache: str | os.PathLike | None = None
) -> Tokens:
    """The documents as tokens, from the cache if this text was tokenized with this tokenizer before.

    documents: called once to hash the text and, if it is new, once more to tokenize it, on all cores, about `BATCH`
    characters in memory at a time. The cache entry is a folder that appears when it is complete; its ids.bin is a raw
    token file as nanoGPT writes them. Raises ValueError if there are no documents or a cached file has been altered.
    """
    key = content_hash(["tokens 1", tokenizer.fingerprint, content_hash(d.text for d in documents())])
    folder = cache_folder(cache) / "tokens" / key
    if not folder.is_dir():
        with new_folder(folder) as temporary:
            _write(documents(), tokenizer, temporary)
    return _read(folder)


def _write(documents: Iterable[Document], tokenizer: Tokenizer, folder: Path) -> None:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    eot, starts, count = np.array([tokenizer.eot], dtype).tobytes(), array("q"), 0
    with open(folder / "ids.bin", "wb") as file, tqdm(desc="tokenize", unit=" documents", disable=None) as bar:
        for texts in _batches(documents):
            for ids in tokenizer.encode_arrays(texts):
                starts.append(count)
                count += 1 + len(ids)
                file.write(eot + ids.astype(dtype).tobytes())
            bar.update(len(texts))
    if not starts:
        raise ValueError("documents: there are none to tokenize")
    np.save(folder / "starts.npy", np.frombuffer(starts, np.int64))
    (folder / "meta.json").write_text(json.dumps({"tokens": count, "documents": len(starts), "dtype": dtype.str}))


def _read(folder: Path) -> Tokens:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        ids = np.asarray(np.memmap(folder / "ids.bin", np.dtype(meta["dtype"]), "r"))
        starts = np.asarray(np.load(folder / "starts.npy", mmap_mode="r", allow_pickle=False))
        whole = len(ids) == meta["tokens"] and len(starts) == meta["documents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"token cache {folder} has been altered since it was written: delete it to have it made again")
    return Tokens(ids, starts)


def _batches(documents: Iterable[Document]) -> Iterator[list[str]]:
    """The texts, in lists of about BATCH characters."""
    texts, size = [], 0
    for document in documents:
        texts.append(document.text)
        size += len(document.text)
        if size >= BATCH:
            yield texts
            texts, size = [], 0
    if texts:
        yield texts


def _all(spec: str, tokenizer: Tokenizer, cache) -> Tokens:
    """Everything a spec names."""
    sources = resolve(spec, cache)
    if _are_tokens(sources):
        return _files(sources, tokenizer)
    return tokenize(lambda: documents(spec, cache), tokenizer, cache)


def _are_tokens(sources: list[Source]) -> bool:
    return all(source.kind == "tokens" for source in sources)


def _files(sources: list[Source], tokenizer: Tokenizer) -> Tokens:
    return Tokens(*open_files(sources, tokenizer.vocab_size, tokenizer.eot))
