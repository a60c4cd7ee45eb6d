"""SITE/connection.toml: read back as written; anything else is refused with what to do."""

import pytest

from fedscan_client import connection as connections
from fedscan_client.connection import Connection
from fedscan_core.errors import ConfigError


def test_round_trip(tmp_path):
    (tmp_path / connections.CA_FILE).write_text("pem")
    for ca in (tmp_path / connections.CA_FILE, None):
        it = Connection("https://fed.example:8443", "The centre", ca, "north", "2026-01-01T00:00:00+00:00")
        connections.save(tmp_path, it)
        assert connections.load(tmp_path) == it
        assert (it.host, it.port) == ("fed.example", 8443)
    assert Connection("https://fed.example", "c", None).port == 443
    assert str(tmp_path) not in (tmp_path / connections.FILE).read_text()  # a site can be moved


GOOD = 'address = "https://h:1"\ncoordinator = "c"\nsite = "north"\nca = ""\nenrolled = ""\n'


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("https://h:1", "http://h:1", "damaged"),
        ("https://h:1", "https://user@h:1", "damaged"),
        ("https://h:1", "https://h:1/path", "damaged"),
        ('site = "north"', 'site = "../x"', "damaged"),
        ('ca = ""', "ca = 1", "damaged"),
        ('ca = ""\n', "", "damaged"),
        ('ca = ""', 'ca = "gone.pem"', "missing"),
        ('coordinator = "c"', "coordinator = 3", "damaged"),
        ("address", "address address", "damaged"),
    ],
)
def test_damaged(tmp_path, old, new, words):
    (tmp_path / connections.FILE).write_text(GOOD)
    connections.load(tmp_path)
    (tmp_path / connections.FILE).write_text(GOOD.replace(old, new, 1))
    with pytest.raises(ConfigError, match=words) as caught:
        connections.load(tmp_path)
    assert "nrol" in caught.value.remedy


def test_not_enrolled(tmp_path):
    with pytest.raises(ConfigError, match="not enrolled") as caught:
        connections.load(tmp_path)
    assert "fedscan agent enrol" in caught.value.remedy
