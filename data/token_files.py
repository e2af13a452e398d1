"""Files that hold token ids rather than text, opened in place: memory-mapped, never copied.

- `.bin` with a header of 256 int32 (magic, version, count of tokens, zeros), then the tokens: the shards of llm.c and
  modded-nanogpt (magic 20240520, version 1, uint16) and llm.c's for Llama 3 (magic 20240801, version 7, uint32).
- `.bin` without: raw little-endian uint16, as nanoGPT writes it, or uint32 if the spec says `#uint32`.
- `.npy`: one dimension, any integer type.

In all of them a document begins where `<|endoftext|>` stands.
"""

from collections.abc import Sequence

import numpy as np

from data.sources import Source

HEADER_INTS = 256
SHARDS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic: (version, dtype)
SCAN = 1 << 24  # tokens looked at together


class Stream:
    """Several arrays of ids read as one, without joining them: `len`, and indexing by slices or by arrays of int64."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = list(arrays)
        self.bounds = np.cumsum([0, *map(len, self.arrays)])  # array n holds positions bounds[n] to bounds[n + 1] - 1
        self.dtype = np.dtype(np.uint32)  # any id fits

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, index: slice | np.ndarray):
        """A slice gives a `Stream` that shares the arrays; an index array gives ids of the same shape."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"index: a stream is sliced in steps of 1, not {step}")
            pieces = zip(self.arrays, self.bounds[:-1], strict=True)
            return Stream([a[max(start - first, 0) : max(stop - first, 0)] for a, first in pieces])
        ids = np.empty(index.shape, self.dtype)
        home = np.searchsorted(self.bounds, index, side="right") - 1
        for n in np.unique(home):
            here = home == n
            ids[here] = self.arrays[n][index[here] - self.bounds[n]]
        return ids


def open_files(sources: Sequence[Source], vocab_size: int, eot: int) -> tuple[np.ndarray | Stream, np.ndarray]:
    """`(ids, starts)`: the files as one stream, and the positions (int64) where documents begin.

    Reads every file through once, to check that all ids are below vocab_size and to find the documents (about a second
    a gigabyte). Raises ValueError naming the file: a length that is not what the header says or no whole number of
    tokens, an unknown version, an empty file, an array that is not one of integers, an id out of range.
    """
    arrays, starts, first = [], [np.zeros(1, np.int64)], 0
    for source in sources:
        array = _open(source)
        for begin in range(0, len(array), SCAN):
            chunk = array[begin : begin + SCAN]
            if chunk.max() >= vocab_size or chunk.min() < 0:
                at = begin + int(np.argmax((chunk >= vocab_size) | (chunk < 0)))
                problem = f"token {at} is {array[at]}, but the tokenizer has ids 0 to {vocab_size - 1}"
                raise ValueError(f"data {source.name}: {problem}; is it of another tokenizer or integer size?")
            starts.append(np.flatnonzero(chunk == eot) + (first + begin))
        arrays.append(array)
        first += len(array)
    return (arrays[0] if len(arrays) == 1 else Stream(arrays)), np.unique(np.concatenate(starts))


def write_shard(path, ids: np.ndarray) -> None:
    """Write ids as one shard with the 256-int header: uint16 in the form of llm.c and modded-nanogpt, uint32 as llm.c.

    ids: 1-D, dtype uint16 or uint32 (ValueError otherwise), fewer than 2^31 of them (the header counts in int32).
    """
    magic = {np.dtype("u2"): 20240520, np.dtype("u4"): 20240801}.get(ids.dtype)
    if magic is None or ids.ndim != 1 or len(ids) >= 2**31:
        raise ValueError(f"ids: {ids.dtype} {ids.shape}; a shard holds one dimension of uint16 or uint32, under 2^31")
    version, dtype = SHARDS[magic]
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = magic, version, len(ids)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(ids.astype(dtype, copy=False).tobytes())


def _open(source: Source) -> np.ndarray:
    array = _open_npy(source) if source.path.suffix == ".npy" else _open_bin(source)
    if not len(array):
        raise ValueError(f"data {source.name}: it holds no tokens")
    return array


def _open_npy(source: Source) -> np.ndarray:
    try:
        array = np.load(source.path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"data {source.name}: not a whole .npy file of integers ({error})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "ui":
        what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise ValueError(f"data {source.name}: holds {what}; expected one dimension of integers")
    return np.asarray(array)


def _open_bin(source: Source) -> np.ndarray:
    size, dtype, offset = source.path.stat().st_size, np.dtype("<u4" if source.option == "uint32" else "<u2"), 0
    header = np.fromfile(source.path, "<i4", HEADER_INTS) if size >= 4 * HEADER_INTS else np.zeros(HEADER_INTS, "<i4")
    magic, version, count = map(int, header[:3])
    if magic in SHARDS:
        expected, dtype, offset = SHARDS[magic][0], np.dtype(SHARDS[magic][1]), 4 * HEADER_INTS
        if version != expected:
            raise ValueError(f"data {source.name}: shard version {version}; of magic {magic} only {expected} is known")
        if source.option and np.dtype(source.option) != dtype:
            raise ValueError(f"data {source.name}: #{source.option}, but its header says {dtype.name}")
        if size != offset + count * dtype.itemsize:
            held = (size - offset) / dtype.itemsize
            raise ValueError(f"data {source.name}: its header counts {count} tokens, but {held:g} follow; truncated?")
    elif size % dtype.itemsize:
        raise ValueError(f"data {source.name}: {size} bytes are no whole number of {dtype.name} tokens")
    if size == offset:
        return np.zeros(0, dtype)
    return np.asarray(np.memmap(source.path, dtype, "r", offset))
