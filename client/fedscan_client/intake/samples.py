"""Headers of a few objects before and after de-identification, for the dry run of the intake: shown, never written."""

from datetime import date

from fedscan_client import consent, keys
from fedscan_client.intake import deid, objects, read
from fedscan_client.intake.deid_file import Row, preview
from fedscan_client.intake.records import Refused
from fedscan_client.site import Site


def headers(site: Site, count: int, *, today: date | None = None) -> list[list[Row]]:
    """Rows of the first `count` objects of accepted kinds, of patients who permit it themselves.

    Raises:
        ConsentError: no usable consent register.
        DataError: the source is not there.
    """
    assert site.consent is not None
    key = keys.load(site.folder, site.key)
    names = site.names(key)
    register = consent.load(site.consent, names, site_folder=site.folder, today=today or date.today())
    found: list[list[Row]] = []
    for item in objects.found(site, key, {}):
        if len(found) == count:
            break
        try:
            with item.open() as stream:
                patient = deid.identity(read.header(stream, item.size), site.issuer)
                decision = register.decide(deid.patient_name(names, patient))
                if decision.permit and not decision.by_guardian and register.covers(patient.issuer):
                    stream.seek(0)
                    found.append(preview(read.whole(stream, item.size), names, issuer=site.issuer))
        except (Refused, OSError):
            continue
    return found
