"""The site.toml that `fedscan agent enrol` writes: every section, and defaults that let nothing through.

Until a person has filled in what is marked, no patient is read and every run is refused: `fedscan agent check` says
what is missing. `client/deploy/site.toml` is the same text for a site called "north".
"""

_TEXT = """\
# A hospital's site.toml. `fedscan agent ...` takes the folder that holds it. Paths are relative to that folder.
# FILL IN: what only the hospital knows; `fedscan agent check` says what is missing. More on each section: client/docs/.

name = "NAME"                   # as the coordinator invited it
patients_declared = 0           # FILL IN: how many patients will train; public, and the same for the ledger's life

# ---- where images come from: a folder; or "dicomweb", "dimse-get", "dimse-move", "dimse-store" (docs/sources.md)
[source]
kind = "folder"
folder = "/mnt/pacs-export"     # FILL IN
settle_seconds = 10             # a file is read once it has not changed for so long

# ---- who may be read at all: nobody whom this register does not permit (docs/consent.md)
[consent]
kind = "register"               # or "cleared-list", "opt-out", "fhir"
path = "/srv/consent/register.csv"  # FILL IN
max_age_days = 30               # an older register stops everything
# issuer = "HOSPITAL-A"         # who gave out the patient ids, where neither the register nor an image header says
contact = ""                    # whom a patient may ask: a name and a telephone number

# ---- what the images show
[intake]
labels = "labels.csv"           # FILL IN: study_uid, accession or sop_uid; label; split (train, val, test; or left out)
project = "fedscan"             # pseudonyms of two projects cannot be linked; it cannot be changed later

# ---- images that could have a name in their pixels wait for a person, or for a rule of yours (docs/quarantine.md)
[quarantine]
ocr = "off"                     # "sample" or "all": tesseract as a second alarm, never as proof

# ---- the audit log, also to the hospital's own collector of logs (docs/audit.md)
[audit]
syslog = ""                     # "logs.hospital.example:6514": RFC 5424 over TLS; never holds up an answer

# ---- where the site's key is (docs/keys.md)
[key]
source = "file"                 # or "environment", "keyring"

# ---- what a run may ask of this site (docs/policy.md)
[policy]
approval = "manual"             # a person here approves each run; or "auto-within-policy"
max_epsilon = 8.0               # for ever, all runs together: it never refills (docs/ledger.md)
max_delta = 1e-4                # for ever, likewise; a run takes at most 1e-5 of it
min_noise_multiplier = 0.3      # a run with less noise is refused
gate = "sum"                    # how runs add up; it cannot be changed once the first run was admitted
max_rounds = 500                # of one run
max_steps = 2000
evaluation = true               # one noisy histogram of scores per run, charged to the same budget
groups = []                     # also by "sex", "age": only where groups are large
two_people = []                 # "budget", "quarantine": what two named people must agree on
# purposes = ["pneumonia"]      # then a run must name one of them
# ethics_approval = "EK 12/2026"         # then a run must name it
# data_use_agreement = "DUA 7"           # and this
# agreement_until = 2027-12-31
# valid_until = 2027-12-31      # nothing is done after this day
# epsilon_per_year = 4.0        # a rate inside the budget
# [policy.launchers]            # named, only these people's signed orders count; enrol prints the keys
# anna = "ssh-ed25519 AAAA..."
"""


def text(name: str) -> str:
    """site.toml for a new site of this name (`config.NAME_PATTERN`: it needs no quoting)."""
    return _TEXT.replace('"NAME"', f'"{name}"')
