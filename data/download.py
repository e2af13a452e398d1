"""Download a file once: resumable, checked for length, whole or not at all.

What has arrived lies in `NAME.part`, and `NAME.part.json` keeps the server's validator (RFC 9110: a strong ETag, else
Last-Modified). A later request asks for the rest with `Range` and names the validator in `If-Range`: the server sends
the rest if the file is still the same, else all of it. `NAME` itself appears only when every byte is there.
"""

import contextlib
import json
import os
import re
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

import requests
import urllib3
from filelock import FileLock
from tqdm import tqdm

from data.cache import content_hash, write_file

ATTEMPTS = 5  # connections tried before giving up
PAUSE = 1.0  # seconds before the second attempt, growing by as much each time
TIMEOUT = 30.0  # seconds without a byte that count as a lost connection
BLOCK = 1 << 20  # bytes read at a time


def download(url: str, folder: str | os.PathLike) -> Path:
    """The path of the file behind an http(s) URL, downloaded into `folder` unless it is there already.

    A file already there is not asked for again. A connection lost midway is resumed, here and by the next call; two
    processes take turns. Raises ValueError naming the URL if the server refuses or the length stays wrong.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    base = re.sub(r"[^\w.-]", "_", unquote(urlsplit(url).path).rpartition("/")[2])[-80:]
    target = folder / f"{content_hash([url])[:16]}-{base or 'index'}"
    if target.exists():
        return target
    with FileLock(f"{target}.lock"):
        for attempt in range(ATTEMPTS):
            if target.exists():  # another process was faster
                return target
            try:
                time.sleep(PAUSE * attempt)
                _fetch(url, target)
                return target
            except (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError) as error:
                reason = type(error).__name__
            except requests.RequestException as error:
                raise ValueError(f"{url}: {error}") from None
    arrived = _part(target).stat().st_size if _part(target).exists() else 0
    raise ValueError(f"{url}: connection lost {ATTEMPTS} times ({reason}), {arrived} bytes here; run again to resume")


def _fetch(url: str, target: Path) -> None:
    """One connection: append to the part what is missing, or begin anew; rename it when it is whole."""
    part, note = _part(target), target.with_name(target.name + ".part.json")
    headers = {"Accept-Encoding": "identity"}  # lengths and ranges then count the bytes of the file itself
    offset, validator = 0, json.loads(note.read_bytes())["validator"] if note.exists() else None
    if validator and part.exists() and part.stat().st_size:
        offset = part.stat().st_size
        headers |= {"Range": f"bytes={offset}-", "If-Range": validator}

    with contextlib.closing(requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)) as response:
        if (
            response.status_code == 416 and offset
        ):  # nothing follows what is here: a whole file not yet renamed, or a longer one
            note.unlink(missing_ok=True)
            return _fetch(url, target)
        if response.status_code not in (200, 206):
            raise ValueError(f"{url}: the server answers {response.status_code} {response.reason}")
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise ValueError(f"{url}: the server sends it {encoding}-encoded though asked for the file itself")
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("Content-Range", ""))
            if not found or int(found[1]) != offset:
                note.unlink(missing_ok=True)
                raise ValueError(f"{url}: asked for bytes from {offset}, got {response.headers.get('Content-Range')}")
            total = int(found[2])
        else:
            offset = 0
            length = response.headers.get("Content-Length")
            total = int(length) if length else None

        etag = response.headers.get("ETag", "")
        validator = etag if etag.startswith('"') else response.headers.get("Last-Modified")
        if not offset:  # before the first byte, so that a validator never describes another file's part
            part.unlink(missing_ok=True)
            write_file(note, json.dumps({"validator": validator}).encode())
        bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, desc=target.name[17:], disable=None)
        with open(part, "ab") as file, bar:
            for block in response.raw.stream(BLOCK):
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())

    size = part.stat().st_size
    if total is not None and size != total:
        part.unlink()
        raise ValueError(f"{url}: {size} bytes came where the server announced {total}")
    os.replace(part, target)
    note.unlink(missing_ok=True)


def _part(target: Path) -> Path:
    return target.with_name(target.name + ".part")
