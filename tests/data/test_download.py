"""Downloads against a server on this machine that behaves, loses connections, ignores ranges, changes files or lies."""

import http.server
import threading

import pytest

from data import documents
from data.download import download

CONTENT = bytes(range(256)) * 40


class Server(http.server.ThreadingHTTPServer):
    """One file at every path. The settings say how the server misbehaves; `requests` records what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"one"'
        self.ranges = True  # honours Range
        self.drop_after = None  # bytes after which each connection is lost
        self.announce = None  # a Content-Length that is not true
        self.headers = {}  # more headers, or others
        self.requests = []
        self.url = f"http://127.0.0.1:{self.server_port}/folder/file%20name.bin"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        server.requests.append(wanted)
        if "absent" in self.path:
            return self.send_error(404)
        if "unsatisfiable" in self.path:
            return self.send_error(416)
        body, status = server.content, 200
        if wanted and server.ranges and condition == server.etag:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(body):
                return self.send_error(416)
            status, content_range = 206, f"bytes {first}-{len(body) - 1}/{len(body)}"
            body = body[first:]
        self.send_response(status)
        headers = {"Content-Length": server.announce or len(body), "ETag": server.etag}
        if status == 206:
            headers["Content-Range"] = content_range
        for name, value in (headers | server.headers).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body[: server.drop_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("data.download.PAUSE", 0)
    monkeypatch.setenv("no_proxy", "*")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def left(folder):
    return sorted(path.name.partition("-")[2] for path in folder.iterdir() if path.suffix != ".lock")


def test_a_good_server_is_asked_once(server, tmp_path):
    path = download(server.url, tmp_path)
    assert path.read_bytes() == CONTENT and path.name.endswith("-file_name.bin")
    assert download(server.url, tmp_path) == path
    assert server.requests == [None] and left(tmp_path) == ["file_name.bin"]
    assert download(server.url + "?v=2", tmp_path) != path


def test_lost_connections_are_resumed(server, tmp_path):
    server.drop_after = 3000
    assert download(server.url, tmp_path).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=3000-", "bytes=6000-", "bytes=9000-"]


def test_the_next_call_resumes(server, tmp_path):
    server.drop_after = 100
    with pytest.raises(ValueError, match=r"file%20name.bin: connection lost 5 times .*, 500 bytes here; run again"):
        download(server.url, tmp_path)
    assert left(tmp_path) == ["file_name.bin.part", "file_name.bin.part.json"]
    server.drop_after = None
    assert download(server.url, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=500-" and left(tmp_path) == ["file_name.bin"]


@pytest.mark.parametrize("change", ["content", "no ranges", "no validator", "Last-Modified"])
def test_resuming_is_sound(server, tmp_path, change):
    """A file that changed, a server without ranges or validators: all again. Last-Modified does as well as an ETag."""
    server.drop_after = 100
    if change == "no validator":
        server.headers = {"ETag": None}
    if change == "Last-Modified":
        server.headers = {"ETag": 'W/"weak"', "Last-Modified": "then"}
        server.etag = "then"  # what If-Range must carry
    with pytest.raises(ValueError, match="connection lost"):
        download(server.url, tmp_path)
    server.drop_after = None
    if change == "content":
        server.content, server.etag = b"other" * 1000, '"two"'
    if change == "no ranges":
        server.ranges = False
    assert download(server.url, tmp_path).read_bytes() == server.content
    assert (server.requests[-1] is None) == (change == "no validator")


def test_a_part_that_is_already_whole(server, tmp_path):
    """Killed after the last byte and before the rename: the server has nothing more, and all is fetched again."""
    server.drop_after = 10_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.download.ATTEMPTS", 1)
        with pytest.raises(ValueError, match="connection lost"):
            download(server.url, tmp_path)
    (part,) = tmp_path.glob("*.part")
    part.write_bytes(CONTENT)
    server.drop_after = None
    assert download(server.url, tmp_path).read_bytes() == CONTENT


def test_a_lie_about_the_length_is_no_file(server, tmp_path):
    server.announce, server.etag = len(CONTENT) + 10, None  # says more than it sends
    with pytest.raises(ValueError, match="connection lost 5 times"):
        download(server.url, tmp_path)
    server.announce, server.etag, server.drop_after = None, '"one"', 100
    with pytest.raises(ValueError, match="connection lost"):
        download(server.url, tmp_path)
    server.drop_after = None
    server.headers = {"Content-Range": f"bytes 500-{len(CONTENT) - 1}/{len(CONTENT) + 7}"}
    with pytest.raises(ValueError, match=f"{len(CONTENT)} bytes came where the server announced {len(CONTENT) + 7}"):
        download(server.url, tmp_path)
    assert not [name for name in left(tmp_path) if not name.endswith(".json")]


@pytest.mark.parametrize("answer", ["bytes 0-9/10", "nonsense", None])
def test_a_wrong_range_is_refused(server, tmp_path, answer):
    server.drop_after = 100
    with pytest.raises(ValueError, match="connection lost"):
        download(server.url, tmp_path)
    server.headers, server.drop_after = {"Content-Range": answer}, None
    with pytest.raises(ValueError, match="asked for bytes from 500, got"):
        download(server.url, tmp_path)
    server.headers = {}
    assert download(server.url, tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("{}/absent", "absent: the server answers 404"),
        ("http://", "http://: "),
        ("http://127.0.0.1:1/x", "lost 5 times"),
    ],
)
def test_errors_name_the_url(server, tmp_path, url, message):
    with pytest.raises(ValueError, match=message) as caught:
        download(url.replace("{}", server.url), tmp_path)
    assert "\n" not in str(caught.value) and not left(tmp_path)


def test_encoded_content_is_refused(server, tmp_path):
    server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(ValueError, match="gzip-encoded though asked for the file itself"):
        download(server.url, tmp_path)


def test_a_url_is_data(server):
    server.content = b'{"body": "hello"}\n'
    url = server.url.replace(".bin", ".jsonl")
    assert list(documents(f"{url}#body")) == [(f"{url}:1", "hello")]
