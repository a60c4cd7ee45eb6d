"""The letter a patient may be handed: what `patients.show` found, in plain words. One HTML file, no scripts, no links.

Everything that comes from a record is escaped; nothing but this patient's is in it.
"""

import math
from collections.abc import Sequence
from datetime import date
from html import escape
from typing import Any

from fedscan_client.intake.records import PatientId

_MONTHS = "January February March April May June July August September October November December"
_NOT_USED = "Your images are not used. "
_WHY = {
    "not_listed": "The hospital's list of consents does not name you.",
    "denied": "You did not agree.",
    "ended": "Your consent was ended.",
    "objected": "You objected.",
    "withdrawn_here": "You withdrew your consent.",
    "not_yet": "Your consent begins on a later day.",
    "expired": "Your consent has come to the end of its time.",
    "other_use": "You agreed to other uses, not to this one.",
    "no_date": "The record of your consent has no date, so we cannot be sure that it still holds.",
    "not_understood": "The record of your consent says something that our program does not understand, so we take it "
    "as a no.",
    "guardian_birth": "A parent or guardian agreed for you, and we do not know your date of birth.",
    "guardian_ended": "A parent or guardian agreed for you. You have come of age since, and the decision is now yours.",
    "no_register": "At the moment we cannot read the hospital's list of consents. As long as that is so, nobody's "
    "images are used.",
}
_STYLE = """
@page { size: A4; margin: 20mm 18mm; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { max-width: 42rem; margin: 0 auto; padding: 1.5rem 1.1rem 3rem; color: #1a1a1a; background: #fff;
  font: 1.03rem/1.55 "Segoe UI", "Helvetica Neue", Helvetica, "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .8rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; padding-top: .9rem; border-top: 1px solid #c8c8c8; }
p { margin: .5rem 0; }
.who { color: #444; margin: 0 0 1.4rem; overflow-wrap: anywhere; }
.short { margin: 0; padding: .9rem 1.1rem; background: #eef3f7; border-left: 4px solid #2f5d7c; }
.short li { margin: .25rem 0; }
.short ul { margin: 0; padding-left: 1.1rem; }
table { width: 100%; border-collapse: collapse; margin: .8rem 0; font-size: .95rem; }
caption { text-align: left; color: #444; padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .6rem .4rem 0; border-bottom: 1px solid #d9d9d9;
  overflow-wrap: break-word; }
td:first-child { overflow-wrap: anywhere; }
th { font-weight: 600; border-bottom: 2px solid #8a8a8a; }
.number { text-align: right; padding-right: 0; padding-left: .6rem; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
footer { margin-top: 2rem; padding-top: .8rem; border-top: 1px solid #c8c8c8; color: #555; font-size: .85rem;
  overflow-wrap: anywhere; }
@media (max-width: 34rem) {
  h1 { font-size: 1.35rem; }
  thead { position: absolute; left: -999rem; }
  tr { display: block; padding: .5rem 0; border-bottom: 1px solid #8a8a8a; }
  td, td.number { display: flex; justify-content: space-between; gap: 1rem; text-align: right; padding: .15rem 0;
    border: 0; }
  td::before { content: attr(data-name); color: #444; text-align: left; flex: none; max-width: 50%; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  h2 { break-after: avoid; }
  tr, .short, .whole { break-inside: avoid; }
  .short { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


def write(told: dict[str, Any], patient: PatientId, contact: str) -> str:
    """The letter as an HTML document.

    Args:
        told: what `patients.show` returned.
        patient: as the hospital names them; the letter says whom it is for.
        contact: whom the patient may ask; "" where the site names nobody.
    """
    number = patient.id + (f" (issued by {patient.issuer})" if patient.issuer else "")
    title = "Your images in research"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{title}: what we hold, and what it was used for</h1>
<p class="who">Patient number {escape(number)}<br>{escape(told["site"])}, {_day(told["day"])}</p>
{_short(told)}
{_purpose()}
{_held(told)}
{_consent(told["consent"])}
{_runs(told)}
{_epsilon(told) if told["runs"] else ""}
{_undone(told)}
{_ask(told, contact)}
</main>
<footer>This letter was made by the program fedscan from the records of {escape(told["site"])}. In those records you
appear only under a code name, {escape(told["patient"])}, and not under your number.</footer>
</body>
</html>
"""


def guesses(epsilon: float, delta: float) -> float:
    """How often in 100 a guess whether a patient took part can be right at most, where a coin is right 50 times.

    (epsilon, delta)-DP bounds the accuracy of any test at even odds by (e^epsilon + delta) / (1 + e^epsilon) (Kairouz,
    Oh and Viswanath 2015, arXiv 1311.0776). Rounded up to whole ones, above 99 to tenths, and at most 100.
    """
    share = 1 / (1 + math.exp(-epsilon)) + delta / (1 + math.exp(min(epsilon, 700.0)))
    step = 1.0 if share <= 0.99 else 10.0
    return min(100.0, math.ceil(100 * share * step - 1e-9) / step)


def _short(told: dict[str, Any]) -> str:
    images, runs = told["images"], len(told["runs"])
    lines = [
        f"We hold {_count(images, 'image')} of you for research."
        if images
        else "We hold no image of you for research.",
        "Your images may be used at present." if told["consent"]["permit"] else "Your images are not used at present.",
        f"They may have been used in {_count(runs, 'training')} so far. Your images never left the hospital."
        if runs
        else "They have not been used in any training.",
    ]
    return f'<div class="short"><ul>{"".join(f"<li>{line}</li>" for line in lines)}</ul></div>'


def _purpose() -> str:
    return """<h2>What this is about</h2>
<p>Hospitals train computer programs together that help doctors to read medical images. The images stay in each
hospital. What leaves it are numbers computed from many patients' images at once, with random noise added to them. The
noise hides what any single patient adds. How well it hides you is said further down.</p>"""


def _held(told: dict[str, Any]) -> str:
    if not told["held"]:
        return "<h2>What we hold</h2>\n<p>We hold no images of you for research, and no key to any.</p>"
    rows = [
        (
            *(group[what][:32] or "-" for what in ("study", "modality", "label")),
            _USES.get(group["split"], "-"),
            str(group["images"]),
        )
        for group in told["held"]
    ]
    table = _table(("Examination", "Kind of image", "Finding noted", "Used for", "Images"), rows, numbers=(4,))
    return f"""<h2>What we hold</h2>
<p>Copies of these images, without your name, number or date of birth, locked with a key of your own. Examinations
appear under code names.</p>
{table}"""


_USES = {"train": "training", "val": "tuning", "test": "testing"}


def _consent(consent: dict[str, Any]) -> str:
    given, until = consent.get("given"), consent.get("until")
    if not consent["permit"]:
        text = _NOT_USED + _WHY.get(consent["reason"], "")
    elif consent["reason"] == "no_objection":
        text = f"You did not object. Your images may be used on this basis: {escape(consent['basis'])}"
    else:
        who = "A parent, guardian or other person agreed for you" if consent["by_guardian"] else "You agreed"
        text = f"{who}{f' on {_day(given)}' if given else ''}. "
        text += f"This holds up to and including {_day(until)}." if until else "No end was set."
        if consent["by_guardian"]:
            text += " It ends in any case when you come of age; from then on the decision is yours."
    basis = consent.get("basis", "")
    source = f"<p>Our record of it: {escape(basis)}.</p>" if basis and consent["reason"] != "no_objection" else ""
    return f"<h2>Your consent</h2>\n<p>{text}</p>\n{source}"


def _runs(told: dict[str, Any]) -> str:
    if not told["runs"]:
        return "<h2>What your images were used for</h2>\n<p>They have not been used in any training so far.</p>"
    rows = [
        (run["run_id"], run["model"], _day(run["since"]), *_strength(run["epsilon"], run["delta"]))
        for run in told["runs"]
    ]
    table = _table(("Training", "Model", "Since", "Epsilon", "Guessed at most"), rows, numbers=(3, 4))
    return f"""<div class="whole"><h2>What your images were used for</h2>
<p>In these trainings your images could be drawn. In each step chance decides whose images take part, and nobody keeps a
record of it, neither this hospital nor anybody else. So we can tell you that your images may have been used, and never
whether they were.</p>
{table}</div>"""


def _strength(epsilon: float | None, delta: float | None) -> tuple[str, str]:
    if epsilon is None or delta is None:
        return "none", "no protection"
    return f"{epsilon:.2f}", f"{guesses(epsilon, delta):g} in 100"


def _epsilon(told: dict[str, Any]) -> str:
    epsilon, delta = told["in_all"]["epsilon"], told["in_all"]["delta"]
    if epsilon is None:
        total = (
            "At least one of these trainings ran without this protection, so no number can be given for all of them."
        )
    else:
        right = guesses(epsilon, delta)
        total = (
            f"For all the trainings above together, epsilon is at most {epsilon:.2f}. Whoever guesses can then be "
            f"right at most {right:g} times in 100, whatever they know and however clever they are."
        )
        if right >= 95:
            total += " That is a weak promise: at this value the number alone would not hide you well."
    return f"""<div class="whole"><h2>What the number epsilon means for you</h2>
<p>Epsilon says how well the noise hides you. The smaller, the better; 0 would be perfect.</p>
<p>Imagine somebody who has the finished program, your images and the images of every other patient, and who wants to
find out only one thing: were yours used? By tossing a coin they would be right 50 times in 100. The noise
limits how much better anybody can do. The last column of the table says how often they can be right at most.</p>
<p>{total}</p></div>"""


def _undone(told: dict[str, Any]) -> str:
    days = [row["day"] for row in told["withdrawals"]]
    if days:
        since = "You have agreed again since." if told["consent"]["permit"] else "You take part in no training since."
        done = (
            f"You withdrew on {_day(days[-1])}. The key to your images was destroyed then, which made every copy of "
            f"them unreadable. {since}"
        )
    else:
        done = (
            "You may withdraw at any time, without giving a reason, and your treatment does not depend on it. The key "
            "to your images is then destroyed, which makes every copy of them unreadable. You take part in no further "
            "training."
        )
    return f"""<div class="whole"><h2>What can be undone, and what cannot</h2>
<p>{done}</p>
<p>What cannot be undone: programs that were trained earlier are not trained again without you. What your images may
have added to them stays in them.</p></div>"""


def _ask(told: dict[str, Any], contact: str) -> str:
    where = escape(contact).replace("\n", "<br>") if contact.strip() else f"Please ask at {escape(told['site'])}."
    return f"""<div class="whole"><h2>Whom to ask</h2>
<p>To withdraw, to ask anything about this letter, or if something in it is wrong:</p>
<p>{where}</p></div>"""


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, numbers: tuple[int, ...]) -> str:
    def cells(tag: str, row: tuple[str, ...]) -> str:
        parts = []
        for index, text in enumerate(row):
            style = ' class="number"' if index in numbers else ""
            name = f' data-name="{head[index]}"' if tag == "td" else ' scope="col"'
            parts.append(f"<{tag}{style}{name}>{escape(text)}</{tag}>")
        return f"<tr>{''.join(parts)}</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    return f"<table>\n<thead>{cells('th', head)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def _day(text: str) -> str:
    day = date.fromisoformat(text)
    return f"{day.day} {_MONTHS.split()[day.month - 1]} {day.year}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
