"""A corpus: the documents a spec names, one after the other, and which of them are for validation.

A document is a file, or a line of a .jsonl file. Nothing is held in memory but the document at hand, so a corpus may be
larger than memory; a text file of more than `PIECE` bytes is read as several documents, `name#1`, `name#2` and so on.
"""

import codecs
import gzip
import hashlib
import json
import os
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from data.sources import Source, resolve

PIECE = 16 << 20  # bytes of a text file read at once


class Document(NamedTuple):
    name: str  # where it comes from; decides the split
    text: str


def python_library() -> Iterator[Document]:
    """The running interpreter's standard library, sorted by name (`json/decoder.py`): the default corpus, 9.6 MB in 458
    files for Python 3.11. Real text, written by many hands, on every machine, with no download.

    Files are decoded as Python decodes its source: by their coding cookie or byte order mark, else UTF-8.
    """
    return documents("python")


def documents(spec: str, cache: str | os.PathLike | None = None) -> Iterator[Document]:
    """The documents of a spec (see `data.sources`), in order.

    Text is UTF-8, a leading byte order mark dropped, line ends kept. A file that is not (or holds a NUL) is an error if
    it was named and skipped if it was found in a folder; a warning at the end counts those. Raises ValueError naming
    the file, and the line of a .jsonl file, that cannot be read, and if there is no text at all.
    """
    skipped, some = [], False
    for source in resolve(spec, cache):
        for document in _read(source, skipped):
            some = True
            yield document
    if skipped:
        warnings.warn(f"data {spec}: skipped {len(skipped)} files that are no text, as {skipped[0]}", stacklevel=2)
    if not some:
        raise ValueError(f"data {spec}: no text in it")


def is_validation(name: str) -> bool:
    """The split rule: a document is for validation if the MD5 of its name, as a number, is 0 modulo 10."""
    return int(hashlib.md5(os.fsencode(name), usedforsecurity=False).hexdigest(), 16) % 10 == 0


def training_documents(spec: str, val_spec: str | None = None, cache=None) -> Iterator[Document]:
    """The documents to train on: all of `spec` if `val_spec` names others for validation, else nine tenths of it.

    The tenth kept back are the documents that `is_validation` names. Where that would leave one side empty, as with a
    single document, it is the last tenth of the text, beginning at the start of a line.
    """
    return documents(spec, cache) if val_spec else _side(spec, False, cache)


def validation_documents(spec: str, val_spec: str | None = None, cache=None) -> Iterator[Document]:
    """The documents never trained on: all of `val_spec` if given, else the tenth `training_documents` leaves."""
    return documents(val_spec, cache) if val_spec else _side(spec, True, cache)


def _side(spec: str, validation: bool, cache) -> Iterator[Document]:
    sides = set()
    for document in documents(spec, cache):
        sides.add(is_validation(document.name))
        if len(sides) == 2:
            break
    if len(sides) == 2:
        yield from (d for d in documents(spec, cache) if is_validation(d.name) == validation)
        return

    keep = sum(len(d.text) for d in documents(spec, cache)) * 9 // 10  # characters to train on
    some = False
    for name, text in documents(spec, cache):
        cut = _line_start(text, keep) if 0 < keep < len(text) else min(max(keep, 0), len(text))
        keep -= len(text)
        part = text[cut:] if validation else text[:cut]
        if part:
            some = True
            yield Document(name, part)
    if not some:
        raise ValueError(f"data {spec}: too little text to keep a tenth of it for validation")


def _line_start(text: str, position: int) -> int:
    """The start of a line nearest before `position`, else nearest after it, else `position` itself."""
    before = text.rfind("\n", 0, position) + 1
    after = text.find("\n", position, len(text) - 1) + 1
    return before or after or position


def _read(source: Source, skipped: list[str]) -> Iterator[Document]:
    """The documents of one file. A found file that is not text adds its name to `skipped` and yields nothing."""
    read = {"python": _read_python, "jsonl": _read_jsonl, "text": _read_text}.get(source.kind)
    if read is None:
        raise ValueError(f"data {source.name}: a token file where text is needed; it cannot be mixed with text")
    some = False
    try:
        for document in read(source):
            some = True
            yield document
    except (UnicodeDecodeError, _NotText) as error:
        if source.found and not some:
            skipped.append(source.name)
            return
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"data {source.name}: not UTF-8 text ({reason})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"data {source.name}: not a whole .gz file ({error})") from None
    except OSError as error:
        raise ValueError(f"data {source.name}: {error.strerror}") from None


class _NotText(ValueError):
    """A file that decodes but is no text."""


def _read_python(source: Source) -> Iterator[Document]:
    try:
        with tokenize.open(source.path) as file:
            yield Document(source.name, file.read())
    except SyntaxError as error:
        raise _NotText(error.msg) from None


def _read_text(source: Source) -> Iterator[Document]:
    decoder, number, text = codecs.getincrementaldecoder("utf-8-sig")(), 0, ""
    with _open(source) as file:
        block = file.read(PIECE)
        while block:
            following = file.read(PIECE)
            text += decoder.decode(block, final=not following)
            if "\0" in text:
                raise _NotText("it holds a NUL")
            cut = text.rfind("\n") + 1 or len(text) if following else len(text)
            number += 1
            yield Document(f"{source.name}#{number}" if following or number > 1 else source.name, text[:cut])
            block, text = following, text[cut:]


def _read_jsonl(source: Source) -> Iterator[Document]:
    field = source.option or "text"
    with _open(source) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)[field]
                text.encode()
            except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
                raise ValueError(f"data {source.name}:{number}: not a JSON object with text in {field!r}") from None
            yield Document(f"{source.name}:{number}", text)


def _open(source: Source) -> BinaryIO:
    return gzip.open(source.path) if source.path.suffix == ".gz" else open(source.path, "rb")
