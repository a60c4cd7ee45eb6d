"""The command line: thin commands over the packages; each imports its room only when it runs.

Exit codes: 0 done; 2 refused before anything started, nothing left behind; 1 failed after the start, the run folder is
whole and can be gone on with; 130 and 143 stopped by Ctrl-C and by SIGTERM.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fedscan import cli_agent, cli_launch, cli_phantom, cli_server, stopping
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
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:2] == ["phantom", "from-table"]:  # `phantom` takes a folder, so it can have no commands of its own
        words[:2] = ["phantom from-table"]
    arguments = _parser().parse_args(words)
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
    except PermissionError as error:
        print(
            f"fedscan: {error.filename}: {error.strerror}. Check who owns it, and run this as that user.",
            file=sys.stderr,
        )
        code = 2
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

    cli_phantom.add(commands)
    cli_agent.add(commands)
    cli_launch.add(commands)
    cli_server.add(commands)
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

    with stopping.handled_by(handle):
        yield state


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
