"""SIGKILL at random moments, everywhere: the run ends right, and no site is charged less than it released.

Five rounds in CI; with `-m slow` more than fifty, with a kill every few seconds, and the table of what was killed.
"""

import json
import random
import shutil
import sqlite3
import threading
import time
from collections import Counter

import pytest
from lab import Lab, wait_for
from processes import kill

SITES = ("ash", "birch", "cedar")
AT_SITES = ("agent", "supernode", "executor", "task")
AT_THE_CENTRE = ("superlink", "superexec", "serverapp", "edge")


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("chaos"))
    try:
        lab.coordinate("--name", "Chaos")
        lab.log_in()
        first = lab.draw(SITES[0])
        for number, name in enumerate(SITES):
            hospital = first if number == 0 else lab.draw(name, seed=number)
            lab.enrol(name)
            lab.settle(name, hospital)
            lab.start_agent(name)
        lab.await_online(*SITES)
        yield lab
    finally:
        lab.close()
        shutil.rmtree(lab.root / "pacs", ignore_errors=True)


class Chaos:
    """Kills something in every round, and starts again, as systemd would, what has nobody above it to do so.

    The next kill comes when the run has got over the last one: a round later, or after `patience` seconds.
    """

    def __init__(self, lab, run_id, kinds, seed, patience=100.0):
        self.lab, self.run_id, self.kinds, self.patience = lab, run_id, kinds, patience
        self.rng, self.killed, self.over = random.Random(seed), Counter[str](), threading.Event()
        self._thread = threading.Thread(target=self._go)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc):
        self.over.set()
        self._thread.join()

    def _go(self):
        done, since, number = 0, time.monotonic(), 0
        while not self.over.wait(0.5):
            rounds = len(self.lab.rounds(self.run_id))
            if rounds <= done and time.monotonic() < since + self.patience:
                continue
            self.over.wait(self.rng.uniform(0.0, 3.0))  # somewhere in the round
            kind = self.kinds[number % len(self.kinds)]
            done, since, number = rounds, time.monotonic(), number + 1
            self.killed[kind] += self._kill(kind)

    def _kill(self, kind):
        if kind not in AT_SITES:
            return bool(kill(kind, self.lab.running["coordinator"].pid))
        name = self.rng.choice(SITES)
        process = self.lab.running[name]
        if kind != "agent":
            return bool(kill(kind, process.pid))
        process.kill()
        process.wait()
        self.lab.start_agent(name)
        return True


def books_are_right(lab, run_id):
    """Of each site: all that its audit log shows as released was reserved in its ledger before; the log is whole."""
    told = {}
    for name in SITES:
        site = lab.site(name)
        records = [json.loads(line) for path in sorted((site / "audit").glob("log-*.jsonl")) for line in path.open()]
        released = {r["round"] for r in records if r.get("event") == "release" and r.get("run_id") == run_id}
        with sqlite3.connect(f"file:{site / 'ledger.sqlite'}?mode=ro", uri=True) as db:
            rows = [json.loads(body) for (body,) in db.execute("SELECT body FROM rows ORDER BY seq")]
        mine = [row for row in rows if row.get("run_id") == run_id]
        reserved = [row["round"] for row in mine if row["state"] == "reserved"]
        assert len(reserved) == len(set(reserved)), f"{name}: a round was charged, and so released, twice"
        assert released <= {row["round"] for row in mine if row["state"] == "settled"} <= set(reserved)
        assert sum(row["state"] == "admitted" for row in mine) == 1
        lab.fedscan("agent", "audit", "verify", site)
        lab.fedscan("agent", "ledger", site)
        told[name] = {"reserved": len(reserved), "released": len(released)}
    return told


def nothing_of_a_site_in(text):
    """No traceback of a site's code, none of its paths and errors."""
    return not any(word in text for word in ("fedscan_client", "site.log", "cohort", "cache/"))


def go(lab, name, rounds, kinds, seconds, seed):
    run = lab.write_run(name, rounds=rounds, round_minutes=1.5, more="\n[aggregation]\nmin_sites = 2\n")
    run_id = lab.launch(run)
    wait_for(lambda: lab.rounds(run_id), 120, "the first round")
    started = time.monotonic()
    with Chaos(lab, run_id, kinds, seed) as chaos:
        end = lab.await_end(run_id, seconds)
    lines = lab.rounds(run_id)
    books = books_are_right(lab, run_id)
    table = {
        "end": end["state"],
        "seconds": round(time.monotonic() - started),
        "rounds": len(lines),
        "void": sum(line["void"] for line in lines),
        "updates": sum(line["sites"] for line in lines),
        "killed": dict(chaos.killed),
        "books": books,
    }
    print(json.dumps(table))
    assert end["state"] == "finished", (end, lab.logs()[-4000:])
    assert [line["round"] for line in lines] == list(range(1, rounds + 1))
    assert nothing_of_a_site_in(lab.logs()) and nothing_of_a_site_in(json.dumps(lines))
    return table


def test_a_few_rounds_of_chaos(lab):
    table = go(lab, "few", 5, ("task", "serverapp", "superlink", "executor"), 600, seed=1)
    assert sum(table["killed"].values()) >= 3 and table["updates"] >= 10


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_more_than_fifty_rounds_of_chaos(lab):
    table = go(lab, "many", 52, AT_SITES + AT_THE_CENTRE, 6600, seed=2)
    assert table["rounds"] >= 50 and len(table["killed"]) >= 6
