"""The ClientApp: permit, approve, reserve, train, settle, check, reply. The same one in simulation and in a hospital.

Guarantee: with privacy enabled, everything this app sends is public by declaration, or a noisy update or histogram of
an admitted plan, or a constant. After a reservation the site answers with valid noisy bytes or with the constant
`failed`; what went wrong stays in the site's own log. How long an answer takes is outside the guarantee.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from safetensors.numpy import load_file, save

from fedscan_client import approvals, budget, cohort, consent, eligible, evaluate, keys, site, train
from fedscan_client.approvals import Refused
from fedscan_client.consent import Decision, Register
from fedscan_client.dp import engine, ledger, ledger_lock
from fedscan_client.dp.ledger import Release
from fedscan_client.gate import egress, guard
from fedscan_client.site import Site
from fedscan_core import accounting, config, files, order, policy, wire
from fedscan_core.accounting import SitePlan
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, FedscanError, FolderError, PrivacyError, RecordDamaged, WireError
from fedscan_core.wire import Arrays, Reply, Request
from fedscan_models import registry

SITE_KEY = "fedscan-site"  # node_config: the site's folder

OpenSite = Callable[[Context], Site]


def make_app(open_site: OpenSite) -> ClientApp:
    """The ClientApp of whatever site `open_site` finds for a node."""
    app = ClientApp()

    @app.query()
    def declare(message: Message, context: Context) -> Message:
        return _answer(message, open_site, context, _declare)

    @app.train()
    def train_(message: Message, context: Context) -> Message:
        return _answer(message, open_site, context, _train)

    @app.evaluate()
    def evaluate_(message: Message, context: Context) -> Message:
        return _answer(message, open_site, context, _evaluate)

    return app


def _answer(
    message: Message, open_site: OpenSite, context: Context, handle: Callable[[Site, Request], Reply]
) -> Message:
    """Runs one handler; whatever goes wrong becomes the constant `failed`, and its text stays here."""
    try:
        here = open_site(context)
    except Exception:  # Flower would send the text, which names the site's files; there is no site.log to note it in
        return Message(wire.reply_record(Reply("unknown", "failed")), reply_to=message)
    kind, request = message.metadata.message_type.partition(".")[0], None
    try:
        request = wire.read_request(message.content)
        reply = handle(here, request)
        with _leaving(here, request, reply):
            content = egress.answer(here, kind, request, reply)
    except Exception as error:
        _note(here, f"{type(error).__name__}: {error}")
        content = egress.failed(here, kind, request, lambda text: _note(here, text))
    return Message(content, reply_to=message)


def _leaving(here: Site, request: Request, reply: Reply) -> contextlib.AbstractContextManager[None]:
    """Around an answer made of data: somebody may have revoked the run while it was made."""
    holds_data = reply.update is not None or reply.histogram is not None
    if holds_data and (here.folder / site.PAUSED).exists():
        raise Refused("this site is paused")
    return approvals.releasing(here, request.order) if holds_data else contextlib.nullcontext()


def _declare(here: Site, request: Request) -> Reply:
    """Permit: the plan this site would follow, from public values alone, or a refusal with its reason.

    Nobody here is asked to approve what the policy or the budget refuses, and nothing is charged before the approval.
    """
    budget.note_policy(here)
    try:
        run, plan = _permit(here, request)
        if run.privacy.enabled and (over := budget.over(here, request.run_id, plan)):
            raise Refused(over)
        known = approvals.note_request(here, request.order)
        if known.state == "pending":
            return Reply(here.name, "pending", approvals.PENDING)
        approvals.check(here, request.order)
        try:
            _register(here)
        except FedscanError as error:  # of register, key or site.toml: the text names the site's files
            _note(here, f"{type(error).__name__}: {error}")
            raise Refused("this site has no consent register that can be used now") from None
        if run.privacy.enabled:
            lifetime = ledger.Budget(here.policy.max_epsilon, here.policy.max_delta)
            ledger.open_ledger(here.book, lifetime, here.patients_declared, here.policy.gate)
            ledger.admit(here.book, request.run_id, plan, _sha(request.config), here.policy.epsilon_per_year)
    except Refused as refused:
        return Reply(here.name, "refused", refused.reason)
    except RecordDamaged:
        raise  # names a file of the site: the server hears `failed`
    except (ConfigError, PrivacyError) as error:  # they depend on the request and on what the site declares only
        return Reply(here.name, "refused", str(error))
    return Reply(here.name, "ok", plan=plan)


def _train(here: Site, request: Request) -> Reply:
    run, plan = _permit(here, request)
    approvals.check(here, request.order)
    if not 1 <= request.round <= run.train.rounds:
        raise WireError(f"Round {request.round} is not one of the run's {run.train.rounds}.")
    register = _register(here)  # before the reservation: a register out of date burns no round

    def work() -> Arrays:
        network = registry.for_run(run)
        guard.load_model(network.module, request.model)
        patients = _cohort(here, run, "train", register, request.run_id)
        delta = train.train_round(network.module, patients, run, plan, round_=request.round, site=here.name)
        egress.check(delta, egress.declared(request.config, "update"))
        return delta

    clip, divisor = engine.sensitivity(run.privacy.clip), plan.sampling_rate * plan.patients_declared
    steps = run.train.local_steps
    release = Release("poisson_gauss", plan.sampling_rate, plan.noise_multiplier, clip, divisor, steps)
    update = _release(here, request, run, plan, release, work)
    return Reply(here.name, "failed") if update is None else Reply(here.name, "ok", update=update)


def _evaluate(here: Site, request: Request) -> Reply:
    run, plan = _permit(here, request)
    approvals.check(here, request.order)
    if not (run.evaluation.private and run.privacy.enabled) or request.round != wire.EVALUATION_ROUND:
        raise WireError("The run has no private evaluation.")
    register = _register(here)

    def work() -> Arrays:
        network = registry.for_run(run)
        guard.load_model(network.module, request.model)
        patients = _cohort(here, run, run.evaluation.split, register, request.run_id)
        counts = evaluate.noisy_histogram(network.module, patients, run, plan)
        egress.check({"histogram": counts}, egress.declared(request.config, "histogram"))
        return {"histogram": counts}

    release = Release("gaussian", 1.0, plan.evaluation_noise, sensitivity=1.0, divisor=1.0, steps=0)
    released = _release(here, request, run, plan, release, work)
    return Reply(here.name, "failed") if released is None else Reply(here.name, "ok", histogram=released["histogram"])


def _register(here: Site) -> Register | None:
    """The hospital's word on its patients as it is today; None at a site of phantoms or public images without one.

    Raises:
        ConsentError: it is missing, damaged or too old. That depends on the file, which is the hospital's to keep.
        ConfigError, SiteKeyError: project, issuer or the site's key are not what they were.
    """
    if here.consent is None:
        return None
    key = here.names(keys.load(here.folder, here.key))
    return consent.load(here.consent, key, site_folder=here.folder, today=date.today())


def _cohort(here: Site, run: RunConfig, split: str, register: Register | None, run_id: str) -> cohort.Patients:
    """Who takes part in this round: of the patients taken in, those whom the register permits today."""
    patients, today = cohort.load_patients(here, run, split), date.today()
    if patients.left_out:
        _note(here, f"{len(patients.left_out)} images of {split} were left out, first: {patients.left_out[0]}")
    if register is not None:
        patients = patients.only(lambda name, until: _cleared(register.decide(name.partition("/")[0]), until, today))
        names = {name.partition("/")[0] for name in patients.ids}  # an image's id begins with its patient's
        eligible.record(here.folder, run_id, run.model.name, names)
    return patients


def _cleared(decision: Decision, until: date | None, today: date) -> bool:
    """Whether a patient of the cohort may take part today; `until`: as of the intake, which knew the birth date."""
    if not decision.permit or (until is not None and until < today):
        return False
    # A guardian's permit whose end nobody knows: given since the last intake.
    return not (decision.by_guardian and decision.until is None and until is None)


def _permit(here: Site, request: Request) -> tuple[RunConfig, SitePlan]:
    """What the site's policy says today, at every message: the run and its plan here.

    Raises:
        Refused: the order is stale or not signed by whom the site names, or the run is outside the policy.
    """
    if stale := order.fault(request.order):
        raise Refused(stale)
    if (here.folder / site.RETIRED).exists():
        raise Refused("this site has left the federation")
    run = config.from_server(request.config)
    reason = policy.refusal(here.policy, run, None, request.order)  # first: a plan of many steps takes long to price
    if reason is not None:
        raise Refused(reason)
    plan = accounting.plan_for(run, here.patients_declared)
    reason = policy.refusal(here.policy, run, plan, request.order)
    if reason is None and here.consent is None and not here.policy.research_cohort:
        reason = "this site has no consent register"
    if reason is not None:
        raise Refused(reason)
    return run, plan


def _release(
    here: Site, request: Request, run: RunConfig, plan: SitePlan, release: Release, work: Callable[[], Arrays]
) -> Arrays | None:
    """Reserve, work, persist, settle: the bytes are on disk before `egress.answer` can send them; None = burned.

    The bytes lie beside the ledger, which stays small and is only ever added to: it holds their digest.
    """
    run_id, round_ = request.run_id, request.round
    what = "update" if release.steps else "histogram"
    if not run.privacy.enabled:
        return work()
    answer = here.folder / "outbox" / run_id / f"{round_}-{what}.safetensors"
    config_sha, input_sha = _sha(request.config), wire.fingerprint(request.model or {})
    state = ledger.reserve(
        here.book, run_id, round_, plan=plan, config_sha=config_sha, input_sha=input_sha, release=release
    )
    if state == "burned":
        return None
    if state == "new":
        arrays = work()
        _keep_only(answer)
        files.write_atomic(answer, save(arrays))
        ledger.settle(here.book, run_id, round_, wire.fingerprint(arrays))
    released: Arrays = load_file(answer)
    if wire.fingerprint(released) != ledger.answer_of(here.book, run_id, round_):
        raise RecordDamaged(f"{answer} is not what was persisted.", remedy="It is not made again.")
    return released


def _sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _keep_only(answer: Path) -> None:
    """Drops the run's older answers: the server has moved on when it asks the next question."""
    answer.parent.mkdir(parents=True, exist_ok=True)
    for old in answer.parent.iterdir():
        if old != answer:
            old.unlink()


def _note(here: Site, text: str) -> None:
    """Writes what went wrong to the site's own log, which never leaves."""
    when = datetime.now(UTC).isoformat(timespec="seconds")
    line = f"{when} {wire.plain(text, 2000)}\n".encode()  # one line, whatever the server wrote into a message
    with contextlib.suppress(OSError):
        descriptor = os.open(here.folder / "site.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(line)


def _open_configured(context: Context) -> Site:
    """A deployed node's site: the folder its agent named when it started the node. Its ledger is this process's."""
    here = site.load(Path(str(context.node_config[SITE_KEY])))
    try:
        ledger_lock.hold(here.ledger)
    except FolderError as error:
        _note(here, str(error))
        raise
    return here


app = make_app(_open_configured)
