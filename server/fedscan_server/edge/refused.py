"""A request that is turned away: HTTP status, text and remedy. The texts hold public values only."""

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from fedscan_core.errors import FedscanError


class Refused(FedscanError):
    """Turned away with an HTTP status.

    Args:
        status: 4xx or 5xx. 502, 503 and 504 mean "later": Flower's SuperNode tries again after those only, and ends
            itself after 401.
        message: what is wrong.
        remedy: what to do next.
        more: further fields of the JSON answer.
    """

    def __init__(self, status: int, message: str, remedy: str = "", more: Mapping[str, Any] | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.status, self.more = status, dict(more or {})

    def response(self) -> JSONResponse:
        """The answer. The connection ends with it: what is left of a refused body is not read."""
        body = {"error": self.message, "remedy": self.remedy, **self.more}
        return JSONResponse(body, self.status, headers={"connection": "close", "cache-control": "no-store"})


def not_found() -> Refused:
    """The one answer for whatever does not exist or is not for the network."""
    return Refused(404, "There is nothing here.", "server/docs/api.md lists what there is.")
