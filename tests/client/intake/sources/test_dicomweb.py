"""Servers that are worse than Orthanc: each fault is got over or said, and never taken for a complete answer."""

import contextlib
import json
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedscan_client.intake.sources import dicomweb, spool
from fedscan_client.intake.sources.pull import ArchiveError, Interrupted
from fedscan_client.intake.sources.settings import parse
from fedscan_client.intake.sources.spool import Spool
from fedscan_core.errors import ConfigError

KEY = b"k" * 32
STUDY, SERIES = "1.2.3", "1.2.3.4"


def dicom(uid):
    return b"\0" * 128 + b"DICM" + uid.encode() + b"\r\n--" + b"pixels" * 1000


def multipart(body, boundary="b0undary"):
    head = f"--{boundary}\r\nContent-Type: application/dicom; transfer-syntax=1.2.840.10008.1.2\r\n\r\n".encode()
    return head + body + f"\r\n--{boundary}--\r\n".encode()


class Server:
    """A DICOMweb server of one study and series with `count` instances; a test changes how it behaves."""

    def __init__(self, count=7):
        self.uids = [f"{SERIES}.{number}" for number in range(count)]
        self.asked = []
        self.headers = []
        self.trouble = {}  # last part of the path -> list of what to do the next times
        self.page = lambda rows, limit, offset: rows[offset : offset + limit]
        self.answer = lambda uid: (
            multipart(dicom(uid)),
            'multipart/related; type="application/dicom"; boundary=b0undary',
        )

    def rows(self, path):
        tag, values = {
            "studies": ("0020000D", [STUDY]),
            "series": ("0020000E", [SERIES]),
            "instances": ("00080018", self.uids),
        }[path.rsplit("/", 1)[-1]]
        return [{tag: {"vr": "UI", "Value": [value]}, "00080060": {"vr": "CS", "Value": ["CT"]}} for value in values]


@contextlib.contextmanager
def serving(server, tls=None):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # headers and body in one packet

        def do_GET(self):
            url = urlsplit(self.path)
            name = url.path.rsplit("/", 1)[-1]
            server.asked.append(name)
            server.headers.append(dict(self.headers))
            trouble = server.trouble.get(name, [])
            what = trouble.pop(0) if trouble else None
            if isinstance(what, int):
                self.send_response(what)
                self.send_header("Location", "/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if name in ("studies", "series", "instances"):
                query = {key: int(value[0]) for key, value in parse_qs(url.query).items() if key in ("limit", "offset")}
                rows = server.page(server.rows(url.path), query["limit"], query["offset"])
                body, kind = json.dumps(rows).encode(), "application/dicom+json"
            else:
                body, kind = server.answer(name)
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if what == "cut" else body)
            if what == "cut":
                self.close_connection = True

        def log_message(self, *arguments):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.handle_error = lambda *arguments: None  # type: ignore[method-assign]
    if tls:
        httpd.socket = tls.wrap_socket(httpd.socket, server_side=True)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{httpd.server_address[1]}/rs"
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


def retrieve(url, folder, **changes):
    section = {"kind": "dicomweb", "url": url, "retry_seconds": 0, "page_size": 3, "timeout_seconds": 5, **changes}
    source: Any = parse(section, folder)["source"]
    how: dict[str, Any] = {"known": lambda uid: False, "progress": lambda done, found: None, "stop": threading.Event()}
    return dicomweb.retrieve(source, Spool(folder / "spool", KEY), **how)


def stored(folder):
    return sorted(found.open().read() for found in spool.found(folder / "spool", KEY))


@pytest.mark.parametrize("count", [0, 2, 3, 6, 7])
@pytest.mark.parametrize(
    ("page", "repeats"),
    [
        (lambda rows, limit, offset: rows[offset : offset + limit], False),
        (lambda rows, limit, offset: rows[offset : offset + min(limit, 2)], False),  # a maximum of its own
        (lambda rows, limit, offset: rows, True),  # neither limit nor offset
        (lambda rows, limit, offset: rows[:limit], True),  # no offset
        (lambda rows, limit, offset: rows[:limit][offset:], False),  # Orthanc 1.10, a filter that it has no index for
        (lambda rows, limit, offset: rows[offset : offset + limit] or rows[-limit:], True),
    ],
)
def test_every_listed_instance_is_asked_for_once_however_pages_come(tmp_path, page, repeats, count):
    server = Server(count)
    server.page = page
    with serving(server) as url:
        report = retrieve(url, tmp_path)
    if repeats and count == 3:  # cannot be told from a server that gives its first page only
        assert "no more than 3 results" in report.problem
        return
    assert (report.found, report.retrieved, report.problem) == (count, count, "")
    assert stored(tmp_path) == sorted(dicom(uid) for uid in server.uids)
    assert all(server.asked.count(uid) == 1 for uid in server.uids)


def test_a_server_that_can_only_list_its_first_page_says_so(tmp_path):
    server = Server(7)
    server.page = lambda rows, limit, offset: rows[:3]
    with serving(server) as url:
        report = retrieve(url, tmp_path)
    assert "no more than 3 results" in report.problem and report.retrieved == 0


def test_instances_without_a_usable_uid_are_counted_and_never_asked_for(tmp_path):
    server = Server(0)
    server.uids = ["1.2.3.4.1", "../../etc/passwd", "", "1.2.3?x=1"]
    with serving(server) as url:
        report = retrieve(url, tmp_path)
    assert (report.found, report.retrieved, report.failed) == (4, 1, 3)
    assert "passwd" not in server.asked


@pytest.mark.parametrize("trouble", [503, 500, 429, "cut"])
def test_what_passes_is_tried_again(tmp_path, trouble):
    server = Server(5)
    server.trouble = {name: [trouble] * 2 for name in ("studies", "instances", f"{SERIES}.1", f"{SERIES}.4")}
    with serving(server) as url:
        report = retrieve(url, tmp_path)
    assert (report.found, report.retrieved, report.failed, report.problem) == (5, 5, 0, "")
    assert stored(tmp_path) == sorted(dicom(uid) for uid in server.uids)


@pytest.mark.parametrize("trouble", [404, 410, 406, 500, "cut"])
def test_one_instance_that_cannot_be_had_does_not_keep_the_others(tmp_path, trouble):
    server = Server(5)
    server.trouble = {f"{SERIES}.1": [trouble] * 99}
    with serving(server) as url:
        report = retrieve(url, tmp_path, attempts=3)
    assert (report.found, report.retrieved, report.failed) == (5, 4, 1)
    assert len([path for path in (tmp_path / "spool").rglob("*") if path.is_file()]) == 4
    # Once while the others came, which counts as progress, and then three times more.
    assert server.asked.count(f"{SERIES}.1") == (4 if trouble in (500, "cut") else 1)


@pytest.mark.parametrize(
    ("trouble", "says"),
    [(401, "refuses us (HTTP 401)"), (403, "refuses us"), (301, "another address"), (404, "does not answer a query")],
)
def test_what_does_not_pass_is_said_at_once(tmp_path, trouble, says):
    server = Server()
    server.trouble = {"studies": [trouble] * 9}
    with serving(server) as url, pytest.raises(ArchiveError) as caught:
        retrieve(url, tmp_path)
    assert says in caught.value.message and caught.value.remedy
    assert len(server.asked) == 1


def test_a_token_that_expires_half_way_keeps_the_account(tmp_path):
    server = Server(5)
    server.trouble = {f"{SERIES}.2": [401] * 9}
    with serving(server) as url:
        report = retrieve(url, tmp_path)
    assert (report.found, report.retrieved, report.failed, report.left) == (5, 2, 0, 3)
    assert "refuses us" in report.problem


@pytest.mark.parametrize("rows", ["<html>", '{"a": 1}', "[1]", "null", '["x"]'])
def test_what_is_not_dicomweb(tmp_path, rows):
    server = Server()
    with serving(server) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "dumps", lambda *_, **__: rows)
        with contextlib.suppress(ArchiveError):
            report = retrieve(url, tmp_path)
            assert report.found == 0 and (report.problem or report.unlisted)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>", "text/html"),
        (b"", "application/dicom"),
        (multipart(b"short"), "multipart/related; boundary=b0undary"),
        (multipart(b"x" * 500), 'multipart/related; boundary="b0undary"'),
        (multipart(dicom("1")), "multipart/related"),
        (b"x" * 3_000_000, "multipart/related; boundary=b0undary"),
    ],
)
def test_what_is_not_a_dicom_file_is_not_kept(tmp_path, body, kind):
    server = Server(2)
    server.answer = lambda uid: (body, kind)
    with serving(server) as url:
        report = retrieve(url, tmp_path, attempts=2)
    assert (report.found, report.retrieved, report.failed) == (2, 0, 2)
    assert not stored(tmp_path)


def test_an_instance_that_comes_bare(tmp_path):
    server = Server(2)
    server.answer = lambda uid: (dicom(uid), "application/dicom")
    with serving(server) as url:
        assert retrieve(url, tmp_path).retrieved == 2
    assert stored(tmp_path) == sorted(dicom(uid) for uid in server.uids)


@settings(max_examples=60)
@given(
    st.binary(max_size=300) | st.sampled_from([b"\r\n--b", b"\r\n--boundar\r\n--boundar", b"\r\n\r\n", b"--boundary"]),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.sampled_from([b"", b"preamble text", b"\r\n"]),
    st.booleans(),
)
def test_the_first_part_of_a_multipart_message(body, sizes, before, bare):
    """Cut anywhere it is the same; the reference is the whole message taken apart at once."""
    head = b"\r\n" if bare else b"Content-Type: application/dicom\r\nX: y\r\n\r\n"
    message = before + (b"\r\n" if before else b"") + b"--boundary\r\n" + head + body + b"\r\n--boundary--\r\n"

    def parts(data):
        at, turn = 0, 0
        while at < len(data):
            size = sizes[turn % len(sizes)]
            yield data[at : at + size]
            at, turn = at + size, turn + 1

    if b"\r\n--boundary" in b"\r\n" + body:
        return
    assert b"".join(dicomweb._first_part(parts(message), b"boundary")) == body
    with pytest.raises(Interrupted):
        list(dicomweb._first_part(parts(message[: -len(b"\r\n--boundary--\r\n")]), b"boundary"))


def test_who_we_say_we_are(tmp_path, monkeypatch):
    monkeypatch.setenv("PACS_TOKEN", "s3cret-token")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    (tmp_path / "password").write_text("pa55\n")
    (tmp_path / "password").chmod(0o600)
    server = Server(1)
    with serving(server) as url:
        retrieve(url, tmp_path, token_env="PACS_TOKEN")
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer s3cret-token"}
        accepted = [
            headers["Accept"] for name, headers in zip(server.asked, server.headers, strict=True) if "." in name
        ]
        assert accepted == ['multipart/related; type="application/dicom"; transfer-syntax=*']
        server.headers.clear()
        retrieve(url, tmp_path, username="me", password_file="password")
        assert {headers["Authorization"] for headers in server.headers} == {"Basic bWU6cGE1NQ=="}
        (tmp_path / "password").chmod(0o640)
        with pytest.raises(ConfigError, match="Others may read") as caught:
            retrieve(url, tmp_path, username="me", password_file="password")
        assert "chmod 600" in caught.value.remedy
        with pytest.raises(ConfigError, match="NO_SUCH"):
            retrieve(url, tmp_path, token_env="NO_SUCH")


def test_tls_both_ways(tmp_path, certificates):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates("server"), certificates("server.key"))
    context.load_verify_locations(certificates("ca"))
    context.verify_mode = ssl.CERT_REQUIRED
    ours = {"client_certificate": str(certificates("client")), "client_key": str(certificates("client.key"))}
    theirs = {"client_certificate": str(certificates("stranger")), "client_key": str(certificates("stranger.key"))}
    ca = {"ca_file": str(certificates("ca"))}
    with serving(Server(2), context) as url:
        assert retrieve(url, tmp_path, **ca, **ours).retrieved == 2
        for wrong in ({**ours}, {**ours, "ca_file": str(certificates("stranger"))}, {**ca}, {**ca, **theirs}):
            with pytest.raises(ArchiveError):
                retrieve(url, tmp_path, attempts=1, **wrong)
        with pytest.raises(ArchiveError, match="certificates"):
            retrieve(url, tmp_path, attempts=1, **ours)
        with pytest.raises(ConfigError, match="There is no certificate"):
            retrieve(url, tmp_path, ca_file="none")
