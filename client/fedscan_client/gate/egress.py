"""The way out: `answer` builds every reply that names its site, after it was checked and written to the audit log.

A reply may hold what its kind and status allow and nothing else: the public plan with the answer to a query, arrays of
exactly the names, shapes, types and so sizes that the run declares with an answer to training or evaluation, a reason
with a refusal or while somebody has yet to decide; with `failed` nothing at all. Every reply, whatever its status,
adds one `answer` to the log and carries the log's new anchor: that the anchor changes tells nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedscan_client.audit import log
from fedscan_client.site import Site
from fedscan_core import accounting, config, wire
from fedscan_core.config import RunConfig
from fedscan_core.errors import PrivacyError
from fedscan_core.wire import Arrays, Reply, Request, fingerprint, nbytes
from fedscan_models import histograms, registry

if TYPE_CHECKING:
    from flwr.app import RecordDict

What = Literal["update", "histogram"]
Declared = Mapping[str, tuple[tuple[int, ...], str]]

_WHAT: Mapping[str, What] = {"train": "update", "evaluate": "histogram"}


@functools.lru_cache(maxsize=8)
def declared(config_json: str, what: What) -> Declared:
    """Name -> (shape, dtype string) of what a run may get from a site: it follows from the run alone.

    Args:
        config_json: `config.for_sites` of the run.
        what: update (a delta of every trained parameter) or histogram (of the private evaluation).

    Raises:
        ConfigError: no run of this version.
    """
    run = config.from_server(config_json)
    if what == "histogram":
        return {"histogram": (histograms.shape(run), "<f8")}
    network = registry.for_run(run)
    return {name: (tuple(p.shape), "<f4") for name, p in network.module.named_parameters() if p.requires_grad}


def check(arrays: Arrays, allowed: Declared) -> None:
    """Refuses everything but exactly the allowed arrays, all finite.

    Args:
        arrays: what is about to leave.
        allowed: name -> (shape, dtype string).

    Raises:
        PrivacyError: another name, shape or type, or a value that is not finite.
    """
    if {name: (array.shape, array.dtype.str) for name, array in arrays.items()} != dict(allowed):
        raise PrivacyError("The reply does not have the names, shapes and types it may have.")
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise PrivacyError("The reply is not finite.")


def answer(here: Site, kind: str, request: Request | None, reply: Reply) -> "RecordDict":
    """What is sent for a reply; log and anchor first: when this returns, both records are on disk.

    Args:
        here: the site.
        kind: of the message that is answered: query, train or evaluate.
        request: None where it could not be read; then the reply is `failed`.
        reply: without an anchor.

    Raises:
        PrivacyError: the reply holds what it may not hold.
        RecordDamaged, OSError: the audit log was changed or cannot be written: nothing may leave.
    """
    _check_reply(here, kind, request, reply)
    run_id, round_ = ("", 0) if request is None else (request.run_id, request.round)
    told: dict[str, Any] = {"kind": kind, "run_id": run_id, "round": round_}
    records = [("answer", {**told, "status": reply.status, "reason": reply.reason})]
    arrays = _arrays(reply)
    if arrays is not None and request is not None:
        records.insert(0, ("release", _release(here, request, _WHAT[kind], arrays)))
    anchor = log.append_all(here.folder, records)
    return wire.reply_record(dataclasses.replace(reply, anchor=anchor))


def failed(here: Site, kind: str, request: Request | None, note: Callable[[str], None]) -> "RecordDict":
    """The constant `failed`, which always can be sent: without an anchor where the log cannot be written.

    `note` is told why it could not; that text stays at the site.
    """
    reply = Reply(here.name, "failed")
    try:
        return answer(here, kind, request, reply)
    except Exception as error:  # Flower would send its text
        note(f"{type(error).__name__}: {error}")
        return wire.reply_record(reply)


def _arrays(reply: Reply) -> Arrays | None:
    return {"histogram": reply.histogram} if reply.histogram is not None else reply.update


def _release(here: Site, request: Request, what: What, arrays: Arrays) -> dict[str, Any]:
    """What left, by name of the run, bytes and hash, and what the run holds of the budget: reserved before, whole."""
    plan = accounting.plan_for(config.from_server(request.config), here.patients_declared)
    told: dict[str, Any] = {"run_id": request.run_id, "round": request.round, "what": what, "arrays": len(arrays)}
    told |= {"bytes": nbytes(arrays), "sha256": fingerprint(arrays)}
    return told | {"epsilon_of_run": plan.epsilon, "delta_of_run": plan.delta}


def _check_reply(here: Site, kind: str, request: Request | None, reply: Reply) -> None:
    """Refuses a reply that holds more, or less, than its kind and status allow."""
    holds = {name for name in ("plan", "update", "histogram") if getattr(reply, name) is not None}
    may = {"query": {"plan"}, "train": {"update"}, "evaluate": {"histogram"}}.get(kind, set())
    if reply.site != here.name or reply.anchor or holds != (may if reply.status == "ok" else set()):
        raise PrivacyError(f"A reply with status {reply.status} to a {kind} holds what it may not hold.")
    if reply.reason and reply.status not in ("refused", "pending"):
        raise PrivacyError(f"A reply with status {reply.status} gives a reason.")
    if reply.status != "ok":
        return
    if request is None or not holds:
        raise PrivacyError("An answer to a message that was not understood.")
    run = config.from_server(request.config)
    if reply.plan is not None:
        _check_plan(here, run, reply.plan)
    arrays = _arrays(reply)
    if arrays is not None:
        check(arrays, declared(request.config, _WHAT[kind]))


def _check_plan(here: Site, run: RunConfig, plan: accounting.SitePlan) -> None:
    """A plan follows from the run and the declared size: nothing in it is measured."""
    if plan.patients_declared != here.patients_declared or accounting.plan_fault(run, plan) is not None:
        raise PrivacyError("The plan is not one that follows from the run and the declared cohort size.")
