"""What a person sees while a run goes on: a live view on a terminal, plain lines elsewhere, and the final tables.

The same lines go to the run folder's log.txt. A run without privacy says so on every line.
"""

import logging
import math
import sys
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from fedscan_core.config import RunConfig

if TYPE_CHECKING:
    from fedscan.people import Run
    from fedscan_server.tracking import Progress as Step

NO_PRIVACY = "NO PRIVACY"
_log = logging.getLogger("fedscan")
_LINE_SECONDS = 2.0  # plain lines come no faster, except those that say something new


class _Aloud(logging.Handler):
    """Shows what the engine says of a network: that it is slow with it, and why."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """One line above the live view."""
        self._console.print(Text(f"engine: {record.getMessage()}"), soft_wrap=not self._console.is_terminal)


class View:
    """A context manager that is told every step of a run.

    Args:
        run: the experiment; None where only its progress is known.
        console: where it is shown; the live form where that is a terminal.
    """

    def __init__(self, run: RunConfig | None, console: Console) -> None:
        self.private = run is None or run.privacy.enabled
        self._head = "" if self.private else f"{NO_PRIVACY}: "
        self.target = run.privacy.target_epsilon if run else None
        self._console = console
        self._line_at = 0.0
        self._rounds_from: tuple[int, float] | None = None  # rounds done when the first was seen, and when
        self._metrics: Mapping[str, Any] = {}
        self._metrics_round = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[eta]}"),
            console=console,
        )
        self._task: TaskID = self._bar.add_task("starting", total=None, eta="")
        self._live = Live(console=console, refresh_per_second=8, transient=True) if console.is_terminal else None
        self._aloud = _Aloud(console)

    def __enter__(self) -> Self:
        """Starts the live view where there is one."""
        logging.getLogger("fedscan.engine").addHandler(self._aloud)
        if self._live:
            self._live.update(self._bar)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends it and gives the terminal back."""
        logging.getLogger("fedscan.engine").removeHandler(self._aloud)
        if self._live:
            self._live.stop()

    def __call__(self, step: "Step") -> None:
        """Shows one step."""
        if step.metrics:
            self._metrics, self._metrics_round = step.metrics, step.round
        whole = step.phase != "round" or step.sites_done >= step.sites
        if step.phase == "prepare":
            whole = step.sites_done > 0
        if step.phase in ("declare", "evaluate"):
            whole = step.sites_done == step.sites or bool(step.notes)
        if step.phase == "round" and self._rounds_from is None:
            self._rounds_from = (step.round - (step.sites_done < step.sites), time.monotonic())
        if self._live:
            self._show(step)
        news = bool(step.metrics or step.notes) or step.phase in ("prepare", "done") or step.round == step.rounds
        if whole and (news or time.monotonic() - self._line_at > _LINE_SECONDS):
            self._line_at = time.monotonic()
            text = self._text(step)
            _log.info(text)
            if not self._live:
                self._console.print(Text(text), soft_wrap=True)

    def _show(self, step: "Step") -> None:
        assert self._live is not None
        if step.phase in ("prepare", "declare", "evaluate"):
            what = {"prepare": "reading images: site", "declare": "asking sites", "evaluate": "private evaluation"}
            self._bar.update(
                self._task,
                description=self._head + what[step.phase],
                completed=step.sites_done,
                total=step.sites,
                eta="",
            )
            self._live.update(Group(self._bar, *(Text(f"  {self._head}{note}") for note in step.notes[:8])))
            return
        done = step.round - (step.sites_done < step.sites)
        self._bar.update(
            self._task, description=self._head + "round", completed=done, total=step.rounds, eta=self._eta(step)
        )
        lines = [
            f"  {self._head}sites {step.sites_done}/{step.sites} of round {step.round}   {self._spent(step)}",
            *(f"  {self._head}{line}" for line in [_metrics_text(self._metrics, self._metrics_round)] if line),
            *(f"  {self._head}{note}" for note in step.notes[:3]),
        ]
        style = "" if self.private else "bold red"
        self._live.update(Group(self._bar, *(Text(line, style=style) for line in lines)))

    def _text(self, step: "Step") -> str:
        if step.phase == "prepare":
            text = f"images of {step.sites_done} of {step.sites} sites read"
        elif step.phase == "declare":
            text = f"{step.sites_done} of {step.sites} sites take part"
        elif step.phase == "evaluate":
            text = f"private evaluation: {step.sites_done} of {step.sites} sites answered"
        elif step.phase == "done":
            text = "done"
        else:
            parts = [f"round {step.round}/{step.rounds}", f"sites {step.sites_done}/{step.sites}", self._spent(step)]
            parts += [_metrics_text(step.metrics, step.round)] if step.metrics else []
            eta = self._eta(step)
            text = ", ".join([*parts, *([eta] if eta else [])])
        return self._head + "; ".join([text, *step.notes])

    def _spent(self, step: "Step") -> str:
        if not self.private or not math.isfinite(step.epsilon_high):
            return "epsilon unbounded"
        low, high = f"{step.epsilon_low:.2f}", f"{step.epsilon_high:.2f}"
        of = f" of {self.target:g}" if self.target else ""
        return f"epsilon spent per site {low if low == high else f'{low} to {high}'}{of}"

    def _eta(self, step: "Step") -> str:
        if self._rounds_from is None or step.round >= step.rounds:
            return ""
        first, began = self._rounds_from
        done = step.round - first - (step.sites_done < step.sites)
        if done < 1:
            return ""
        left = round((time.monotonic() - began) / done * (step.rounds - step.round))
        return f"{left // 60}:{left % 60:02d} left"


def _metrics_text(metrics: Mapping[str, Any], round_: int) -> str:
    value = metrics.get("auroc", {}).get("value")
    return "" if value is None else f"held-out AUROC {value:.3f} after round {round_} (simulation only)"


def show_summary(summary: Mapping[str, Any], folder: str, console: Console) -> None:
    """The final tables on `console`: what each site spent, and how good the model is."""
    private = bool(summary["privacy_enabled"])
    per_site = summary["metrics"].get("auroc_per_site", {})
    title = f"{summary['run']}: {summary['rounds']} rounds of {summary['model']} ({summary['parameters']:,} parameters)"
    table = Table(title=title + ("" if private else f" - {NO_PRIVACY}"), title_justify="left")
    table.add_column("site", no_wrap=True)
    exact = ["AUROC *"] if per_site else []  # real hospitals tell nobody
    for name in ("patients", "epsilon", "delta", "noise", "rate", *exact):
        table.add_column(name, justify="right")
    shown = summary["sites"] if len(summary["sites"]) <= 12 else [*summary["sites"][:10], None, summary["sites"][-1]]
    for site in shown:
        if site is None:
            table.add_row(f"... {len(summary['sites']) - 11} more")
            continue
        table.add_row(
            site["name"],
            str(site["patients_declared"]),
            f"{site['epsilon']:.3f}" if private else NO_PRIVACY,
            f"{site['delta']:.0e}" if private else "",
            f"{site['noise_multiplier']:.3g}",
            f"{site['sampling_rate']:.3g}",
            *(_value(per_site.get(site["name"])) for _ in exact),
        )
    names = {site["name"] for site in summary["sites"]}
    for name in sorted(per_site.keys() - names):
        table.add_row(f"{name} (never trains)", *[""] * 5, _value(per_site[name]))
    console.print(table)
    if "private_evaluation" in summary["metrics"]:
        console.print(_private_table(summary["metrics"]["private_evaluation"]))
    for line in _closing_lines(summary, folder):
        console.print(Text(line), soft_wrap=not console.is_terminal)


def _value(metric: Mapping[str, Any] | None) -> str:
    return "undefined" if not metric or metric["value"] is None else f"{metric['value']:.3f}"


_FIGURES = ("auroc", "sensitivity", "specificity", "ece")


def _private_table(found: Mapping[str, Any]) -> Table:
    """Everybody and each group: what a deployed federation could publish, each figure with its interval."""
    table = Table(
        title=f"From noisy histograms of {found['sites']} sites' {found['split']} patients, as in deployment",
        title_justify="left",
    )
    table.add_column("patients in", no_wrap=True)
    for name in ("number", "AUROC", "sensitivity", "specificity", "ECE"):
        table.add_column(name, justify="right")
    for cell in found["cells"]:
        name = "all" if cell["attribute"] == "all" else f"{cell['attribute']} {cell['group']}"
        number = "" if cell["patients"] is None else f"{cell['patients']:.0f}\n+/- {cell['patients_noise_sd']:.0f}"
        table.add_row(name, number, *(_interval(cell[figure]) for figure in _FIGURES))
    return table


def _interval(metric: Mapping[str, Any]) -> str:
    if metric["value"] is None:
        return "withheld"
    return f"{metric['value']:.2f}\n{metric['low']:.2f}-{metric['high']:.2f}"


def _private_lines(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"below each figure: its {found['confidence']:.0%} interval, for noise and for which patients there are",
        "number: noisy, +/- its noise's standard deviation",
        f"sensitivity and specificity: at a score of {found['threshold']:g}; ECE: calibration error, 0 is best",
    ]
    reasons = {cell[figure]["reason"] for cell in found["cells"] for figure in _FIGURES if "reason" in cell[figure]}
    return [*lines, *(f"withheld: {reason}" for reason in sorted(reasons))]


def _closing_lines(summary: Mapping[str, Any], folder: str) -> list[str]:
    metrics = summary["metrics"]
    pooled = metrics.get("auroc", {})
    lines = ["patients: declared; noise: multiplier of the clipping norm; rate: share of patients sampled in a step"]
    if pooled:
        lines.append(
            f"AUROC over all training sites' {pooled['split']} patients: {_value(pooled)} *    "
            "* exact, from pretend patients: simulation only"
        )
    if "private_evaluation" in metrics:
        lines += _private_lines(metrics["private_evaluation"])
    if summary["rounds_void"]:
        lines.append(f"{summary['rounds_void']} rounds had too few usable updates and changed nothing.")
    if summary["privacy_enabled"]:
        unit = summary["sites"][0]["unit"]
        lines.append(
            f"What left each site is (epsilon, delta)-differentially private for adding or removing one {unit}."
        )
        replaced = max(site.get("epsilon_replace_one", 0.0) for site in summary["sites"])
        if replaced:
            lines.append(f"Replacing one {unit} by another: epsilon {replaced:.3f} (dp-accounting's REPLACE_ONE).")
    else:
        lines.append("this run protected nobody. It is a baseline.")
    lines.append(f"Everything this run left is in {folder}")
    return lines if summary["privacy_enabled"] else [f"{NO_PRIVACY}: {line}" for line in lines]


def show_runs(runs: "Sequence[Run]", console: Console) -> None:
    """A coordinator's runs, and below the table why some of them ended."""
    if not runs:
        console.print("There are no runs yet.")
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    for name in ("run", "state", "round", "launched by", "at (UTC)"):
        table.add_column(name, no_wrap=name != "launched by", overflow="fold")
    for run in runs:
        at = run.submitted[:16].replace("T", " ")
        table.add_row(Text(run.run_id), run.state, f"{run.round}/{run.rounds}", Text(run.launcher), at)
    console.print(table)
    for run in runs:
        if run.reason:
            console.print(Text(f"{run.run_id}: {run.reason}"), soft_wrap=not console.is_terminal)


def consoles(quiet_stdout: bool) -> tuple[Console, Console]:
    """Progress on standard error, results on standard output; with `quiet_stdout` there too, on standard error."""
    progress = Console(stderr=True, highlight=False)
    results = progress if quiet_stdout else Console(file=sys.stdout, highlight=False)
    return progress, results
