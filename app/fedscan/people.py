"""The researcher's side of the coordinator's HTTP API: one function for each question.

Trusts the authority of the invitation and no other, follows no redirect, honours HTTPS_PROXY and NO_PROXY. Whatever a
coordinator or a site made up reaches the terminal without control characters.
"""

import base64
import contextlib
import hashlib
import re
import ssl
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import IO, Any

import httpx

from fedscan_core import order, wire
from fedscan_core.config import NAME_PATTERN
from fedscan_core.errors import ConfigError, FedscanError
from fedscan_core.order import Order

PREFIX = "/fedscan/v1"
FINAL = ("finished", "failed", "stopped")  # states of a run that nobody works on
_SUBMIT = httpx.Timeout(600.0, connect=10.0)  # the coordinator prices the run for each site before it answers
_TIMEOUT = httpx.Timeout(60.0, connect=10.0)  # progress is answered within 20 s
_CLOCK = timedelta(minutes=5)  # sites bear 10
_LARGEST = 64 * 2**20  # bytes of a JSON answer


class CoordinatorError(FedscanError):
    """The coordinator refuses, or answers what this version does not understand."""


class Unreachable(CoordinatorError):
    """It may work when tried again: no connection, or the coordinator is starting or overloaded."""


@dataclass(frozen=True)
class Hello:
    """Who answers. `utc` is its clock."""

    coordinator: str
    version: str
    protocol: int
    utc: datetime


@dataclass(frozen=True)
class Login:
    """What an invitation was exchanged for."""

    name: str
    role: str
    token: str
    coordinator: str


@dataclass(frozen=True)
class Site:
    """An enrolled site and the policy that it publishes (`fedscan_core.policy.public`)."""

    name: str
    online: bool
    last_seen: str
    policy: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Where a run stands. `state`: waiting, running, finished, failed, stopped."""

    run_id: str
    name: str
    launcher: str
    state: str
    reason: str
    submitted: str
    round: int
    rounds: int


@dataclass(frozen=True)
class Detail:
    """One run; `summary` once it is finished. `toml` is its RUN.toml, "" where the coordinator does not tell."""

    run: Run
    summary: dict[str, Any] | None
    progress_lines: int
    toml: str


@contextlib.contextmanager
def connect(address: str, ca: str, token: str = "") -> Iterator[httpx.Client]:
    """A client of one coordinator, over TLS.

    Args:
        address: https://HOST[:PORT].
        ca: PEM of the only authority to trust; "" = public authorities.
        token: bearer token; "" before `login`.

    Raises:
        ConfigError: the authority or HTTPS_PROXY cannot be used.
    """
    try:
        trust = ssl.create_default_context(cadata=ca or None)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = httpx.Client(base_url=address + PREFIX, verify=trust, headers=headers, timeout=_TIMEOUT)
    except ssl.SSLError:
        raise ConfigError("The coordinator's certificate cannot be read.", remedy="Ask for a new invitation.") from None
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise ConfigError(f"HTTPS_PROXY cannot be used: {error}.", remedy="Give it as http://HOST:PORT.") from None
    with client:
        yield client


def hello(http: httpx.Client) -> Hello:
    """Who is there."""
    answer = _ask(http, "GET", "/hello")
    with _understood():
        utc = datetime.fromisoformat(answer["utc"])
        if utc.tzinfo is None:
            raise ValueError
        return Hello(str(answer["coordinator"]), str(answer["version"]), int(answer["protocol"]), utc)


def check(hello: Hello, now: datetime) -> None:
    """Refuses to talk past one another.

    Raises:
        ConfigError: another protocol, or the clocks differ by more than sites would bear.
    """
    if hello.protocol != wire.PROTOCOL:
        raise ConfigError(
            f"The coordinator (fedscan {hello.version}) speaks protocol {hello.protocol}, this one {wire.PROTOCOL}.",
            remedy=f"Install fedscan {hello.version}.",
        )
    drift = now - hello.utc
    if abs(drift) > _CLOCK:
        way = "ahead of" if drift > timedelta(0) else "behind"
        raise ConfigError(
            f"This machine's clock is {abs(drift).total_seconds() / 60:.0f} minutes {way} the coordinator's.",
            remedy="Set it: hospitals refuse orders whose times are wrong.",
        )


def login(http: httpx.Client, token: str, public_key: str) -> Login:
    """Exchanges an invitation's one-time token for a bearer token."""
    answer = _ask(http, "POST", "/login", {"token": token, "public_key": public_key})
    with _understood():
        return Login(**{name: _text(answer, name) for name in ("name", "role", "token", "coordinator")})


def sites(http: httpx.Client) -> tuple[Site, ...]:
    """Every enrolled site, by name."""
    answer = _ask(http, "GET", "/sites")
    with _understood():
        found = [
            Site(_name(s, "name"), bool(s["online"]), str(s["last_seen"] or ""), dict(s["policy"]))
            for s in answer["sites"]
        ]
        return tuple(sorted(found, key=lambda site: site.name))


def submit(http: httpx.Client, signed: Order, toml: str, init: bytes) -> str:
    """Sends a signed order with its RUN.toml and the start weights (safetensors, or b""); returns the run's id.

    Where the connection breaks before the answer is there, the coordinator is asked whether it has the run.

    Raises:
        Unreachable: and nobody knows whether the run was taken; the text says so.
    """
    body = {"order": order.to_text(signed), "run": toml, "init": base64.b64encode(init).decode()}
    try:
        answer = _ask(http, "POST", "/runs", body, _SUBMIT)
    except Unreachable as error:
        try:
            taken = any(run.run_id == signed.run_id for run in runs(http))
        except CoordinatorError:
            raise Unreachable(
                f"{error.message} Whether the run was taken is not known.",
                remedy=f"`fedscan runs` lists {signed.run_id} if it was.",
            ) from None
        if not taken:
            raise Unreachable(
                f"{error.message} The run is not on the coordinator's list.",
                remedy=f"Launch it again, unless `fedscan runs` lists {signed.run_id} in a minute.",
            ) from None
        return signed.run_id
    with _understood():
        if answer["run_id"] != signed.run_id:
            raise ValueError
    return signed.run_id


def runs(http: httpx.Client) -> tuple[Run, ...]:
    """Every run, the newest first."""
    answer = _ask(http, "GET", "/runs")
    with _understood():
        return tuple(sorted(map(_run, answer["runs"]), key=lambda run: run.submitted, reverse=True))


def run(http: httpx.Client, run_id: str) -> Detail:
    """One run."""
    answer = _ask(http, "GET", f"/runs/{run_id}")
    with _understood():
        summary = answer["summary"]
        if summary is not None and not isinstance(summary, dict):
            raise TypeError
        return Detail(_run(answer), summary, int(answer["progress_lines"]), str(answer.get("run", "")))


def progress(http: httpx.Client, run_id: str, after: int) -> tuple[int, list[dict[str, Any]], str]:
    """Lines of progress from the `after`-th on, waiting up to 20 s for one: (where to go on, lines, the state)."""
    answer = _ask(http, "GET", f"/runs/{run_id}/progress?after={after}")
    with _understood():
        return int(answer["next"]), [dict(line) for line in answer["lines"]], _text(answer, "state")


def stop(http: httpx.Client, run_id: str) -> None:
    """Ends a run between two messages; it stays resumable."""
    _ask(http, "POST", f"/runs/{run_id}/stop", {})


def resume(http: httpx.Client, run_id: str) -> None:
    """Goes on with a run after its last whole round."""
    _ask(http, "POST", f"/runs/{run_id}/resume", {})


def archive(http: httpx.Client, run_id: str, out: IO[bytes]) -> int:
    """Writes a run's folder as tar to `out`, checked against the SHA-256 that the coordinator names; returns bytes.

    Raises:
        CoordinatorError: what came is not what the coordinator read: cut off, or changed.
    """
    digest, size = hashlib.sha256(), 0
    with _errors(http), http.stream("GET", f"/runs/{run_id}/archive") as answer:
        if answer.status_code != 200:
            answer.read()
            _raise(answer)
        for block in answer.iter_bytes(2**20):
            digest.update(block)
            out.write(block)
            size += len(block)
        wanted = answer.headers.get("fedscan-sha256", "")
    if digest.hexdigest() != wanted.lower():
        raise CoordinatorError("The run folder arrived damaged; nothing was kept.", remedy="Fetch it again.")
    return size


# ------------------------------------------------------------------------------------------------------------ plumbing


def _ask(
    http: httpx.Client, method: str, path: str, body: dict[str, Any] | None = None, wait: httpx.Timeout = _TIMEOUT
) -> dict[str, Any]:
    """The JSON object that the coordinator answers.

    Raises:
        Unreachable: no answer, or one that says "later".
        CoordinatorError: any other refusal, in the coordinator's words, or no JSON object.
    """
    with _errors(http), http.stream(method, path, json=body, timeout=wait) as answer:
        data = bytearray()
        for block in answer.iter_bytes():
            data += block
            if len(data) > _LARGEST:
                raise CoordinatorError("The coordinator's answer is too long.", remedy="Compare the versions.")
    whole = httpx.Response(answer.status_code, content=bytes(data), request=answer.request)
    if not whole.is_success:
        _raise(whole)
    with _understood():
        tree = _clean(whole.json())
        if not isinstance(tree, dict):
            raise TypeError
        return tree


def _raise(answer: httpx.Response) -> None:
    """The coordinator's own words; without them the status says what it is."""
    error, remedy = f"The coordinator answered with status {answer.status_code}.", ""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        tree = _clean(answer.json())
        error, remedy = str(tree["error"]), str(tree.get("remedy", ""))
    if answer.status_code == 401:
        remedy = remedy or "Ask for a new invitation, then: fedscan login INVITE.toml"
    later = answer.status_code in (408, 429, 502, 503, 504)
    raise (Unreachable if later else CoordinatorError)(error, remedy=remedy)


@contextlib.contextmanager
def _errors(http: httpx.Client) -> Iterator[None]:
    """What the network says, as ours."""
    where = str(http.base_url).removesuffix("/").removesuffix(PREFIX)
    try:
        yield
    except httpx.RequestError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise CoordinatorError(
                f"{where} does not show the certificate that your invitation names: {cause.verify_message}.",
                remedy="Nothing was sent. Ask the coordinator, and compare the fingerprint by telephone.",
            ) from None
        what = "no answer in time" if isinstance(error, httpx.TimeoutException) else str(error) or "connection lost"
        raise Unreachable(
            f"{where} cannot be reached: {what}.",
            remedy="Is it up, and do you need HTTPS_PROXY to get out of your network?",
        ) from None


@contextlib.contextmanager
def _understood() -> Iterator[None]:
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError):
        raise CoordinatorError(
            "The coordinator answers what this version does not understand.",
            remedy="Install the version that the coordinator runs.",
        ) from None


def _run(tree: dict[str, Any]) -> Run:
    return Run(
        run_id=_name(tree, "run_id"),
        name=_name(tree, "name"),
        launcher=_text(tree, "launcher"),
        state=_text(tree, "state"),
        reason=_text(tree, "reason"),
        submitted=_text(tree, "submitted"),
        round=int(tree["round"]),
        rounds=int(tree["rounds"]),
    )


def _name(tree: dict[str, Any], field: str) -> str:
    """It becomes part of paths and addresses."""
    if not re.fullmatch(NAME_PATTERN, value := _text(tree, field)):
        raise ValueError
    return value


def _text(tree: dict[str, Any], name: str) -> str:
    value = tree[name]
    if not isinstance(value, str):
        raise TypeError
    return value


def _clean(tree: Any) -> Any:
    """The same tree without control and format characters in its texts, except line ends and tabs."""
    if isinstance(tree, dict):
        return {_clean(key): _clean(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_clean(value) for value in tree]
    if isinstance(tree, str):
        return "".join(c for c in tree if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    return tree
