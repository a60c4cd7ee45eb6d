"""A whole federation on this machine, by the commands that people type: a coordinator, sites, a researcher.

Every process is one that a user would start; nothing here reaches into our own modules, but for what tests must plant
or read back.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
QUICK = """\
name = "{name}"

[task]
labels = ["no finding", "opacity"]
image_size = 32

[privacy]
noise_multiplier = 1.0

[train]
rounds = {rounds}

[evaluation]
private = {private}

[study]
purpose = "trial"
question = "Does the federation work?"

[federation]
round_minutes = {round_minutes}
approval_hours = 0.5
"""


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true value of `condition`, asked four times a second."""
    end = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        assert time.monotonic() < end, f"not within {seconds:g} s: {what}"
        time.sleep(0.25)


@dataclass
class Lab:
    """One federation below `root`. `hosts` maps a role (coordinator, a site) to the words that run a command at it."""

    root: Path
    address: str = "127.0.0.1"
    hosts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    port: int = field(default_factory=free_port)  # in the address that sites are told
    bind_port: int = 0  # what the edge listens on, where a tap stands before it
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        """The coordinator's folder."""
        return self.root / "coordinator"

    def site(self, name: str) -> Path:
        """A site's folder."""
        return self.root / name

    # --------------------------------------------------------------------------------------------------------- commands

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What every command runs in: the tests' Python path, no proxy, a researcher's settings of our own."""
        kept = {
            name: os.environ[name] for name in ("PATH", "HOME", "LANG", "PYTHONPATH", "TMPDIR") if name in os.environ
        }
        return {**kept, **QUIET, "XDG_CONFIG_HOME": str(self.root / "settings"), **(extra or {})}

    def argv(self, words: Sequence[str | Path], role: str = "") -> list[str]:
        """The whole command line."""
        return [*self.hosts.get(role, ()), sys.executable, "-m", "fedscan.cli", *map(str, words)]

    def fedscan(
        self,
        *words: str | Path,
        code: int | None = 0,
        role: str = "",
        env: Mapping[str, str] | None = None,
        typed: str = "",
    ) -> str:
        """Runs `fedscan ...` to its end and returns both outputs; fails unless it ends with `code` (None: any)."""
        done = subprocess.run(
            self.argv(words, role),
            env=self.environment(env),
            cwd=self.root,
            input=typed,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        assert code is None or done.returncode == code, f"fedscan {' '.join(map(str, words))}\n{done.stdout}"
        return done.stdout

    def json(self, *words: str | Path, code: int | None = 0, role: str = "") -> Any:
        """As `fedscan`, for a command that prints JSON on standard output."""
        done = subprocess.run(
            self.argv(words, role), env=self.environment(), cwd=self.root, capture_output=True, text=True, timeout=280
        )
        assert code is None or done.returncode == code, (
            f"fedscan {' '.join(map(str, words))}\n{done.stdout}{done.stderr}"
        )
        return json.loads(done.stdout)

    def start(self, name: str, *words: str | Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Starts `fedscan ...` in the background, with ROOT/NAME.out as its terminal."""
        with (self.root / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                self.argv(words, name),
                env=self.environment(env),
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self.running[name] = process
        return process

    def printed(self, name: str) -> str:
        """What a background command wrote to its terminal."""
        path = self.root / f"{name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def end(self, name: str, how: signal.Signals = signal.SIGTERM, seconds: float = 40.0) -> int:
        """Ends a background command and returns its exit code."""
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"{name} did not end within {seconds:g} s\n{self.printed(name)[-2000:]}") from None

    def close(self) -> None:
        """Ends everything that runs."""
        for name in reversed(list(self.running)):
            with contextlib.suppress(AssertionError):
                self.end(name, seconds=30.0)

    # --------------------------------------------------------------------------------------------------- what people do

    def coordinate(self, *more: str | Path) -> None:
        """Makes and starts the coordinator."""
        self.root.mkdir(parents=True, exist_ok=True)
        where = f"{self.address}:{self.port}"
        bind = f"{self.address}:{self.bind_port or self.port}"
        self.fedscan(
            "server", "init", "--state", self.state, "--address", where, "--bind", bind, *more, role="coordinator"
        )
        self.start_coordinator()

    def log_in(self) -> None:
        """Makes a researcher, Ada, who logs in."""
        self.fedscan("server", "person", "add", "ada", "--state", self.state, "--out", self.root / "ada.toml")
        self.fedscan("login", self.root / "ada.toml", role="coordinator")

    def start_coordinator(self, env: Mapping[str, str] | None = None) -> None:
        """Starts the coordinator and waits until it answers."""
        self.start("coordinator", "server", "start", "--state", self.state, env=env)
        wait_for(self._up, 90, "the coordinator answers")

    def _up(self) -> bool:
        done = subprocess.run(
            self.argv(["server", "status", "--state", self.state], "coordinator"),
            env=self.environment(),
            capture_output=True,
        )
        return done.returncode == 0

    def draw(self, name: str, patients: int = 40, seed: int = 1) -> Path:
        """What the site's PACS would hold: dicom/, labels.csv, consent.csv."""
        hospital = self.root / "pacs" / name
        self.fedscan("phantom", hospital, "--dicom", "--patients", str(patients), "--size", "32", "--seed", str(seed))
        return hospital

    def enrol(self, name: str, env: Mapping[str, str] | None = None) -> str:
        """Invites and enrols a site; its folder may be there already. Returns what was printed."""
        self.fedscan("server", "invite", name, "--state", self.state, "--out", self.root / f"{name}.invite.toml")
        return self.fedscan("agent", "enrol", self.root / f"{name}.invite.toml", self.site(name), role=name, env=env)

    def settle(self, name: str, hospital: Path, declared: int = 28, **policy: Any) -> None:
        """Fills in site.toml as a person would, and takes the images in."""
        path = self.site(name) / "site.toml"
        tree = tomllib.loads(path.read_text())
        tree["patients_declared"] = declared
        tree["source"] = {"kind": "folder", "folder": str(hospital / "dicom"), "settle_seconds": 0}
        tree["consent"] |= {"path": str(hospital / "consent.csv"), "max_age_days": 36500}
        tree["intake"]["labels"] = str(hospital / "labels.csv")
        tree["policy"] |= {"max_epsilon": 1000.0, "max_delta": 1e-2, "approval": "auto-within-policy", **policy}
        path.write_text(tomli_w.dumps(tree))
        self.fedscan("agent", "ingest", self.site(name), role=name)

    def start_agent(self, name: str, env: Mapping[str, str] | None = None) -> None:
        """Starts a site's agent in the background."""
        self.start(name, "agent", "start", self.site(name), env=env)

    def await_online(self, *names: str, seconds: float = 120.0) -> None:
        """Waits until the coordinator sees these sites."""

        def online() -> bool:
            told = self.json("server", "sites", "--state", self.state, "--json", role="coordinator")
            for name in names:
                assert name not in self.running or self.running[name].poll() is None, self.printed(name)
            there = {row["name"] for row in told if row["state"] == "online"}
            return set(names) <= there

        wait_for(online, seconds, f"{', '.join(names)} online")

    # ------------------------------------------------------------------------------------------------------------- runs

    def write_run(
        self, name: str = "trial", rounds: int = 2, private: bool = True, round_minutes: float = 5.0, more: str = ""
    ) -> Path:
        """A small RUN.toml."""
        path = self.root / f"{name}.toml"
        text = QUICK.format(name=name, rounds=rounds, private=str(private).lower(), round_minutes=round_minutes)
        path.write_text(text + more)
        return path

    def launch(self, run: Path, *more: str) -> str:
        """Launches without a question and returns the run's id."""
        told = self.fedscan("launch", run, "--yes", *more, role="coordinator")
        name = tomllib.loads(run.read_text())["name"]
        found = re.search(rf"\b{re.escape(name)}-[0-9a-f]{{12}}\b", told)
        assert found, told
        return found[0]

    def state_of(self, run_id: str) -> dict[str, Any]:
        """RUN/state.json at the coordinator."""
        with contextlib.suppress(OSError, ValueError):
            state: dict[str, Any] = json.loads((self.state / "runs" / run_id / "state.json").read_text())
            return state
        return {"state": ""}

    def await_end(self, run_id: str, seconds: float = 240.0) -> dict[str, Any]:
        """Waits until a run has ended and returns its state."""
        final = ("finished", "failed", "stopped")
        wait_for(lambda: self.state_of(run_id)["state"] in final, seconds, f"{run_id} ends: {self.rounds(run_id)[-3:]}")
        return self.state_of(run_id)

    def rounds(self, run_id: str) -> list[dict[str, Any]]:
        """RUN/rounds.jsonl at the coordinator."""
        path = self.state / "runs" / run_id / "rounds.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def logs(self) -> str:
        """Everything the coordinator's processes and runs wrote."""
        found = [*self.state.glob("logs/*"), *self.state.glob("runs/*/log.txt")]
        return "\n".join(path.read_text(errors="replace") for path in found if path.is_file())
