import pytest

from fedscan_core import loopback
from fedscan_server.coordinator import superexec


class Client:
    asked = 0

    def AcquireTask(self, request):
        type(self).asked += 1
        return request


@pytest.mark.parametrize("foreign", [False, True])
def test_no_task_is_taken_from_another_account(monkeypatch, foreign):
    class Mine(Client):
        asked = 0

    monkeypatch.setattr(loopback, "foreign", lambda port: foreign and port == 4711)
    superexec.guard(Mine, 4711)
    answer = Mine().AcquireTask("request")
    assert Mine.asked == (0 if foreign else 1)
    assert answer == "request" or (not answer.HasField("task") and not answer.token)
