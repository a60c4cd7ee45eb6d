import os
import signal
import time

import pytest

from fedscan import stopping


def test_the_first_signal_asks_and_the_second_ends_at_once(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopping.on_signal("stopping after the last one") as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5)
        assert "fedscan: stopping after the last one; once more" in capsys.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
