"""FHIR Consents of a hospital: whose they are, and which of them decides.

Read are a file with a Bundle (JSON), a file of NDJSON (one resource a line), or a folder of such files, as FHIR Bulk
Data Export writes them; all files of a folder are one export. Its date is the newest of manifest.json's
transactionTime, Bundle.timestamp and Bundle.meta.lastUpdated; without any of them the day on which the newest file was
modified. It is never a resource's: whether an export is too old must not depend on one patient.

A consent belongs to a patient by `patient.identifier` (R5: `subject`), or through a reference to a Patient in the same
file or folder; identifiers count whose system is in `settings.issuers`. Of a patient's consents the newest decides:

- draft, proposed and entered-in-error ones are no word of the patient;
- every other one that does not permit (inactive, rejected, not-done, not understood, denied, about something else)
  refuses from its date on: an inactive one that is the newest is a withdrawal;
- several of the very same date are read together, as a consent management such as gICS writes one for each policy: each
  of `settings.codes` has to be permitted by one of them and denied by none;
- where it is not sure which is newer (a day and a year, say), a denial beats a permit;
- one without a date may be the newest: no permit.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from fedscan_client.consent import fhir_consent, fhir_values
from fedscan_client.consent.decision import Decision
from fedscan_client.consent.fhir_consent import Said
from fedscan_client.consent.fhir_values import Malformed, Node, NotUnderstood
from fedscan_client.consent.lists import is_identifier, modified
from fedscan_client.consent.settings import Settings
from fedscan_client.intake.deid import patient_name
from fedscan_client.intake.records import PatientId
from fedscan_core.errors import ConsentError

MANIFEST = "manifest.json"  # of FHIR Bulk Data Export
_BUNDLES = ("collection", "searchset", "batch", "transaction")
_BUNDLE = fhir_values.elements("resourceType id meta language identifier type timestamp total link entry signature")
_ENTRY = fhir_values.elements("id extension link fullUrl resource search request response")
_PATIENT = fhir_values.elements(
    "resourceType meta language text identifier active name telecom gender birthDate deceasedBoolean deceasedDateTime "
    "address maritalStatus multipleBirthBoolean multipleBirthInteger photo contact communication generalPractitioner "
    "managingOrganization"
)


@dataclass(frozen=True)
class _Patient:
    """A Patient resource: its keyed names here, its birth date, and whether all of it is understood."""

    names: frozenset[str]
    born: date | None = None
    not_understood: str = ""


@dataclass(frozen=True)
class _Whose:
    """What a Consent says about whose it is: keyed names, references, and whether an identifier cannot be used."""

    names: frozenset[str]
    references: tuple[str, ...]
    bad: bool


@dataclass
class _Export:
    """What has been read so far. Patients are keyed by (file, reference), and by reference over all files."""

    consents: list[tuple[int, Said, _Whose]] = field(default_factory=list)
    patients: dict[tuple[int, str] | str, _Patient | None] = field(default_factory=dict)  # None: two of one name
    dates: list[date] = field(default_factory=list)  # that it declares itself
    modified: list[date] = field(default_factory=list)  # of its files


def read(
    settings: Settings, key: bytes, path: Path, today: date, notes: Counter[str]
) -> tuple[date, dict[str, Decision]]:
    """An export's date and what it says of each patient in it. See `register.load`."""
    export = _Export()
    files = _files(settings, path)
    total = 0
    for number, file in enumerate(files, start=1):
        try:
            export.modified.append(modified(file))
            for resource, url in _resources(file, export):
                total += resource.get("resourceType") == "Consent"
                _take(resource, url, number, export, settings, key, today)
        except (OSError, UnicodeDecodeError, Malformed) as error:
            what = (
                str(error) if isinstance(error, Malformed) else "it cannot be read, or is not UTF-8"
            )  # file names may name patients
            raise ConsentError(
                f"File {number} of {len(files)} of the consent register {settings.path}: {what}.",
                remedy="Export it again as FHIR JSON: one Bundle, or NDJSON.",
            ) from None
    if not total:
        raise ConsentError(
            f"The consent register {settings.path} holds no FHIR Consent.",
            remedy="Export the Consents of research again, with the Patients they refer to.",
        )
    return max(export.dates or export.modified), _decisions(export, settings, notes)


# ------------------------------------------------------------------------------------------------------------- reading


def _files(settings: Settings, path: Path) -> list[Path]:
    """The file, or all of a folder's. A file of another kind could be the one with the withdrawals: refused."""
    try:
        if not path.is_dir():
            return [path]
        found = sorted(inner for inner in path.iterdir() if not inner.name.startswith("."))
    except OSError:
        raise ConsentError(
            f"The consent register {settings.path} cannot be read.", remedy="Check [consent] path and its permissions."
        ) from None
    strange = [inner for inner in found if inner.suffix not in (".json", ".ndjson") or not inner.is_file()]
    if strange:
        raise ConsentError(
            f"The consent register {settings.path} holds {len(strange)} files or folders that are neither .json nor "
            ".ndjson.",
            remedy="Keep nothing else in that folder, and unpack what is packed.",
        )
    return found


def _resources(file: Path, export: _Export) -> Iterator[tuple[Node, str]]:
    """Every resource of a file with its full URL, or ""."""
    if file.suffix == ".ndjson":
        with file.open(encoding="utf-8-sig") as lines:
            for line in lines:
                if line.strip():
                    yield _resource(fhir_values.parse(line)), ""
        return
    tree = fhir_values.parse(file.read_text(encoding="utf-8-sig"))
    if file.name == MANIFEST and isinstance(tree, dict) and "transactionTime" in tree:
        _note_date(tree["transactionTime"], export.dates)
    elif isinstance(tree, dict) and tree.get("resourceType") == "Bundle":
        yield from _bundle(tree, export)
    else:
        yield _resource(tree), ""


def _bundle(bundle: Node, export: _Export) -> Iterator[tuple[Node, str]]:
    links, entries, total = bundle.get("link", []), bundle.get("entry", []), bundle.get("total", 0)
    if bundle.keys() - _BUNDLE or bundle.get("type") not in _BUNDLES:
        raise Malformed(f"a Bundle must be of type {', '.join(_BUNDLES)} and hold nothing unknown")
    if not isinstance(links, list) or not isinstance(entries, list) or not isinstance(total, int):
        raise Malformed("the Bundle's link, entry or total is not what it should be")
    if total > len(entries) or any(not isinstance(link, dict) or link.get("relation") == "next" for link in links):
        raise Malformed("the Bundle is one page of several")
    meta = bundle.get("meta", {})
    for text in (bundle.get("timestamp"), meta.get("lastUpdated") if isinstance(meta, dict) else ""):
        if text is not None:
            _note_date(text, export.dates)
    for entry in entries:
        if not isinstance(entry, dict) or entry.keys() - _ENTRY:
            raise Malformed("an entry of the Bundle holds something unknown")
        request = entry.get("request", {"method": "PUT"})
        if not isinstance(request, dict) or request.get("method") not in ("PUT", "POST"):
            raise Malformed("an entry of the Bundle does not bring a resource")
        url = entry.get("fullUrl", "")
        yield _resource(entry.get("resource")), url if isinstance(url, str) else ""


def _resource(node: Any) -> Node:
    """The node as a resource. A Bundle in a Bundle or line would hide what is in it.

    Raises:
        Malformed: it is none.
    """
    if not isinstance(node, dict) or not isinstance(node.get("resourceType"), str) or node["resourceType"] == "Bundle":
        raise Malformed("something in it is not a single FHIR resource")
    return node


def _note_date(text: Any, dates: list[date]) -> None:
    try:
        dates.append(fhir_values.moment(text if isinstance(text, str) else "", "").first)
    except NotUnderstood:
        raise Malformed("a timestamp in it is no FHIR date") from None


# ---------------------------------------------------------------------------------------------------------- whose it is


def _take(resource: Node, url: str, file: int, export: _Export, settings: Settings, key: bytes, today: date) -> None:
    """Keeps what is needed of a Consent or Patient, and nothing of any other resource."""
    kind = resource["resourceType"]
    if kind == "Patient":
        patient = _patient(resource, settings, key)
        references = {url, f"Patient/{resource['id']}" if isinstance(resource.get("id"), str) else ""} - {""}
        for reference in references:
            for place in ((file, reference), reference):
                same = export.patients.setdefault(place, patient) == patient
                export.patients[place] = patient if same else None
    elif kind == "Consent":
        said = fhir_consent.read(resource, settings, today)
        if said is not None:
            whose = _whose([resource.get("patient"), resource.get("subject")], settings, key)
            export.consents.append((file, said, whose))


def _patient(resource: Node, settings: Settings, key: bytes) -> _Patient:
    """What of a Patient matters here. Only its names count where anything in it is not understood."""
    given = resource.get("identifier", [])
    names, bad = _identifiers(given if isinstance(given, list) else [], settings, key)
    try:
        fhir_values.check(resource, _PATIENT, "Patient")
        if bad or not isinstance(given, list) or resource.get("active", True) is not True:
            raise NotUnderstood("Patient.identifier" if bad else "Patient.active")
        text = fhir_values.string(resource, "birthDate", "Patient")
        # Of a year or month the first day: a guardian's consent then ends early rather than late.
        return _Patient(names, fhir_values.moment(text, "Patient.birthDate").first if text else None)
    except NotUnderstood as error:
        return _Patient(names, None, error.where)


def _identifiers(given: list[Any], settings: Settings, key: bytes) -> tuple[frozenset[str], bool]:
    """Keyed names of the identifiers whose system is known here, and whether one of them all is not understood."""
    names, bad = set(), False
    for node in given:
        try:
            system, value = fhir_values.identifier(node, "identifier")
        except NotUnderstood:
            bad = True
            system, value = (node.get("system"), node.get("value")) if isinstance(node, dict) else (None, None)
        if not isinstance(system, str) or system not in settings.issuers:
            continue
        who = PatientId(value.strip() if isinstance(value, str) else "", settings.issuers[system])
        if is_identifier(who):
            names.add(patient_name(key, who))
        else:
            bad = True
    return frozenset(names), bad


def _whose(nodes: list[Any], settings: Settings, key: bytes) -> _Whose:
    nodes = [node for node in nodes if isinstance(node, dict)]
    names, bad = _identifiers([node["identifier"] for node in nodes if "identifier" in node], settings, key)
    return _Whose(names, tuple(node["reference"] for node in nodes if isinstance(node.get("reference"), str)), bad)


def _decisions(export: _Export, settings: Settings, notes: Counter[str]) -> dict[str, Decision]:
    by_name: dict[str, list[tuple[Said, date | None]]] = defaultdict(list)
    lost = 0
    for file, said, whose in export.consents:
        names, born, problem = whose.names, None, said.not_understood
        problem = problem or ("Consent.patient.identifier" if whose.bad else "")
        for reference in whose.references:
            found = export.patients.get((file, reference), export.patients.get(reference))
            if found is None:
                problem = problem or ("" if whose.names else "Consent.patient: the Patient is not in the export")
                continue
            if whose.names and not whose.names & found.names:
                problem = problem or "Consent.patient: identifier and Patient are not the same"
            names, born = names | found.names, found.born
            problem = problem or found.not_understood
        refuses = set(said.verdicts) != {"permit"} or problem
        if problem:
            notes[problem] += 1
            said = Said(said.version, said.moment, tuple("deny" for _ in said.verdicts), "not_understood")
        if not names:
            lost += bool(refuses)
            notes["Consent.patient: no identifier of a known system"] += not refuses
        for name in names:
            by_name[name].append((said, born))
    if lost:
        raise ConsentError(
            f"{lost} FHIR Consents that may be refusals do not say whose they are.",
            remedy="Export the Patients they refer to along with them, and name the systems of their identifiers in "
            "[consent] issuers.",
        )
    return {name: decide([said for said, _ in mine], [born for _, born in mine]) for name, mine in by_name.items()}


# -------------------------------------------------------------------------------------------------------- which decides


def decide(consents: list[Said], births: list[date | None]) -> Decision:
    """What a patient's consents say together: see the module's docstring.

    Of several birth dates the earliest counts: a guardian's consent then ends early rather than late.
    """
    basis = f"FHIR Consent ({', '.join(sorted({said.version for said in consents}))})"
    undated = next((said for said in consents if said.moment is None), None)
    if undated is not None:
        return Decision(False, undated.reason if undated.reason != "permit" else "no_date", basis)
    moments = [said.moment for said in consents if said.moment is not None]
    newest = fhir_values.newest(moments)
    last = [consents[index] for index in newest]
    same = all(fhir_values.same(moments[index], moments[newest[0]]) for index in newest)
    for number in range(len(last[0].verdicts)):
        verdicts = {said.verdicts[number] for said in last}
        if "deny" in verdicts or "permit" not in verdicts or (not same and "silent" in verdicts):
            refusing = (said for said in last if said.verdicts[number] != "permit" and said.reason != "permit")
            order = ("not_understood", "ended", "denied", "not_yet", "expired", "other_use")
            return Decision(False, min((said.reason for said in refusing), key=order.index), basis)
    given = min(said.moment.first for said in last if said.moment)
    end = min((said.until for said in last if said.until), default=None)
    born = min((day for day in births if day), default=None)
    return Decision(True, "permit", basis, given, end, any(said.by_guardian for said in last), born)
