"""The questions of a run and their answers: who is asked, for how long, and what is no answer.

In simulation every node is asked once and waited for. A deployed run knows sites by their enrolled names: it looks up
where each one is whenever it asks, so a site that registered anew keeps its place, and one that was revoked is asked
nothing more. A site that cannot be reached is asked again while the quorum does not stand and the round's time lasts;
the same question has the same answer at a site, so asking twice costs no privacy. Messages live as long as the round:
a site that comes back later is never handed a stale one (a SuperNode fetches no message past its time to live).
"""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedscan_core import wire
from fedscan_core.config import RunConfig
from fedscan_core.errors import RunFailed, WireError
from fedscan_core.order import Order
from fedscan_core.wire import Arrays, Reply, Request
from fedscan_server import tracking
from fedscan_server.tracking import Disk, Progress

NO_ANSWER, UNREACHABLE, BROKEN = "did not answer in time", "could not be reached", "the site's app did not answer"
UNKNOWN = "is not enrolled any more"
_AWAY = (ErrorCode.NODE_UNAVAILABLE, ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)
BROKEN_AT_MOST = 3  # times a site's program may give no answer to one question before it counts as missing


@dataclass(frozen=True)
class Job:
    """One run for the server.

    Attributes:
        run: the experiment.
        order: what is asked of the sites, under an id that is this run's for ever.
        folder: the run folder, made already.
        sites: simulation: how many nodes to wait for before the run begins; some runtimes connect them one by one.
        judge: simulation only: exact metrics of a model on pretend held-out patients.
        watch: told of every step.
        stop: set by somebody else to end the run between two messages; it stays resumable.
        timeout: simulation: seconds to wait for the sites of one round; None = for ever.
        deployed: real hospitals: the quorum is strict, waits are those of run.federation, RUN/stop ends the run.
        names: deployed: the enrolled sites that take part, node id -> name, as of now. It is read again for every
            question. An answer that names another site than its node's is dropped.
        keep_anchor: deployed: told (site, round, anchor) of every answer.
        init: a file of start weights that stands for model.init.
        disk: how models and the summary are read and written.
        poll: seconds between two looks for answers.
        again: seconds until a site that could not answer, or has yet to decide, is asked again.
    """

    run: RunConfig
    order: Order
    folder: Path
    sites: int = 1
    judge: Callable[[Arrays], dict[str, Any]] | None = None
    watch: Callable[[Progress], None] = lambda progress: None
    stop: threading.Event = field(default_factory=threading.Event)
    timeout: float | None = None
    deployed: bool = False
    names: Callable[[], Mapping[int, str]] | None = None
    keep_anchor: Callable[[str, int, str], None] = lambda site, round_, anchor: None
    init: Path | None = None
    disk: Disk = tracking.PLAIN
    poll: float = 0.05
    again: float = 5.0

    @property
    def wait(self) -> float | None:
        """Seconds that one round's answers are waited for; None = for ever."""
        return self.run.federation.round_minutes * 60 if self.deployed else self.timeout

    def quorum(self, sites: int) -> int:
        """Usable updates that a round of this many sites needs."""
        least = self.run.aggregation.min_sites
        return least if self.deployed else min(least, sites)

    def check_stop(self) -> None:
        """Ends the run where somebody asked for it.

        Raises:
            RunFailed: they did.
        """
        if self.stop.is_set() or (self.deployed and (self.folder / tracking.STOP).exists()):
            raise RunFailed("The run was stopped.")


@dataclass(frozen=True)
class Answer:
    """What came from a site. `away`: the question may not have reached it, and asking it again may help."""

    site: str
    reply: Reply | str
    away: bool = False


@dataclass
class Mail:
    """The messages of a job that are under way; `late` collects the sites whose answer came after its round."""

    grid: Grid
    job: Job
    late: list[str] = field(default_factory=list)
    _old: dict[str, str] = field(default_factory=dict)  # message of a closed round -> what it was
    _looked: float = 0.0

    def send(self, kind: str, content: RecordDict, nodes: Mapping[int, str], ttl: float | None) -> dict[str, str]:
        """Sends one question to these nodes; returns message -> site, without those that could not be sent."""
        if not nodes:
            return {}
        messages = [Message(content, dst_node_id=node, message_type=kind, ttl=ttl) for node in nodes]
        names = list(self.grid.push_messages(messages))
        return {name: site for name, site in zip(names, nodes.values(), strict=False) if name}

    def arrived(self, waiting: dict[str, str], round_: int, *, named: bool = True) -> Iterator[Answer]:
        """The answers that are there now; each is taken out of `waiting`. `named`: sites are known by their names."""
        # A deployed grid hands over all that is there at once: one by one, so that memory does not grow with the sites.
        batches: list[Iterable[str]] = [[name] for name in waiting] if self.job.deployed else [set(waiting)]
        for batch in batches if waiting else ():
            for message in self.grid.pull_messages(batch):
                site = waiting.pop(message.metadata.reply_to_message_id, None)
                if site is not None:
                    yield self._answer(site, message, round_, named)
        self._look_for_late()

    def close(self, waiting: Mapping[str, str], round_: int) -> None:
        """Gives these messages up: an answer that still comes is noted and thrown away."""
        self._old |= {name: f"{site}: round {round_}" for name, site in waiting.items()}

    def _answer(self, site: str, message: Message, round_: int, named: bool) -> Answer:
        if message.has_error():
            away = message.error.code in _AWAY
            return Answer(site, UNREACHABLE if away else BROKEN, away)
        try:
            reply = wire.read_reply(message.content)
        except WireError as error:
            return Answer(site, str(error))
        if named and reply.site != site:
            return Answer(site, f"answered as {reply.site}")
        if reply.anchor:
            self.job.keep_anchor(site, round_, reply.anchor)
        return Answer(site, reply)

    def _look_for_late(self) -> None:
        """Takes late answers, so that they do not lie at the SuperLink for longer than need be."""
        if not self.job.deployed or time.monotonic() - self._looked < self.job.again:
            return
        self._looked = time.monotonic()
        for name in list(self._old):
            for message in self.grid.pull_messages([name]):
                what = self._old.pop(message.metadata.reply_to_message_id, None)
                if what is not None and not message.has_error():
                    self.late.append(what)


def exchange(
    mail: Mail, kind: str, request: Request, nodes: Callable[[], Mapping[int, str]], sites: Sequence[str]
) -> Iterator[Answer]:
    """Asks every site one question and yields one answer each, as they arrive; what is no answer comes as its reason.

    Args:
        mail: the run's messages.
        kind: "train" or "evaluate".
        request: the question, the same for every site.
        nodes: node id -> site, as of now.
        sites: who is asked.

    Raises:
        RunFailed: the run was stopped.
    """
    job = mail.job
    content = wire.request_record(request)
    give_up = None if job.wait is None else time.monotonic() + job.wait
    due = dict.fromkeys(sites, 0.0)  # site -> when it is to be asked
    reasons: dict[str, str] = {}  # of those asked in vain so far
    broken: dict[str, int] = {}
    waiting: dict[str, str] = {}
    good, quorum = 0, job.quorum(len(sites))
    while waiting or due:
        job.check_stop()
        now = time.monotonic()
        if give_up is not None and now >= give_up:
            break
        asked = [site for site, when in due.items() if when <= now]
        if asked:
            for site in asked:
                del due[site]
            here = {site: node for node, site in nodes().items()}
            for site in [site for site in asked if site not in here]:
                asked.remove(site)
                yield Answer(site, UNKNOWN)
            ttl = None if give_up is None else max(give_up - now, 1.0)
            sent = mail.send(kind, content, {here[site]: site for site in asked}, ttl)
            waiting |= sent
            for site in set(asked) - set(sent.values()):
                due[site], reasons[site] = now + job.again, UNREACHABLE
        moved = False
        for answer in mail.arrived(waiting, request.round):
            moved = True
            if answer.reply == BROKEN:
                broken[answer.site] = broken.get(answer.site, 0) + 1
            again = answer.away or (answer.reply == BROKEN and broken[answer.site] < BROKEN_AT_MOST)
            if job.deployed and again:
                due[answer.site], reasons[answer.site] = time.monotonic() + job.again, str(answer.reply)
                continue
            good += isinstance(answer.reply, Reply) and answer.reply.status == "ok"
            yield answer
        if not waiting and good >= quorum:
            break  # the quorum stands: a round does not wait for those who are away
        if not moved:
            time.sleep(job.poll)
    mail.close(waiting, request.round)
    for site in waiting.values():
        yield Answer(site, NO_ANSWER)
    for site in due:
        yield Answer(site, reasons.get(site, UNREACHABLE))
