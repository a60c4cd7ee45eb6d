"""`fedscan agent check`: is everything in place? A list of findings, each with what to do; nothing is changed by it.

    finding.py     what one line of the list is
    network.py     coordinator reached, certificate, clock, key registered, versions
    machine.py     folder, disk, memory, GPU
    records.py     site's key, encrypted cache, ledger, audit log
    patients.py    consent register, cohort counts
    policies.py    whether the policy says what a person can have meant
    rehearsal.py   one private training step on the site's own cohort, in memory, of which nothing is kept
    checklist.py   all of them, in order

Guarantee: no file of the site is written, nothing is charged to the ledger, and nothing leaves but what `fedscan agent
start` sends anyway without a run (the site's name and signature). Findings marked `local` hold what depends on
patients, counts and kinds of errors, never an identifier: they are for people of this hospital.
"""
