"""One private training step on the site's own cohort: would a round work here?

Through the code of a round: decode, per-patient gradients, clipping, noise, the last look at what may leave. What comes
out of it is dropped in memory. Nothing is sent, charged to the ledger, or written; whoever is not permitted today is
not read, nor is anybody on a guardian's permit alone. A few patients are enough.
"""

import time
from collections import Counter
from collections.abc import Iterator
from datetime import date

from fedscan_client.check import patients
from fedscan_client.check.finding import Finding, fail, ok, skip, warn
from fedscan_client.cohort import Image
from fedscan_client.consent import Register
from fedscan_client.site import Site
from fedscan_core import accounting, config
from fedscan_core.config import RunConfig

PATIENTS, IMAGES = 16, 4  # at most so many, and of each


def run_for(labels: list[str], noise: float) -> RunConfig:
    """A run of one step on small images, whose labels are the site's own."""
    names = [*labels, *(word for word in ("one", "other") if word not in labels)][: max(2, len(labels))]
    return RunConfig.model_validate(
        {
            "name": "rehearsal",
            "task": {"labels": names, "image_size": 64},
            "privacy": {"noise_multiplier": max(1.0, noise)},
            "train": {"rounds": 1, "local_steps": 1, "patients_per_step": "all"},
            "evaluation": {"private": False},
        }
    )


def step(here: Site, register: Register | None, images: list[Image]) -> Iterator[Finding]:
    """Takes the step and tells how long it took; loads PyTorch."""
    from fedscan_client import cohort, train
    from fedscan_client.gate import egress
    from fedscan_models import registry

    topic, started = "rehearsal", time.monotonic()
    chosen = _chosen(register, images)
    if not chosen:
        yield skip(topic, "nobody may train today, so there is nothing to rehearse with")
        return
    run = run_for(sorted({image.label for image in images}), here.policy.min_noise_multiplier)
    few = cohort.decoded(chosen, run)
    if not len(few):
        yield fail(
            topic, f"None of {len(chosen)} images can be decoded: {_kinds(few.left_out)}.", _see(here), local=True
        )
        return
    network = registry.for_run(run)
    plan = accounting.plan_for(run, max(here.patients_declared, PATIENTS))
    delta = train.train_round(network.module, few, run, plan, round_=1, site=here.name)
    egress.check(delta, egress.declared(config.for_sites(run), "update"))
    took = time.monotonic() - started
    yield ok(topic, f"one private step in {took:.1f} s; nothing was sent, charged or kept", local=True)
    if few.left_out:
        yield warn(
            topic,
            f"{len(few.left_out)} of {len(chosen)} images cannot be decoded: {_kinds(few.left_out)}.",
            _see(here),
            local=True,
        )


def _chosen(register: Register | None, images: list[Image]) -> list[Image]:
    """A few images of a few patients who may train today; of those dealt to training where there are any."""
    may = [image for image in images if patients.may_train(register, image, date.today())]
    may = [image for image in may if image.split == "train"] or may
    names = list(dict.fromkeys(image.patient for image in may))[:PATIENTS]
    taken: Counter[str] = Counter()
    chosen = []
    for image in may:
        if image.patient in names and taken[image.patient] < IMAGES:
            taken[image.patient] += 1
            chosen.append(image)
    return chosen


def _kinds(left_out: tuple[str, ...]) -> str:
    """Kinds of errors with how often: their texts name files."""
    return ", ".join(f"{kind} {count}" for kind, count in Counter(it.partition(":")[0] for it in left_out).items())


def _see(here: Site) -> str:
    return f"A round leaves such images out. See them: fedscan agent ingest {here.folder} --dry-run"
