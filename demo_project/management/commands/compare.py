"""`manage.py compare`: measure what a burst of tasks does to visitors, by four means.

The measurement itself is in `benchmarks/`, next to this site in the checkout.
"""

import json
import sys
from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.comparison import (
    Comparison,
    Measured,
    Plan,
    UnansweredError,
    Verdict,
    throwaway_database,
)
from demo_project import processes
from demo_project.models import Member

WHAT_COSTS = (
    "p99 x idle: the median of the rounds, the lowest and the highest. Above 1, it is mostly the Python code "
    "of the tasks, for which requests wait at the GIL, whoever starts the tasks. gunicorn's gthread worker "
    "or a free-threaded Python helps."
)


class Command(BaseCommand):
    """Runs the scenario against a real uvicorn.

    Exit status: 0 if bgtasks kept its promise, 1 if not, 2 if the machine was too noisy or too slow to tell.
    """

    help = "Compare what a burst of tasks does to requests, by a thread each, ThreadPoolExecutor and bgtasks."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--burst", type=int, default=400, help="tasks started at once (default: %(default)s)"
        )
        parser.add_argument(
            "--rounds",
            type=int,
            default=3,
            help="rounds, each with a burst of each means (default: %(default)s)",
        )
        parser.add_argument(
            "--seconds",
            type=float,
            default=15,
            help="seconds of a round without a burst (default: %(default)s)",
        )
        processes.Scenario.add_arguments(parser)
        parser.add_argument("--sqlite", action="store_true", help="use SQLite instead of PostgreSQL")
        parser.add_argument("--json", action="store_true", help="print the figures as JSON")
        parser.add_argument(
            "--data-dir", type=Path, default=settings.DATA_DIR, help="where the database's files go"
        )

    def handle(self, *args: Any, **options: Any) -> None:
        """Measure, print, and exit with the verdict."""
        plan = Plan(
            scenario=processes.Scenario.from_options(options),
            burst=options["burst"],
            rounds=options["rounds"],
            warm_up=min(4.0, options["seconds"]),
            idle=options["seconds"],
        )
        console = Console(stderr=True)
        data_dir: Path = options["data_dir"].resolve()
        try:
            with processes.Stop() as stop, ExitStack() as stack:
                with console.status("starting the database and the mail server"):
                    database = stack.enter_context(throwaway_database(data_dir, sqlite=options["sqlite"]))
                    mail_port = stack.enter_context(processes.mail_server(plan.scenario.task_seconds / 2))
                if database.note:
                    console.print(database.note, style="yellow")
                bar = stack.enter_context(
                    Progress(
                        TextColumn("{task.description}"),
                        BarColumn(),
                        TimeRemainingColumn(),
                        console=console,
                        refresh_per_second=2,
                        transient=True,
                    )
                )
                job = bar.add_task("starting", total=plan.seconds())
                comparison = Comparison(
                    plan, stop, lambda text, seconds: bar.update(job, description=text, advance=seconds)
                )
                comparison.run(database, mail_port, data_dir)
        except processes.Stopped:
            console.print("stopped: no figures")
            sys.exit(130)
        except UnansweredError as error:
            log = data_dir / "compare.log"
            raise CommandError(
                f"{error}. If this machine is too slow for {plan.scenario.rate:g} visits a second, try "
                f"{plan.calmer}; what the site printed is in {log}"
            ) from error
        verdict = Verdict.of(comparison)
        if options["json"]:
            print(json.dumps(self._as_json(plan, database, comparison, verdict), indent=2))
        else:
            self._print(plan, database, comparison, verdict)
        sys.exit({True: 0, False: 1, None: 2}[verdict.kept])

    def _as_json(
        self, plan: Plan, database: processes.Database, comparison: Comparison, verdict: Verdict
    ) -> dict[str, Any]:
        lines = {"idle": comparison.idle} | {how.value: line for how, line in comparison.means.items()}
        return {
            "database": database.label,
            "burst": plan.burst,
            "rounds": plan.rounds,
            "idle_seconds": plan.idle,
            **{
                name: getattr(plan.scenario, name)
                for name in ("task_seconds", "rate", "pool_size", "pool_timeout")
            },
            "results": {name: line.as_json() for name, line in lines.items()},
            "ratios": verdict.ratios,
            "against_peer": verdict.against_peer,
            "noise": verdict.noise,
            "promise_kept": verdict.kept,
            "broken": verdict.broken,
            "note": verdict.note,
        }

    def _print(
        self, plan: Plan, database: processes.Database, comparison: Comparison, verdict: Verdict
    ) -> None:
        scenario = plan.scenario
        console = Console()
        console.print(
            f"{plan.rounds} x a burst of {plan.burst} tasks of {scenario.task_seconds:g} s, "
            f"{scenario.rate:g} requests/s, {database.label}, {scenario.pool_size} connections"
        )
        table = Table(box=SIMPLE_HEAD)
        table.add_column("work started by", no_wrap=True)
        for heading in ("p50 ms", "p99 ms", "max ms", "p99 x idle", "failed requests", "lost tasks"):
            table.add_column(heading, justify="right", no_wrap=heading.startswith("p99") or "ms" in heading)
        for line in (comparison.idle, *comparison.means.values()):
            table.add_row(*self._cells(line, comparison.idle.p99))
        console.print(table)
        console.print(WHAT_COSTS)
        peer = comparison.means[Member.How.EXECUTOR_8].label
        if verdict.kept:
            console.print(
                f"With bgtasks no request failed, no accepted task was lost, and the p99 was "
                f"{verdict.against_peer} x that with {peer} (rounds differ by {verdict.noise} x).",
                style="green",
            )
        for reason in verdict.broken:
            console.print(f"Not as promised: {reason}.", style="red")
        if verdict.note:
            console.print(f"No verdict: {verdict.note}.", style="yellow")

    def _cells(self, line: Measured, idle: float) -> list[str]:
        lowest, highest = (value / max(idle, 0.01) for value in line.range())
        return [
            line.label,
            *(f"{value:.1f}" for value in (line.p50, line.p99, line.max)),
            f"{line.p99 / max(idle, 0.01):.2f} ({lowest:.2f} to {highest:.2f})",
            f"{line.failed} of {line.requests}",
            f"{line.lost} of {line.tasks}" if line.tasks else "",
        ]
