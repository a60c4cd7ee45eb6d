"""The only file that names what travels between server and site, and under which key.

    server -> site   query     run                       may this run happen here, and under which plan?
                     train     run + model               one round
                     evaluate  run + model               the one private evaluation
    site -> server   query     status [+ plan]           public constants only, "pending" while a person there has yet
                                                         to approve, or a refusal with its reason
                     train     status [+ update]         a noisy model delta, or the constant "failed"
                     evaluate  status [+ histogram]      noisy counts, or the constant "failed"

`run` is the signed order (`fedscan_core.order`) and the round. A `status` carries the site's name and the anchor of its
audit log, which is a keyed digest: it tells whoever lacks the site's key nothing, not even how long the log is.

Arrays are plain numpy by name. All of one record travel as a single safetensors file, which cannot hold code: Flower
sends every array by requests of its own, some 700 for a DenseNet-121, while a file is cut into pieces of 5 MB.
Importing this module does not load Flower; the functions that make records do.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.numpy

from fedscan_core.accounting import SitePlan
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import WireError
from fedscan_core.order import Order, from_text, to_text

if TYPE_CHECKING:
    from flwr.app import RecordDict

PROTOCOL = 3
EVALUATION_ROUND = 0  # the ledger's round number of the private evaluation
LONGEST_REASON = 4000  # characters of a refusal's reason

Arrays = dict[str, np.ndarray]
Status = Literal["ok", "failed", "refused", "pending"]

_FILE = "safetensors"
_RUN, _MODEL, _STATUS, _PLAN, _UPDATE, _HISTOGRAM = "run", "model", "status", "plan", "update", "histogram"


@dataclass(frozen=True)
class Request:
    """What the server asks of a site. `round` counts from 1."""

    order: Order
    round: int
    model: Arrays | None = None

    @property
    def run_id(self) -> str:
        """The run, for ever."""
        return self.order.run_id

    @property
    def config(self) -> str:
        """`config.for_sites` JSON."""
        return self.order.config


@dataclass(frozen=True)
class Reply:
    """What a site answers. After a reservation `failed` carries no reason: the reason could depend on patients.

    `anchor`: keyed digest of the site's audit log up to and with this answer, 64 hex digits; "" where there is none.
    """

    site: str
    status: Status
    reason: str = ""
    plan: SitePlan | None = None
    update: Arrays | None = None
    histogram: np.ndarray | None = None
    anchor: str = ""


def request_record(request: Request) -> "RecordDict":
    """Packs a request."""
    from flwr.app import ConfigRecord, RecordDict

    run: dict[str, Any] = {"protocol": PROTOCOL, "round": request.round, "order": to_text(request.order)}
    record = RecordDict({_RUN: ConfigRecord(run)})
    if request.model is not None:
        record[_MODEL] = _pack(request.model)
    return record


def read_request(record: "RecordDict") -> Request:
    """Unpacks a request; the keys must be exactly those of `request_record`.

    Raises:
        WireError: another protocol version, or anything missing, mistyped or additional.
    """
    _only(record, {_RUN, _MODEL})
    run = _config(record, _RUN, {"protocol": int, "round": int, "order": str})
    if run["protocol"] != PROTOCOL:
        raise WireError(
            f"The server speaks protocol {run['protocol']}, this site {PROTOCOL}.",
            remedy="Install the same fedscan version.",
        )
    model = _unpack(record, _MODEL) if _MODEL in record else None
    return Request(from_text(run["order"]), run["round"], model)


def reply_record(reply: Reply) -> "RecordDict":
    """Packs a reply."""
    from flwr.app import ConfigRecord, RecordDict

    status: dict[str, Any] = {
        "site": reply.site,
        "status": reply.status,
        "reason": reply.reason,
        "anchor": reply.anchor,
    }
    record = RecordDict({_STATUS: ConfigRecord(status)})
    if reply.plan is not None:
        record[_PLAN] = ConfigRecord(dataclasses.asdict(reply.plan))
    if reply.update is not None:
        record[_UPDATE] = _pack(reply.update)
    if reply.histogram is not None:
        record[_HISTOGRAM] = _pack({_HISTOGRAM: reply.histogram})
    return record


def read_reply(record: "RecordDict") -> Reply:
    """Unpacks a reply; see `read_request` for the errors."""
    _only(record, {_STATUS, _PLAN, _UPDATE, _HISTOGRAM})
    status = _config(record, _STATUS, {"site": str, "status": str, "reason": str, "anchor": str})
    if status["status"] not in ("ok", "failed", "refused", "pending"):
        raise WireError(f"Unknown status '{plain(status['status'], 40)}' in a reply.")
    if not re.fullmatch(NAME_PATTERN, status["site"]):  # it becomes part of the published summary
        raise WireError("A site's name in a reply is not a plain name.")
    if not re.fullmatch("([0-9a-f]{64})?", status["anchor"]):
        raise WireError("The anchor in a reply is no digest.")
    plan = None
    if _PLAN in record:
        fields = {field.name: field.type for field in dataclasses.fields(SitePlan)}
        plan = SitePlan(**_config(record, _PLAN, fields))
    histogram = None
    if _HISTOGRAM in record:
        arrays = _unpack(record, _HISTOGRAM)
        if set(arrays) != {_HISTOGRAM}:
            raise WireError(f"Record '{_HISTOGRAM}' holds other arrays than the histogram.")
        histogram = arrays[_HISTOGRAM]
    update = _unpack(record, _UPDATE) if _UPDATE in record else None
    reason = plain(status["reason"], LONGEST_REASON)
    return Reply(status["site"], status["status"], reason, plan, update, histogram, status["anchor"])


def plain(text: str, longest: int = 200) -> str:
    """What the other side wrote, fit for a log and a terminal: one line, printable, at most `longest` characters."""
    kept = "".join(letter if letter.isprintable() else " " for letter in text[:longest])
    return kept if len(text) <= longest else kept + "..."


def fingerprint(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and bytes, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.asarray(arrays[name], order="C")
        digest.update(json.dumps([name, array.dtype.str, array.shape]).encode())  # ends by itself: no two readings
        digest.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def nbytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Payload bytes, without Flower's framing."""
    return sum(array.nbytes for array in arrays.values())


def _pack(arrays: Mapping[str, np.ndarray]) -> Any:
    from flwr.app import Array, ArrayRecord

    data = safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
    return ArrayRecord({_FILE: Array("uint8", (len(data),), _FILE, data)})


def _unpack(record: "RecordDict", key: str) -> Arrays:
    arrays = record.array_records.get(key)
    if arrays is None or set(arrays) != {_FILE}:
        raise WireError(f"Record '{key}' is not a record of one safetensors file.")
    try:
        return safetensors.numpy.load(arrays[_FILE].data)
    except Exception:  # whatever is said of bytes that the other side made up
        raise WireError(f"Record '{key}' holds no safetensors file.") from None


def _only(record: "RecordDict", allowed: set[str]) -> None:
    extra = set(record) - allowed
    if extra:
        raise WireError(f"A message carries unknown records: {plain(', '.join(sorted(extra)))}.")


def _config(record: "RecordDict", key: str, types: Mapping[str, Any]) -> dict[str, Any]:
    config = record.config_records.get(key)
    if config is None or set(config) != set(types):
        raise WireError(f"Record '{key}' is missing or has other fields than protocol {PROTOCOL}.")
    for name, kind in types.items():
        value = config[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise WireError(f"Field '{name}' of record '{key}' is not of type {kind.__name__}.")
    return dict(config)
