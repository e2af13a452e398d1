"""What `--data` names: a spec, resolved into a list of files to read.

A spec is one entry or several with commas between:

    python                     the Python standard library of the running interpreter
    notes.txt                  a file: UTF-8 text of any ending, .gz too; .jsonl; token files (.bin, .npy)
    corpus/                    a folder, read recursively
    'corpus/**/*.md'           a glob
    https://host/name.jsonl    a download

`#` adds an option: `posts.jsonl#content` names the field that holds the text (default `text`), `train.bin#uint32` the
integers of a raw token file (default uint16).
"""

import glob
import os
import sysconfig
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from data.cache import cache_folder
from data.download import download

# Tests, generated tables and programs that are no library.
NOT_LIBRARY = {
    "test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "site-packages", "dist-packages", "__pycache__",
}  # fmt: skip


class Source(NamedTuple):
    """One file to read. `name` says which file it is wherever the corpus lies, so it decides the validation split."""

    name: str  # posix path relative to the folder or glob it came from; a file's own name; a URL
    path: Path
    kind: str  # "python", "text", "jsonl" or "tokens"
    option: str | None = None  # jsonl: field; tokens: dtype
    found: bool = False  # found in a folder rather than named: skipped if it is not text


def resolve(spec: str, cache: str | os.PathLike | None = None) -> list[Source]:
    """The files a spec names, in its order, those of a folder or glob sorted by name. Downloads what is a URL.

    A folder with nothing but .bin and .npy files is a folder of token shards; in any other they are skipped as binary.
    Names that begin with a dot and __pycache__ are passed over. Raises ValueError naming the entry that is empty,
    matches no file or has an option it cannot have.
    """
    return [source for entry in entries(spec) for source in _entry(entry, cache)]


def entries(spec: str) -> list[str]:
    """The entries of a spec. ValueError for an empty one."""
    found = [spec] if os.path.exists(spec) else [entry.strip() for entry in spec.split(",")]
    if "" in found:
        raise ValueError(f"data: an empty entry in {spec!r}")
    return found


def _entry(entry: str, cache) -> list[Source]:
    if entry == "python":
        return _python_library()
    target, option = entry, None
    if "#" in entry and not os.path.exists(entry):
        target, _, option = entry.rpartition("#")
    path = Path(os.path.expanduser(target))
    if target.startswith(("http://", "https://")):
        found = [_source(target, download(target, cache_folder(cache) / "downloads"), option)]
    elif os.path.isfile(path):
        found = [_source(path.name, path, option)]
    elif os.path.isdir(path):
        files = {file.relative_to(path).as_posix(): file for file in _walk(path)}
        found = [_source(name, files[name], option, found=True) for name in sorted(files)]
        if not all(source.kind == "tokens" for source in found):
            found = [s._replace(kind="text", option=None) if s.kind == "tokens" else s for s in found]
    else:
        fixed = Path(*_before_wildcard(path))
        matches = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
        files = {match.relative_to(fixed).as_posix(): match for match in matches}
        found = [_source(name, files[name], option) for name in sorted(files)]
    if not found:
        raise ValueError(f"data: {entry} is no file, no folder with files, no glob that matches, no URL, not `python`")
    if option is not None and all(source.option is None for source in found):
        raise ValueError(f"data: {entry}: .jsonl takes #field, .bin takes #uint16 or #uint32, other files take nothing")
    return found


def _source(name: str, path: Path, option: str | None, found: bool = False) -> Source:
    kind = "tokens" if path.suffix in (".bin", ".npy") else "text"
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        kind = "jsonl"
    fits = option and (kind == "jsonl" or path.suffix == ".bin" and option in ("uint16", "uint32"))
    return Source(name, path, kind, option if fits else None, found)


def _walk(folder: Path, without: Collection[str] = ("__pycache__",)) -> Iterator[Path]:
    """The regular files in a folder and its folders, except hidden ones and what lies in folders of the given names."""
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if path.is_file())


def _before_wildcard(path: Path) -> list[str]:
    """The leading parts of a glob that are plain folders; names are relative to them."""
    plain = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        plain.append(part)
    return plain


def _python_library() -> list[Source]:
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(library).as_posix(): path for path in _walk(library, NOT_LIBRARY) if path.suffix == ".py"}
    if not files:
        raise ValueError(f"data python: this interpreter has no .py files of its library in {library}")
    return [Source(name, files[name], "python") for name in sorted(files)]
