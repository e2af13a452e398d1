"""The cache: one folder for what can be made again (downloads, trained tokenizers, token files), whole or not at all.

Everything is written under a temporary name beside its destination and renamed when complete. Renaming is atomic, so a
reader sees all or nothing, a killed writer leaves only a temporary nobody looks at, and of two writers the last one
(for a file) or the first one (for a folder) wins with the same content.
"""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(cache: str | os.PathLike | None = None) -> Path:
    """Where to cache: the argument, else $ROSETTA_CACHE, else $XDG_CACHE_HOME/rosetta, else ~/.cache/rosetta.

    Made if absent; ValueError if it cannot be.
    """
    if cache is None:
        xdg = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache = os.environ.get("ROSETTA_CACHE") or Path(xdg) / "rosetta"
    folder = Path(cache).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cache folder {folder}: {error.strerror}; ROSETTA_CACHE can name another") from None
    return folder


def content_hash(parts: Iterable[str | bytes]) -> str:
    """128-bit BLAKE2 of a sequence of strings, as hex. Lengths count too: ["ab", "c"] differs from ["a", "bc"]."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def write_file(path: str | os.PathLike, content: bytes) -> None:
    """Write a small file atomically and durably: a reader meets the old content or the new, never a part."""
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder to fill; on leaving the `with` block it becomes `path`. If the block raises, nothing remains.

    Where `path` came into being meanwhile (another process made the same thing), that one is kept and ours dropped.
    """
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        try:
            temporary.rename(path)
        except OSError:
            if not os.path.isdir(path):
                raise
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def _beside(path: str | os.PathLike) -> Path:
    """A hidden name of our own in the same folder: on the same file system, so that renaming it is atomic."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
