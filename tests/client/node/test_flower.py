"""One version of Flower with all its names, and an environment in which nothing calls home or reaches a proxy."""

import pytest

from fedscan_client.node import flower
from fedscan_core.errors import MissingExtra


def test_this_flower_has_every_name():
    flower.check()


@pytest.mark.parametrize("version", ["1.40.0", "1.41.1", "1.42.0"])
def test_another_version_is_refused(monkeypatch, version):
    monkeypatch.setattr(flower, "version", lambda name: version)
    with pytest.raises(MissingExtra, match=f"{version} is installed.*1.41.0"):
        flower.check()


@pytest.mark.parametrize(
    "name", ["flwr.supercore.runtime:Gone", "flwr.gone:x", "flwr.supercore.constant:TaskType.GONE"]
)
def test_a_name_that_is_gone_is_refused(monkeypatch, name):
    monkeypatch.setattr(flower, "NAMES", (*flower.NAMES, name))
    with pytest.raises(MissingExtra, match=name):
        flower.check()


GIVEN = {
    "PATH": "/bin",
    "HOME": "/h",
    "HTTPS_PROXY": "http://proxy:3128",
    "HTTP_PROXY": "http://proxy:3128",
    "http_proxy": "http://proxy:3128",
    "ALL_PROXY": "socks5://proxy",
    "NO_PROXY": "example.org, localhost",
    "PYTHONPATH": "/evil",
    "LD_PRELOAD": "/evil.so",
    "FLWR_TELEMETRY_ENABLED": "1",
    "FLWR_LOG_LEVEL": "DEBUG",
    "FEDSCAN_SITE_KEY": "secret",
    "CUDA_VISIBLE_DEVICES": "0",
}


def test_the_supernodes_environment():
    kept = flower.environment(GIVEN, home="/f")
    assert kept == {
        **{"PATH": "/bin", "HOME": "/h", "HTTPS_PROXY": "http://proxy:3128", "PYTHONUNBUFFERED": "1"},
        **{"NO_PROXY": "example.org,localhost,127.0.0.1", "FLWR_HOME": "/f"},
        **{"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"},
    }


def test_the_executor_has_the_sites_key_and_no_way_out():
    kept = flower.work_environment(GIVEN, home="/f", keep=("FEDSCAN_SITE_KEY",))
    assert kept["FEDSCAN_SITE_KEY"] == "secret" and kept["CUDA_VISIBLE_DEVICES"] == "0"
    assert not {"HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "PYTHONPATH", "LD_PRELOAD"} & set(kept)


def test_a_proxy_in_small_letters_counts():
    assert flower.environment({"https_proxy": "http://p:1"}, home="/f")["HTTPS_PROXY"] == "http://p:1"
