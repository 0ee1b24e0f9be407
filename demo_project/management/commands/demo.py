"""`manage.py demo`: show the site, with everything it needs, on this machine."""

from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand

from demo_project import processes
from demo_project.auth import STAFF


class Command(BaseCommand):
    """Starts PostgreSQL, the mail server, uvicorn and the probe, and ends them all on Ctrl-C or SIGTERM."""

    help = "Run the demo site with all it needs (PostgreSQL, a mail server, uvicorn, a probe) until Ctrl-C."
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument(
            "--port", type=int, default=8000, help="the port of the site, 0 for any (default: 8000)"
        )
        parser.add_argument("--sqlite", action="store_true", help="use SQLite instead of PostgreSQL")
        parser.add_argument(
            "--data-dir", type=Path, default=settings.DATA_DIR, help="where the database's files go"
        )
        processes.Scenario.add_arguments(parser)

    def handle(self, *args: Any, **options: Any) -> None:
        """Run the demo."""
        scenario = processes.Scenario.from_options(options)
        processes.free_port(options["port"])  # complain before anything starts
        try:
            with processes.Stop() as stop, ExitStack() as stack:
                self._run(stop, stack, scenario, options)
        except processes.Stopped:
            self.stdout.write("stopped")

    def _run(
        self, stop: processes.Stop, stack: ExitStack, scenario: processes.Scenario, options: dict[str, Any]
    ) -> None:
        """Start everything, say where it is, and wait for the end."""
        data_dir: Path = options["data_dir"].resolve()
        self._say("starting the database ...")
        database = stack.enter_context(processes.database(data_dir, sqlite=options["sqlite"]))
        stop.wait(0)
        if database.note:
            self.stderr.write(self.style.WARNING(database.note))
        mail_port = stack.enter_context(processes.mail_server(scenario.task_seconds / 2))
        environment = scenario.variables(database, mail_port, data_dir)
        self._say(f"{database.label} is ready; running the migrations ...")
        processes.migrate(environment)
        stop.wait(0)
        log = data_dir / "server.log"
        address = stack.enter_context(processes.web_server(options["port"], environment, log, stop))
        probe = stack.enter_context(
            processes.probe(f"{address}members/", scenario.rate, environment, report=f"{address}probe/")
        )
        self._say(f"the server logs to {log}")
        self._say(
            f"what the background tasks do: {address}admin/bgtasks/backgroundtasks/, "
            f"as {STAFF} with the password {environment['DEMO_PASSWORD']}"
        )
        self._say(self.style.SUCCESS(f"Guestlist is open at {address}") + "  (Ctrl-C ends everything)")
        while probe.poll() is None:
            stop.wait(1)
        self.stderr.write(self.style.ERROR(f"the probe ended with status {probe.returncode}"))

    def _say(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()
