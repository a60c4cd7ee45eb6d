"""Before the first round: which sites take part, and under which plan.

In simulation every node is asked once. Deployed sites may have a person who approves: they answer "pending" and are
asked again until everybody has decided. Once the approval time is over the run starts with those who said yes, if the
quorum stands. It ends at once where so many refused that it cannot stand any more. Who takes part is written down, so
that a resumed run goes on with the same sites and weights without asking them again.

RUN/participants.json    {"config_sha256", "sites": {name: plan}}
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from flwr.serverapp import Grid

from fedscan_core import accounting, config, files, wire
from fedscan_core.accounting import SitePlan
from fedscan_core.errors import ConfigError, FolderError
from fedscan_core.wire import Reply, Request
from fedscan_server.rounds import BROKEN_AT_MOST, NO_ANSWER, UNKNOWN, Answer, Job, Mail
from fedscan_server.tracking import Progress

PARTICIPANTS = "participants.json"
PENDING, SILENT = "waits for approval there", "has not answered yet"
_QUERY_SECONDS = 600.0  # a site that needs longer to answer is asked again
_SLOWLY = 12  # after ten minutes pending sites are asked this many times less often

Nodes = Callable[[], Mapping[int, str]]


def declare(mail: Mail, done: int) -> tuple[Nodes, dict[str, SitePlan]]:
    """Asks every site for its plan; the run goes on without those that refuse, as long as there are enough.

    Args:
        mail: the run's messages.
        done: rounds done already, for the live view.

    Returns:
        node id -> site as of now, of those that take part; site -> plan, in order of name.

    Raises:
        ConfigError: too few sites take part; it names the first refusals and their reasons.
        RunFailed: the run was stopped.
    """
    job = mail.job
    if not job.deployed:
        return _once(mail, done)
    assert job.names is not None, "a deployed run knows its sites"
    plans = _written(job)
    if plans is None:
        plans = _approved(mail, job.names, done)
        _write(job, plans)
    names, taking = job.names, frozenset(plans)
    return lambda: {node: name for node, name in names().items() if name in taking}, plans


def connected(grid: Grid, job: Job) -> list[int]:
    """The nodes, once as many are there as the job waits for, or its time is over."""
    give_up = math.inf if job.timeout is None else time.monotonic() + job.timeout
    while len(nodes := list(grid.get_node_ids())) < job.sites and time.monotonic() < give_up:
        job.check_stop()
        time.sleep(job.poll)
    return nodes


def _once(mail: Mail, done: int) -> tuple[Nodes, dict[str, SitePlan]]:
    """Simulation: a node's site is whom its first answer names."""
    job = mail.job
    asked = {str(node): node for node in connected(mail.grid, job)}
    content = wire.request_record(Request(job.order, 0))
    waiting = mail.send("query", content, {node: name for name, node in asked.items()}, None)
    give_up = math.inf if job.timeout is None else time.monotonic() + job.timeout
    plans: dict[str, SitePlan] = {}
    nodes: dict[int, str] = {}
    refused: list[str] = []

    def hear(answer: Answer) -> None:
        plan = _plan_or_reason(job, answer)
        site = answer.reply.site if isinstance(answer.reply, Reply) else f"node {answer.site}"
        if isinstance(plan, str):
            refused.append(f"{site}: {plan}")
        elif site in plans:
            refused.append(f"node {answer.site}: answers as {site}, which another node does already")
        else:
            plans[site], nodes[asked[answer.site]] = plan, site
        job.watch(Progress("declare", done, job.run.train.rounds, len(plans), len(asked), notes=tuple(refused[-1:])))

    while waiting and time.monotonic() < give_up:
        job.check_stop()
        answers = list(mail.arrived(waiting, 0, named=False))
        for answer in answers:
            hear(answer)
        if not answers:
            time.sleep(job.poll)
    for name in waiting.values():
        hear(Answer(name, NO_ANSWER))
    if len(plans) < (needed := max(job.quorum(len(asked)), 1)):
        raise _too_few(len(plans), len(asked), needed, refused)
    return lambda: nodes, dict(sorted(plans.items()))


# --------------------------------------------------------------------------------------------------------- deployed


@dataclass
class _Asked:
    """One site, while it decides. `due`: when it is asked next; infinite while a question is under way."""

    due: float = 0.0
    broken: int = 0
    status: str = SILENT
    plan: SitePlan | None = None
    refused: bool = False

    @property
    def open(self) -> bool:
        return self.plan is None and not self.refused


@dataclass
class _Asking:
    """All sites, while they decide."""

    mail: Mail
    names: Nodes
    began: float = field(default_factory=time.monotonic)
    sites: dict[str, _Asked] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)

    def look(self) -> dict[str, int]:
        """Who is enrolled now, and where. Whoever was revoked takes no part; whoever was enrolled since may."""
        here = {name: node for node, name in self.names().items()}
        for name in here:
            if name not in self.sites or self.sites[name].status == UNKNOWN:
                self.sites[name] = _Asked()
        for name in self.sites.keys() - here.keys():
            self.sites[name] = _Asked(status=UNKNOWN, refused=True)
        return here

    def ask(self, here: Mapping[str, int]) -> None:
        """Asks those whose time has come."""
        now, job = time.monotonic(), self.mail.job
        due = [name for name, site in self.sites.items() if site.open and site.due <= now]
        if not due:
            return
        content = wire.request_record(Request(job.order, 0))
        sent = self.mail.send("query", content, {here[name]: name for name in due}, _QUERY_SECONDS)
        self.waiting |= sent
        for name in due:
            self.sites[name].due = math.inf if name in sent.values() else now + job.again

    def hear(self, answer: Answer) -> None:
        """Takes one answer in."""
        job, site = self.mail.job, self.sites[answer.site]
        found = _plan_or_reason(job, answer)
        failed = isinstance(answer.reply, str) or answer.reply.status == "failed"
        patient = time.monotonic() - self.began < _QUERY_SECONDS
        site.due = time.monotonic() + job.again * (1 if patient else _SLOWLY)
        if not site.open:
            return  # revoked while the question was under way
        if isinstance(found, SitePlan):
            site.plan = found
        elif isinstance(answer.reply, Reply) and answer.reply.status == "pending":
            site.status, site.broken = PENDING, 0
        else:
            site.status = found
            site.broken += failed and not answer.away
            site.refused = not answer.away and (not failed or site.broken >= BROKEN_AT_MOST)

    def notes(self) -> list[str]:
        """What keeps each site from taking part."""
        return [f"{name}: {site.status}" for name, site in sorted(self.sites.items()) if site.plan is None]


def _approved(mail: Mail, names: Nodes, done: int) -> dict[str, SitePlan]:
    """Asks until everybody has decided, or the approval time is over."""
    job, asking = mail.job, _Asking(mail, names)
    least, rounds = job.quorum(0), job.run.train.rounds
    approval = job.run.federation.approval_hours * 3600
    began = datetime.now(UTC)
    issued = datetime.fromisoformat(job.order.issued)
    # From the order's issue on, so that a restart does not begin the wait anew; but everybody gets time for one answer.
    grace = min(_QUERY_SECONDS, approval, job.run.federation.round_minutes * 60)
    left = max(approval - (began - issued).total_seconds(), grace)
    shown: tuple[object, ...] = ()
    while True:
        job.check_stop()
        asking.ask(asking.look())
        answers = list(mail.arrived(asking.waiting, 0))
        for answer in answers:
            asking.hear(answer)
        sites = asking.sites
        plans = {name: site.plan for name, site in sorted(sites.items()) if site.plan is not None}
        undecided = sum(site.open for site in sites.values())
        over = time.monotonic() - asking.began >= left
        if (now := (len(plans), len(sites), *asking.notes())) != shown:
            shown = now
            job.watch(Progress("declare", done, rounds, len(plans), len(sites), notes=tuple(asking.notes())))
        if len(plans) + (0 if over else undecided) < least:
            raise _too_few(len(plans), len(sites), least, asking.notes())
        if plans and (over or not undecided):
            break
        if not answers:
            time.sleep(job.poll)
    mail.close(asking.waiting, 0)
    return plans


def _write(job: Job, plans: Mapping[str, SitePlan]) -> None:
    sites = {name: dataclasses.asdict(plan) for name, plan in plans.items()}
    record = {"config_sha256": config.sha256(job.run), "sites": sites}
    files.write_atomic(job.folder / PARTICIPANTS, (json.dumps(record, indent=2) + "\n").encode())


def _written(job: Job) -> dict[str, SitePlan] | None:
    """Who takes part in a run that began before; None for a new one."""
    path = job.folder / PARTICIPANTS
    try:
        record = json.loads(path.read_bytes())
        plans = {name: SitePlan(**plan) for name, plan in record["sites"].items()}
        known = record["config_sha256"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FolderError(f"{path} cannot be read.", remedy="Start the run anew under another id.") from None
    if known != config.sha256(job.run):
        raise FolderError(
            f"{job.folder} holds a run with another configuration than its run.toml says now.",
            remedy="Put the old run.toml back, or start a new run.",
        )
    return plans


# ------------------------------------------------------------------------------------------------------------- both


def _plan_or_reason(job: Job, answer: Answer) -> SitePlan | str:
    """The plan a site may follow, or why it takes no part."""
    reply = answer.reply
    if isinstance(reply, str):
        return reply
    if reply.status != "ok" or reply.plan is None:
        return reply.reason or "could not answer"
    return accounting.plan_fault(job.run, reply.plan) or reply.plan


def _too_few(taking: int, asked: int, needed: int, refused: list[str]) -> ConfigError:
    return ConfigError(
        f"{taking} of {asked} sites take part, {needed} needed. Refused: {'; '.join(sorted(refused)[:5])}",
        remedy="Ask for what the sites' policies allow.",
    )
