"""A person's decision on what waits in quarantine, and a second person's where the policy asks for two."""

import base64
from collections.abc import Sequence

from fedscan_client import two_people
from fedscan_client.intake import blackout, quarantine
from fedscan_client.intake.quarantine import Item, Verdict
from fedscan_client.intake.quarantine_file import seal, unseal
from fedscan_client.intake.records import REASONS, Rectangle, what_to_do
from fedscan_client.site import Site
from fedscan_core.errors import DataError

_BOUND = "first person's why"


def decide(
    here: Site, key: bytes, item: Item, verdict: Verdict, *, by: str, why: str, rectangles: Sequence[Rectangle] = ()
) -> Item | None:
    """Takes a decision on all instances of an item, or its first half.

    Where the policy says `two_people = ["quarantine"]`, letting images in needs two people who decide the same on the
    same instances with the same content and the same rectangles. Keeping them out needs one.

    Args:
        here: the site.
        key: the site's wrapping key.
        item: as it was looked at.
        verdict: released, blackout or rejected.
        by: who decides.
        why: what was seen; kept sealed.
        rectangles: for a blackout.

    Returns:
        The item as it is then; None where the decision now waits for a second person.

    Raises:
        DataError: as `quarantine.decide`.
        ConfigError: no name.
        FolderError: a file cannot be used.
    """
    if verdict == "rejected" or "quarantine" not in here.policy.two_people:
        return quarantine.decide(here.folder, key, item.id, verdict, by=by, why=why, rectangles=rectangles)
    name = two_people.person(by)
    if not item.releasable:
        said = f"Item {item.id} cannot be let in by anybody: {REASONS[item.reason]}."
        raise DataError(said, remedy=what_to_do(item.reason))
    if not why.strip() or bool(rectangles) != (verdict == "blackout"):
        raise DataError("A decision needs a reason, and a blackout rectangles.", remedy="Give --why, or --rect.")
    blackout.check(rectangles, item.rows, item.columns)
    contents = quarantine.states(here.folder, item.series)
    instances = sorted(it.instance for it in quarantine.held(here.folder, key, item.id))
    subject = {
        "item": item.id,
        "verdict": verdict,
        "rectangles": [[it.top, it.left, it.bottom, it.right] for it in rectangles],
        "instances": [[it, contents[it].digest] for it in instances],
    }
    sealed = base64.b64encode(seal(key, why.strip(), _BOUND)).decode()
    first = two_people.agree(here.folder, "quarantine", subject, name, sealed)
    if first is None:
        return None
    both = f"{unseal(key, base64.b64decode(first.why), _BOUND)}; {why.strip()}"
    return quarantine.decide(
        here.folder, key, item.id, verdict, by=f"{first.by} and {name}", why=both, rectangles=rectangles
    )
