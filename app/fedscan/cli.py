"""The command line: thin commands over the packages; each imports its room only when it runs.

Exit codes: 0 done; 2 refused before anything started, nothing left behind; 1 failed after the start, the run folder is
whole and can be gone on with; 130 and 143 stopped by Ctrl-C and by SIGTERM.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedscan_core.errors import FedscanError

if TYPE_CHECKING:
    from fedscan_server.app import Progress

# Read by Flower and Ray when they are imported: nothing here calls home.
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}

_SIMULATE = """\
Trains one federation of pretend hospitals on this machine, through the same client and server code that is deployed.

  fedscan simulate configs/quickstart.toml
  fedscan simulate configs/cxr_pneumonia.toml --data my/images --out runs/cxr --set privacy.target_epsilon=3
  fedscan simulate --resume runs/cxr

The run folder holds run.toml (every key), rounds.jsonl, summary.json, model.safetensors, checkpoints/, log.txt and the
pretend sites with their ledgers. Ctrl-C ends the run after the message in progress; --resume goes on, and what was
spent stays spent."""

_CONFIG = """\
Explains, checks and prints RUN.toml, the one file that describes an experiment.

  fedscan config --explain              every key with its type, default and meaning
  fedscan config --explain privacy      those of one section
  fedscan config --sample > my.toml     a file to start from
  fedscan config my.toml                checks it and prints it with every key written out"""

_PHANTOM = """\
Draws synthetic patients. Nothing in them comes from a person.

  fedscan phantom images/                       a research table: metadata.csv and PNG images, for --data
  fedscan phantom hospital/ --dicom             one hospital: DICOM files with invented identities, labels, consent"""

_AGENT_LEDGER = """\
Shows what a site's runs have cost its patients in privacy: the lifetime budget, what is reserved of it and spent, by
run and by round, and what one more run would cost. It checks the whole ledger first, changes nothing, and may be used
while an agent is at work.

  fedscan agent ledger /srv/fedscan/site
  fedscan agent ledger /srv/fedscan/site --run my.toml      would this run still fit?
  fedscan agent ledger /srv/fedscan/site --json > today.json

budget: what site.toml allows for ever. reserved: held by admitted runs, whole, whether they end early or not. spent:
the part of it whose noise may have been drawn. Exit code 2 if the ledger was changed, is gone, or is an older copy."""


_AUDIT = """\
Attacks this code's own training with canary patients, through the real clip, sampler and noise of RUN.toml, and
compares what the final weights give away with the epsilon that is claimed. Synthetic patients only; a smoke test that
catches lies, not a proof.

  fedscan audit-privacy configs/quickstart.toml
  fedscan audit-privacy my.toml --patients 600 --set train.patients_per_step=64 --json
  fedscan audit-privacy --inversion --out runs/inversion

The last one draws a picture: images read out of one update, without and with privacy.

Exit code 1 if a check failed: then this code must not train on patients. At most 1 in 1000 honest ones fails."""


class Stopped(BaseException):
    """A signal came; `code` is the exit code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command and ends the process with its exit code."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    arguments = _parser().parse_args(argv)
    try:
        code = arguments.command(arguments)
    except FedscanError as error:
        print(f"fedscan: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("\nfedscan: stopped.", file=sys.stderr)
        code = 130
    except Stopped as stop:
        print("\nfedscan: stopped.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(stop.code)  # at once: Ray's threads would wait for actors that are gone
    except BrokenPipeError:  # `fedscan config --explain | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fedscan",
        formatter_class=plain,
        description="Federated training of medical-imaging models with patient-level differential privacy.\n"
        "Scans never leave the hospital; `fedscan COMMAND --help` says more.",
    )
    parser.add_argument("--version", action="version", version=f"fedscan {_version()}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    simulate = commands.add_parser(
        "simulate", help="train a federation of pretend hospitals", description=_SIMULATE, formatter_class=plain
    )
    simulate.add_argument("run", nargs="?", metavar="RUN.toml", type=Path, help="the experiment (fedscan config)")
    simulate.add_argument("--data", metavar="DIR", type=Path, help="folder of the images and their table")
    simulate.add_argument("--out", metavar="DIR", type=Path, help="the run folder; default runs/NAME-TIME")
    simulate.add_argument(
        "--set", metavar="key=value", action="append", default=[], help="override a key of RUN.toml; may be repeated"
    )
    simulate.add_argument("--resume", metavar="RUN_DIR", type=Path, help="go on with a run that was stopped")
    simulate.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")
    simulate.add_argument("-v", "--verbose", action="store_true", help="show what Flower and Ray log")
    simulate.set_defaults(command=_simulate)

    config = commands.add_parser(
        "config", help="explain, check or print RUN.toml", description=_CONFIG, formatter_class=plain
    )
    config.add_argument("run", nargs="?", metavar="RUN.toml", type=Path, help="check this file and print it in full")
    config.add_argument("--set", metavar="key=value", action="append", default=[], help="override a key first")
    config.add_argument("--explain", nargs="?", const="", metavar="SECTION", help="what every key means")
    config.add_argument("--sample", action="store_true", help="print a RUN.toml to start from")
    config.set_defaults(command=_config)

    audit = commands.add_parser(
        "audit-privacy", help="attack our own training with canaries", description=_AUDIT, formatter_class=plain
    )
    audit.add_argument("run", nargs="?", metavar="RUN.toml", type=Path, help="the experiment (fedscan config)")
    audit.add_argument("--canaries", type=int, default=2000, help="canary patients, half take part (%(default)s)")
    audit.add_argument("--patients", type=int, help="declared size of the site; default simulation.patients")
    audit.add_argument("--set", metavar="key=value", action="append", default=[], help="override a key of RUN.toml")
    audit.add_argument("--inversion", action="store_true", help="attack one update and draw what comes out of it")
    audit.add_argument("--out", metavar="DIR", type=Path, help="folder for audit.json or inversion.png")
    audit.add_argument("--json", action="store_true", help="print the report as JSON on standard output")
    audit.set_defaults(command=_audit)

    phantom = commands.add_parser(
        "phantom", help="draw synthetic patients", description=_PHANTOM, formatter_class=plain
    )
    phantom.add_argument("folder", metavar="DIR", type=Path, help="a new or empty folder")
    phantom.add_argument("--dicom", action="store_true", help="one hospital as DICOM instead of a table with PNG")
    phantom.add_argument("--patients", type=int, default=200, help="how many (default %(default)s)")
    phantom.add_argument("--sites", type=int, default=4, help="sites of the table (default %(default)s)")
    phantom.add_argument("--size", type=int, default=64, help="rows and columns of an image (default %(default)s)")
    phantom.add_argument("--seed", type=int, default=0, help="the same seed draws the same patients")
    phantom.set_defaults(command=_phantom)

    agent = commands.add_parser("agent", help="for hospital IT: look after a site", formatter_class=plain)
    of_agent = agent.add_subparsers(metavar="COMMAND", required=True)
    ledger = of_agent.add_parser(
        "ledger", help="budget, reserved, spent", description=_AGENT_LEDGER, formatter_class=plain
    )
    ledger.add_argument("site", metavar="SITE_DIR", type=Path, help="the site's folder, which holds site.toml")
    ledger.add_argument("--run", metavar="RUN.toml", type=Path, help="price this run instead of the last one again")
    ledger.add_argument("--json", action="store_true", help="print JSON on standard output")
    ledger.set_defaults(command=_agent_ledger)
    return parser


def _version() -> str:
    try:
        return version("fedscan")
    except PackageNotFoundError:
        return "(source tree)"


# ---------------------------------------------------------------------------------------------------------- commands


def _simulate(arguments: argparse.Namespace) -> int:
    from fedscan_core import config_file
    from fedscan_core.errors import ConfigError, FolderError, RunFailed

    if arguments.resume is not None:
        if arguments.run or arguments.data or arguments.out or arguments.set:
            raise ConfigError(
                "--resume goes on with a run as it was: it takes no RUN.toml, --data, --out or --set.",
                remedy="Start a new run to change something.",
            )
        if not (arguments.resume / "run.toml").is_file():
            raise FolderError(f"{arguments.resume} holds no run.", remedy="Give the folder of a run that was stopped.")
        run = config_file.load(arguments.resume / "run.toml")
    elif arguments.run is None:
        raise ConfigError("There is no RUN.toml given.", remedy="For example: fedscan simulate configs/quickstart.toml")
    else:
        run = config_file.load(arguments.run, arguments.set)  # before anything heavy is imported

    from fedscan import view

    progress, results = view.consoles(arguments.json)
    with _signals() as signals, view.View(run, progress) as show:

        def watch(step: "Progress") -> None:
            signals.graceful = step.phase != "prepare"
            show(step)

        if not arguments.verbose:
            warnings.simplefilter("ignore")
        with progress.status("loading PyTorch and Flower") if progress.is_terminal else contextlib.nullcontext():
            from fedscan import simulation

            _log_level(arguments.verbose)
        try:
            if arguments.resume is not None:
                folder = arguments.resume
                summary = simulation.resume(folder, watch=watch, stop=signals.stop)
            else:
                folder = arguments.out or simulation.default_folder(run)
                summary = simulation.simulate(run, data=arguments.data, out=folder, watch=watch, stop=signals.stop)
        except RunFailed as error:
            if signals.code is None:
                raise
            kept = folder.exists()  # before the first round nothing was worth keeping
            print(f"fedscan: {error}" if kept else "fedscan: stopped before the first round.", file=sys.stderr)
            return signals.code
    if arguments.json:
        print(json.dumps(summary, indent=2))
    else:
        view.show_summary(summary, str(folder), results)
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from fedscan_core import config, config_file
    from fedscan_core.errors import ConfigError

    if arguments.explain is not None:
        rows = list(config_file.explain())
        wanted = arguments.explain.strip("[]")
        rows = [row for row in rows if not wanted or row[0].strip("[]") == wanted or row[0].startswith(f"{wanted}.")]
        if not rows:
            sections = ", ".join(row[0].strip("[]") for row in config_file.explain() if not row[1])
            raise ConfigError(f"There is no section or key '{wanted}'.", remedy=f"The sections are {sections}.")
        for key, kind, default, meaning in rows:
            print(f"\n{key}  {meaning}" if not kind else f"  {key} = {default}\n      {kind}\n      {meaning}")
    elif arguments.sample:
        print(config_file.SAMPLE, end="")
    elif arguments.run is not None:
        print(config.to_toml(config_file.load(arguments.run, arguments.set)), end="")
    else:
        raise ConfigError("Nothing to do.", remedy="Give a RUN.toml, --explain or --sample.")
    return 0


def _audit(arguments: argparse.Namespace) -> int:
    from fedscan import audit_command

    return audit_command.main(arguments)


def _phantom(arguments: argparse.Namespace) -> int:
    from fedscan import phantom
    from fedscan_core.errors import ConfigError, FolderError

    folder: Path = arguments.folder
    if arguments.patients < 8 or not 1 <= arguments.sites <= arguments.patients or not 32 <= arguments.size <= 256:
        raise ConfigError(
            "Phantoms need at least 8 patients, no more sites than patients, and a size from 32 to 256.",
            remedy="Correct --patients, --sites or --size.",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderError(f"{folder} is not an empty folder.", remedy="Give a new one.")
    drawn = {"patients": arguments.patients, "seed": arguments.seed, "image_size": arguments.size}
    try:
        if arguments.dicom:
            phantom.draw_hospital(folder, name=folder.resolve().name, **drawn)
        else:
            phantom.phantom_table(folder, sites=arguments.sites, **drawn)
    except OSError as error:
        raise FolderError(f"{folder} cannot be filled: {error.strerror}.", remedy="Check its permissions.") from None
    print(f"{arguments.patients} synthetic patients are in {folder}")
    return 0


def _agent_ledger(arguments: argparse.Namespace) -> int:
    from fedscan_client import agent

    return agent.show_ledger(arguments.site, arguments.run, arguments.json)


# ------------------------------------------------------------------------------------------------------------- signals


@dataclass
class _Signals:
    """What a signal does: set `stop` while the run is `graceful` (somebody looks at it), else end at once."""

    stop: threading.Event
    graceful: bool = False
    code: int | None = None


@contextlib.contextmanager
def _signals() -> Iterator[_Signals]:
    """Catches Ctrl-C and SIGTERM; the second one always ends at once."""
    state = _Signals(threading.Event())

    def handle(number: int, frame: FrameType | None) -> None:
        if state.code is not None or not state.graceful:
            raise Stopped(128 + number)
        state.code = 128 + number
        print("\nfedscan: stopping after the message in progress; once more stops at once.", file=sys.stderr)
        state.stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log_level(verbose: bool) -> None:
    """Flower prints to the terminal by itself: only with -v. Its log goes to log.txt all the same."""
    flower = logging.getLogger("flwr")
    if not verbose:
        flower.handlers = [h for h in flower.handlers if not isinstance(h, logging.StreamHandler) or _is_file(h)]
    flower.propagate = False
    logging.getLogger("fedscan").setLevel(logging.INFO)
    logging.getLogger("fedscan").propagate = False


def _is_file(handler: Any) -> bool:
    return isinstance(handler, logging.FileHandler)


if __name__ == "__main__":
    main()
