"""A tokenizer: text to ids and back, through tiktoken's fast byte-level BPE. Where ranks come from: `load_tokenizer`.

Byte-level BPE has no unknown token: any text is some sequence of pieces, any sequence of pieces is some bytes.
The one special token the code itself uses is `<|endoftext|>` (`eot`): every document begins with it. Text that happens
to spell a special token is ordinary text and never becomes one, so no document can forge a boundary.
"""

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from itertools import chain
from pathlib import Path

import numpy as np
import regex
import requests
import tiktoken

from data.bpe import PATTERN, train
from data.cache import cache_folder, content_hash, write_file
from data.hf_tokenizer import read_tokenizer_json

END_OF_TEXT = "<|endoftext|>"
MAX_VOCABULARY = 1 << 24  # far above any published one; a larger id is a damaged file
RANKS_FILE = "tokenizer.tiktoken"  # one line a piece: base64 of its bytes, a space, its id
SETTINGS_FILE = "tokenizer_settings.json"  # name, pattern, specials, eot, and the SHA-256 of the ranks file


class Tokenizer:
    """Byte-level BPE over `ranks` {piece: id}, cutting words with the regular expression `pattern`.

    ranks must hold all 256 single bytes. specials is {name: id} and must hold `eot`; None numbers `<|endoftext|>` after
    the last rank. `vocab_size` is the highest id plus one, specials included (GPT-2: 50257, with eot 50256).
    Raises ValueError for a missing byte, an id used twice or out of range, or a pattern that does not compile.
    """

    def __init__(
        self,
        name: str,
        ranks: Mapping[bytes, int],
        *,
        pattern: str = PATTERN,
        specials: Mapping[str, int] | None = None,
        eot: str = END_OF_TEXT,
    ):
        specials = {eot: max(ranks.values(), default=-1) + 1} if specials is None else dict(specials)
        missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
        if missing:
            raise ValueError(f"ranks of {name}: single byte {missing[0]:#04x} is missing; byte-level BPE needs all 256")
        ids = [*ranks.values(), *specials.values()]
        if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) >= MAX_VOCABULARY:
            raise ValueError(f"ranks of {name}: ids, specials' too, must differ and be from 0 to {MAX_VOCABULARY - 1}")
        if eot not in specials:
            raise ValueError(f"specials of {name}: {eot} is not among {list(specials)}")
        self.name, self.ranks, self.pattern, self.specials = name, dict(ranks), pattern, specials
        self.eot, self.vocab_size = specials[eot], max(ids) + 1
        try:
            self.encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=self.ranks, special_tokens=specials)
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"pattern of {name} does not compile: {reason}") from None

    def encode(self, text: str) -> list[int]:
        """Ids of the text; specials spelt in it are ordinary text. ValueError if it holds half a surrogate pair."""
        return [i for part in _parts(text) for i in self.encoding.encode_ordinary(part)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [ids.tolist() for ids in self.encode_arrays(texts)]

    def encode_arrays(self, texts: Iterable[str]) -> list[np.ndarray]:
        """`encode` of each text as a uint32 array (tokens,), on all cores: 4 bytes a token where a list takes 36."""
        parts = [_parts(text) for text in texts]
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            arrays = threads.map(partial(self.encoding.encode_to_numpy, disallowed_special=()), chain(*parts))
            return [np.concatenate([next(arrays) for _ in text]) for text in parts]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: stretches of valid UTF-8 as text, every other byte as its own single-byte piece."""
        ids, text = [], data.decode("utf-8", "surrogateescape")
        start = 0
        for i, char in enumerate(text):
            if "\udc80" <= char <= "\udcff":  # a byte that is not UTF-8, escaped by Python (PEP 383)
                ids += [*self.encode(text[start:i]), self.ranks[bytes([ord(char) - 0xDC00])]]
                start = i + 1
        return ids + self.encode(text[start:])

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes the ids stand for, specials by their name. ValueError names an id that does not exist."""
        try:
            return self.encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            known = {*self.ranks.values(), *self.specials.values()}
            unknown = next(i for i in ids if i not in known)
            raise ValueError(f"ids: {unknown} is no token of {self.name}, which has {self.vocab_size}") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text the ids stand for; bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        """int64 (vocab_size,): UTF-8 bytes of each id; 0 for specials and for ids that do not exist."""
        sizes = np.zeros(self.vocab_size, np.int64)
        sizes[list(self.ranks.values())] = [len(piece) for piece in self.ranks]
        return sizes

    @cached_property
    def fingerprint(self) -> str:
        """Hash of ranks, pattern and specials: equal for tokenizers that encode alike, whatever their name."""
        rest = json.dumps([self.pattern, sorted(self.specials.items()), self.eot])
        return content_hash([_ranks_text(self.ranks), rest])

    def save(self, folder: str | os.PathLike) -> None:
        """Write `tokenizer.tiktoken` and `tokenizer_settings.json` into the folder, each atomically.

        The settings come last and carry the hash of the ranks, so a half-written pair is recognised by `load`.
        """
        folder, ranks = Path(folder), _ranks_text(self.ranks)
        folder.mkdir(parents=True, exist_ok=True)
        eot = next(name for name, i in self.specials.items() if i == self.eot)
        settings = {"name": self.name, "pattern": self.pattern, "specials": self.specials, "eot": eot}
        settings["ranks_sha256"] = hashlib.sha256(ranks).hexdigest()
        write_file(folder / RANKS_FILE, ranks)
        write_file(folder / SETTINGS_FILE, json.dumps(settings, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Tokenizer":
        """Read back what `save` wrote. ValueError names the file that is missing, altered or malformed."""
        ranks_file, settings_file = Path(folder) / RANKS_FILE, Path(folder) / SETTINGS_FILE
        for file in (ranks_file, settings_file):
            if not file.is_file():
                raise ValueError(f"{file} is missing: a saved tokenizer is {RANKS_FILE} and {SETTINGS_FILE}")
        try:
            settings = json.loads(settings_file.read_bytes())
            name, pattern, eot = (str(settings[key]) for key in ("name", "pattern", "eot"))
            specials = {str(special): int(i) for special, i in settings["specials"].items()}
            sha256 = settings["ranks_sha256"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{settings_file} is not the settings of a saved tokenizer") from None
        if hashlib.sha256(ranks_file.read_bytes()).hexdigest() != sha256:
            raise ValueError(f"{ranks_file} is not the file {SETTINGS_FILE} belongs to: its SHA-256 differs")
        return cls(name, read_ranks(ranks_file), pattern=pattern, specials=specials, eot=eot)


def read_ranks(path: str | os.PathLike) -> dict[bytes, int]:
    """{piece: id} from a tiktoken ranks file, as OpenAI and Meta (Llama 3's tokenizer.model) publish theirs.

    ValueError names the file and line that is not `base64 id`.
    """
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            piece, rank = line.split()
            ranks[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path} line {number}: expected a piece in base64 and its id (a ranks file)") from None
    return ranks


def _ranks_text(ranks: Mapping[bytes, int]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(piece), rank) for piece, rank in ranks.items())


def _parts(text: str, limit: int = 1 << 18) -> list[str]:
    """The text in parts of at most `limit` characters that encode to the same ids as the whole.

    tiktoken's regular expressions run out of stack on about a million blanks in a row. No pattern in use joins a letter
    to white space after it, so the cuts are there; a stretch of `limit` characters with no such place is cut anywhere.
    Raises ValueError for half a surrogate pair, which UTF-8 cannot write and tiktoken would quietly replace by U+FFFD.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text: character {error.start} is a lone surrogate, which UTF-8 cannot write") from None
    parts, start = [], 0
    while len(text) - start > limit:
        cut = _LAST_WORD_END.search(text, start, start + limit)
        parts.append(text[start : cut.end() if cut else start + limit])
        start += len(parts[-1])
    return [*parts, text[start:]]


_LAST_WORD_END = regex.compile(r"(?r)[^\W_](?=\s)")  # (?r) searches from the end


def load_tokenizer(
    spec: str,
    *,
    texts: Callable[[], Iterable[str]] | None = None,
    vocab_size: int | None = None,
    cache: str | os.PathLike | None = None,
) -> Tokenizer:
    """The tokenizer a `--tokenizer` flag names.

    - `bpe`: trained here on `texts()` (the training documents' texts) to `vocab_size` ids, eot included. The result is
      cached by the hash of the texts and the size. A text too small for that many pieces gives fewer, with a warning.
    - `byte`: the 256 bytes and eot.
    - a path: a folder `Tokenizer.save` wrote; a tiktoken ranks file (`PATTERN` cuts words, eot follows the last rank;
      Llama 3's `tokenizer.model` is one); a Hugging Face tokenizer.json, or a folder with one, if byte-level BPE.
    - any name tiktoken knows (`gpt2`, `cl100k_base`, `o200k_base`): downloaded by tiktoken the first time.

    Raises ValueError, one line, for anything else, and where texts or vocab_size are missing or the download fails.
    """
    if spec == "bpe":
        if texts is None or vocab_size is None:
            raise ValueError("tokenizer bpe is trained: it needs texts and vocab_size")
        key = content_hash(["bpe 1", PATTERN, str(vocab_size), content_hash(texts())])
        folder = cache_folder(cache) / "tokenizers" / key
        if not (folder / SETTINGS_FILE).is_file():
            Tokenizer("bpe", train(texts(), vocab_size - 1)).save(folder)
        return Tokenizer.load(folder)
    if spec == "byte":
        return Tokenizer("byte", {bytes([byte]): byte for byte in range(256)})
    if spec in tiktoken.list_encoding_names():
        try:
            encoding = tiktoken.get_encoding(spec)
        except requests.RequestException as error:
            raise ValueError(
                f"tokenizer {spec}: tiktoken could not download it ({type(error).__name__}); once on a machine with a "
                "network, `save` it and give the folder"
            ) from None
        return Tokenizer(spec, encoding._mergeable_ranks, pattern=encoding._pat_str, specials=encoding._special_tokens)
    path = Path(os.path.expanduser(spec))
    if os.path.isfile(path / SETTINGS_FILE) or os.path.isfile(path / RANKS_FILE):
        return Tokenizer.load(path)
    if os.path.isdir(path):
        path = path / "tokenizer.json"
    if not os.path.isfile(path):
        names = ", ".join(["bpe", "byte", *tiktoken.list_encoding_names()])
        raise ValueError(f"tokenizer {spec}: neither a path with a tokenizer nor one of {names}")
    if path.suffix == ".json":
        return Tokenizer(path.parent.name or "tokenizer", **read_tokenizer_json(path))
    return Tokenizer(path.stem, read_ranks(path))
