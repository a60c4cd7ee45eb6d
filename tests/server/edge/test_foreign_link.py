"""Another account on the SuperLink's port: neither a site's update nor the Control API's secret goes there."""

import pytest
from tests.server.edge.conftest import Live

from fedscan_core import loopback
from fedscan_core.errors import ConfigError
from fedscan_server.coordinator import control


def test_it_is_told_nothing(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    site = live.site()
    asked: list[int] = []

    def foreign(port: int) -> bool:
        asked.append(port)
        return True

    monkeypatch.setattr(loopback, "foreign", foreign)
    assert site.fleet("/v1/fleet/push-object", b"an update").status_code == 502 and not live.link.got
    with pytest.raises(ConfigError, match="Another account"), control._client(live.c):
        pass
    assert set(asked) == {live.c.superlink_port}
    monkeypatch.undo()
    assert site.fleet("/v1/fleet/push-object", b"an update").status_code == 200
