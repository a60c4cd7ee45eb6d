"""`fedscan audit-privacy`: what a person types, sees while it runs, and reads at the end."""

import argparse
import json
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedscan_core import config_file, files
from fedscan_core.config import RunConfig
from fedscan_core.errors import ConfigError, FolderError

if TYPE_CHECKING:
    from fedscan.audit import Report


def main(arguments: argparse.Namespace) -> int:
    """Runs the command; 1 if the audit failed."""
    if arguments.run is None and not arguments.inversion:
        raise ConfigError(
            "There is no RUN.toml given.", remedy="For example: fedscan audit-privacy configs/quickstart.toml"
        )
    if arguments.run is None and arguments.set:
        raise ConfigError("--set changes a RUN.toml, and there is none.", remedy="Give one.")
    run = config_file.load(arguments.run, arguments.set) if arguments.run else RunConfig()
    folder = arguments.out
    if folder is None and arguments.inversion:
        folder = Path("runs") / f"{run.name}-inversion-{datetime.now():%Y%m%d-%H%M%S}"
    if folder is not None:
        _writable(folder)
    from fedscan import view

    progress, results = view.consoles(arguments.json)
    if arguments.inversion:
        return _inversion(run, arguments, folder, progress, results)
    return _audit(run, arguments, folder, progress, results)


def _audit(
    run: RunConfig, arguments: argparse.Namespace, folder: Path | None, progress: Console, results: Console
) -> int:
    with _status("loading PyTorch", progress):
        from fedscan import audit
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=progress
    )
    task = bar.add_task("timing a step", total=None)
    told = 0

    def watch(done: int, total: int) -> None:
        nonlocal told
        bar.update(task, description="training on canaries: step", completed=done, total=total)
        if not progress.is_terminal and done * 4 // total > told:
            told = done * 4 // total
            progress.print(f"{done} of {total} steps", soft_wrap=True)

    if progress.is_terminal:
        with bar:
            report = audit.audit(run, canaries=arguments.canaries, patients_declared=arguments.patients, watch=watch)
    else:
        report = audit.audit(run, canaries=arguments.canaries, patients_declared=arguments.patients, watch=watch)
    text = json.dumps(report.as_json(), indent=2)
    if folder is not None:
        files.write_atomic(folder / "audit.json", (text + "\n").encode())
    if arguments.json:
        print(text)
    else:
        _show(report, run, results)
    return 0 if report.passed else 1


def _show(report: "Report", run: RunConfig, console: Console) -> None:
    from fedscan.audit import NOTE
    from fedscan_client.dp import plans

    plan, steps = report.plan, report.steps
    table = Table(
        title=f"{run.name}: {report.canaries} canary patients, {steps} steps, half of them in", title_justify="left"
    )
    for name in ("check", "found", "claimed", "p", ""):
        table.add_column(name, overflow="fold")
    for check in report.checks:
        verdict = "pass" if check.passed else "FAIL"
        table.add_row(check.name, check.found, check.expected, f"{check.p_value:.2g}", verdict)
    console.print(table)
    part = ""
    if steps < plan.steps or report.claimed_epsilon < plan.epsilon:  # short of time, or private evaluation costs too
        part = f", and {report.claimed_epsilon:.2f} for the {steps} training steps that were run"
    lines = [
        f"claimed: epsilon {plan.epsilon:.2f} at delta {plan.delta:.0e} over {plan.steps} steps{part}; "
        f"noise {plan.noise_multiplier:.3g}, rate {plan.sampling_rate:.3g}, clip {run.privacy.clip}, "
        f"engine {run.privacy.engine}, {plan.patients_declared} declared",
        *(f"one patient at a time: {reason}" for reason in plans.reasons()),
        "p: how often an honest pipeline looks as bad; it fails an audit once in 1000, or less",
        *_power(report),
        f"{'PASS' if report.passed else 'FAIL'} in {report.seconds:.0f} s. {NOTE}",
    ]
    for line in lines:
        console.print(Text(line), soft_wrap=not console.is_terminal)


def _power(report: "Report") -> list[str]:
    """What this audit could have seen at all."""
    lines = [
        f"9 of 10 audits would notice a patient with {report.seen_influence:.2g} times the claimed influence, or "
        f"noise at {report.seen_noise:.0%} of the claimed"
    ]
    if report.seen_influence > 3:
        lines.append("so much noise on so few steps hides lesser faults of the clip: more --canaries see more")
    if report.one_run_reach < report.claimed_epsilon:
        lines.append(
            f"the one-run bound cannot exceed {report.one_run_reach:.1f} with so many canaries at this delta, "
            "so it could not have refuted the claim; the others could"
        )
    return lines


def _inversion(run: RunConfig, arguments: argparse.Namespace, folder: Path, progress: Console, results: Console) -> int:
    with _status("attacking one update", progress):
        from fedscan import inversion

        attack = inversion.invert(run, patients_declared=arguments.patients)
        path = folder / "inversion.png"
        files.write_atomic(path, inversion.png(attack))
    numbers = attack.as_json()
    if arguments.json:
        print(json.dumps({**numbers, "picture": str(path)}, indent=2))
        return 0
    lines = (
        f"one update of {numbers['patients']} phantom patients with {numbers['images']} images, noise "
        f"{numbers['noise_multiplier']:.3g} (epsilon {numbers['epsilon']:.2f} over the run)",
        f"recovered without DP: {numbers['recovered_without']} "
        f"(median PSNR {min(60, numbers['psnr_without_median']):.0f} dB or more)",
        f"recovered with DP: {numbers['recovered_private']} (median PSNR {numbers['psnr_private_median']:.0f} dB; "
        f"plain grey {numbers['psnr_grey_median']:.0f} dB)",
        f"The picture is {path}. Synthetic patients only; a demonstration, not a proof.",
    )
    for line in lines:
        results.print(Text(line), soft_wrap=True)
    return 0


def _status(words: str, console: Console) -> AbstractContextManager[object]:
    if not console.is_terminal:
        console.print(words, soft_wrap=True)
    return console.status(words)


def _writable(folder: Path) -> None:
    """Before anything takes time."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"{folder} cannot be used: {error.strerror}.", remedy="Give another --out.") from None
