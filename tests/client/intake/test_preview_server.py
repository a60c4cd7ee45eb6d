"""The preview's server: for one person on this machine, for a while, from memory."""

import http.client
import socket
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest

from fedscan_client.intake import preview, preview_page, preview_server
from fedscan_client.intake.preview import Picture
from fedscan_client.intake.preview_page import State
from fedscan_client.intake.records import Rectangle, Refused

FRAMES = np.random.default_rng(0).integers(0, 200, (3, 40, 50)).astype(np.uint8)
TOP = (Rectangle(0, 0, 10, 50),)


def load(number):
    if number == 1:
        raise Refused("pixels_undecodable")
    return Picture(FRAMES, False, 0)


@pytest.fixture(scope="module")
def served():
    """Host, port and path of a server that ends with the tests."""
    told, ready = [], threading.Event()

    def say(url):
        told.append(urlsplit(url))
        ready.set()

    shown = preview_server.Shown("abc: <1> & more", 2, load, TOP, 0, 1)
    thread = threading.Thread(target=preview_server.serve, args=(shown, say), daemon=True)
    thread.start()
    assert ready.wait(10)
    return told[0]


def get(served, path, host=None, method="GET"):
    connection = http.client.HTTPConnection(served.hostname, served.port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host != "":
        connection.putheader("Host", host or f"127.0.0.1:{served.port}")
    connection.endheaders()
    answer = connection.getresponse()
    return answer, answer.read()


def test_the_page_and_its_pictures(served):
    answer, _ = get(served, served.path)
    place = answer.headers["Location"]
    assert answer.status == 303 and place.endswith("/0/1/100/linear/0-0-10-50")
    answer, body = get(served, place)
    page = body.decode()
    assert answer.status == 200 and "--rect 0,0,10,50" in page and "abc: &lt;1&gt; &amp; more" in page
    assert "<script" not in page and "http:" not in page and page.count("<img") == 2
    for what, rectangles in (("/before", ()), ("/after", TOP)):
        assert f'src="{place}{what}"' in page
        answer, body = get(served, place + what)
        assert answer.headers["Content-Type"] == "image/png"
        assert body == preview.png(preview.shown(load(0), 1, rectangles))


def test_every_link_of_a_page_leads_somewhere(served):
    _, body = get(served, f"{served.path}0/1/100/linear/0-0-10-50.3-4")
    links = [part.split('"')[0] for part in body.decode().split('href="')[1:]]
    assert len(links) > 10
    for link in links:
        assert get(served, link)[0].status == (422 if "/1/0/100/" in link else 200 if "/click" not in link else 303), (
            link
        )


def test_two_clicks_are_a_rectangle(served):
    answer, _ = get(served, f"{served.path}0/1/200/equal/0-0-10-50/click?61,41")
    place = answer.headers["Location"]
    assert answer.status == 303 and place.endswith("/0/1/200/equal/0-0-10-50.20-30")
    answer, _ = get(served, f"{place}/click?20,79")
    assert answer.headers["Location"].endswith("/0/1/200/equal/0-0-10-50_20-10-40-31")
    answer, _ = get(served, f"{place}/click?9999,9999")
    assert answer.headers["Location"].endswith("/0/1/200/equal/0-0-10-50_20-30-40-50")
    for wrong in ("", "?x,y", "?1", "?-1,2"):
        assert get(served, f"{place}/click{wrong}")[0].headers["Location"] == place


def test_whatever_is_asked_nothing_may_keep_it_run_it_or_embed_it(served):
    for path in (
        served.path,
        f"{served.path}0/1/100/linear/none",
        f"{served.path}0/1/100/linear/none/after",
        "/",
        "/x",
    ):
        for method in ("GET", "POST", "HEAD", "TRACE"):
            answer, _ = get(served, path, method=method)
            assert answer.headers["Cache-Control"] == "no-store", (method, path)
            assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; img-src 'self'")
            assert answer.headers["X-Frame-Options"] == "DENY" and answer.headers["Referrer-Policy"] == "no-referrer"
            assert method == "GET" or answer.status == 501


def test_without_the_token_there_is_nothing(served):
    token = served.path.strip("/")
    assert len(token) >= 43
    for path in ("/", "//", "", f"/{token[:-1]}/", f"/{token}x/", f"/x/{token}/", f"/{token.swapcase()}/"):
        answer, body = get(served, path or "*")
        assert (answer.status, body) == (404, b""), path


def test_another_host_name_gets_nothing(served):
    for host in (
        "evil.example",
        f"evil.example:{served.port}",
        "127.0.0.1",
        "127.0.0.1:1",
        f"0.0.0.0:{served.port}",
        "",
    ):
        answer, body = get(served, served.path, host=host)
        assert (answer.status, body) == (403, b""), host
    assert get(served, served.path, host=f"localhost:{served.port}")[0].status == 303


def test_it_listens_on_loopback_only(served):
    with open("/proc/net/tcp", encoding="ascii") as file:
        listening = [line.split()[1] for line in file if line.split()[3] == "0A"]
    assert f"0100007F:{served.port:04X}" in listening and f"00000000:{served.port:04X}" not in listening


@pytest.mark.parametrize(
    "path",
    [
        "0/3/100/linear/none",
        "2/0/100/linear/none",
        "0/0/101/linear/none",
        "0/0/100/log/none",
        "0/0/100/linear/1-2-3",
        "0/0/100/linear/1-2-3-4-5",
        "0/0/100/linear/none/../../etc",
        "0/0/100/linear/none/before.png",
    ],
)
def test_no_such_page(served, path):
    assert get(served, served.path + path)[0].status == 404


def test_an_instance_that_cannot_be_shown_says_why(served):
    answer, body = get(served, f"{served.path}1/0/100/linear/none")
    assert answer.status == 422 and b"cannot be decoded" in body
    answer, body = get(served, f"{served.path}0/0/100/linear/0-0-41-50/after")
    assert answer.status == 422 and b"is not inside" in body


def test_it_ends_when_nobody_asks(monkeypatch):
    begin = time.monotonic()
    told: list[str] = []
    preview_server.serve(preview_server.Shown("x", 1, load), told.append, idle_seconds=0.1)
    assert time.monotonic() - begin < 5 and told[0].startswith("http://127.0.0.1:")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(told[0]).port), 2)

    def interrupted(url):
        raise KeyboardInterrupt

    preview_server.serve(preview_server.Shown("x", 1, load), interrupted)  # Ctrl-C ends it without an error


def test_paths_say_the_same_back_and_forth():
    for state in (State(0, 0, 100, "linear", ()), State(9, 8, 12, "equal", TOP * 3, (7, 0))):
        assert preview_page.parse(state.path("/after")) == (state, "/after")
    assert (
        preview_page.zoom_for(300) == 100 and preview_page.zoom_for(1024) == 75 and preview_page.zoom_for(60_000) == 12
    )
