"""The lock on the site's key: many work with it, or one replaces it."""

import signal
import stat
import subprocess
import sys

import pytest

from fedscan_client import key_rotation, key_use, keys
from fedscan_core.errors import SiteKeyError

HOLDER = """
import sys, time
from pathlib import Path
from fedscan_client import key_use
with key_use.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def site(tmp_path):
    keys.create(tmp_path, keys.Settings())
    return tmp_path


def rotate(site, **more):
    return key_rotation.rotate(site, keys.Settings(), None, **more)


def test_many_hold_it_and_nobody_rotates_meanwhile(site):
    before = keys.load(site, keys.Settings())
    with key_use.held(site), key_use.held(site), pytest.raises(SiteKeyError, match="in use"):
        rotate(site)
    assert keys.load(site, keys.Settings()) == before and not (site / "key.next").exists()
    assert stat.S_IMODE((site / key_use.FILE).stat().st_mode) == 0o600
    assert rotate(site)


def test_nobody_begins_while_a_rotation_is_at_work(site):
    def also(key):
        with pytest.raises(SiteKeyError, match="at work"), key_use.held(site):
            pass
        with pytest.raises(SiteKeyError, match="in use"):
            rotate(site)

    assert rotate(site, also=[also])
    with key_use.held(site):
        pass


def test_nobody_begins_between_the_halves_of_a_stopped_rotation(site):
    def stopped(key):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(site, also=[stopped])
    with pytest.raises(SiteKeyError, match="stopped halfway") as refused, key_use.held(site):
        pass
    assert "key rotate" in refused.value.remedy
    assert rotate(site)
    with key_use.held(site):
        pass


def test_the_lock_dies_with_its_process(site):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(site)], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(SiteKeyError, match="in use"):
            rotate(site)
        holder.send_signal(signal.SIGKILL)
    assert rotate(site)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(SiteKeyError, match="cannot be opened"), key_use.held(tmp_path / "none"):
        pass
