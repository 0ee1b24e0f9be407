"""Rehearsals of real servers: each says of a server what tests/test_servers.py finds of it.

All that are asked for run side by side, since they mostly wait; each test looks at one.
"""

import os
import shlex
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, Signals
from typing import Any

import pytest

from bgtasks.rehearsal import advice, runner
from bgtasks.rehearsal.results import GROUP, MAIN, NotRehearsed, Plan, Result
from tests.processes import environment, free_port
from tests.test_servers import (
    ASGI,
    BIN,
    DAPHNE,
    GRANIAN,
    GUNICORN,
    HYPERCORN,
    RUNSERVER,
    UNWRAPPED,
    UVICORN,
    UVICORN_WORKER,
    UWSGI,
    UWSGI_GRACEFUL,
    WAITRESS,
    WSGI,
    WSGI_SIGTERM,
)

CHECKOUT = str(Path(__file__).parent.parent.parent)

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.servers]

AT_ONCE = 4  # rehearsals
FILES = Path(__file__).parent.parent / "servers"
SCRIPT = f"sh {FILES / 'rehearsed.sh'} "
SUPERVISED = f"sh -c 'cd . && exec {BIN / GUNICORN}{WSGI}'"  # as a `command` of supervisord's configuration
UVICORN_WORKERS = UVICORN + "--workers 2 --timeout-worker-healthcheck 60 "
URL = "http://127.0.0.1:{port}"


@dataclass(frozen=True)
class Case:
    """A server to rehearse.

    Attributes:
        command: How it is started, on `{port}`, which is also in the environment.
        change: A part of what is to be changed; "" if nothing is lost.
        problem: A part of what is wrong.
        workers: Processes that spawn.
        shutdown_timeout: Seconds.
        seconds: Of work that waits.
    """

    command: str
    change: str = ""
    problem: str = ""
    workers: int = 1
    shutdown_timeout: float = 60
    seconds: float = 1.5
    signum: Signals = SIGTERM
    target: str = MAIN
    url: str = ""
    requests: int = 0
    kill_after: float = 30

    def rehearse(self) -> Result | NotRehearsed:
        """Rehearse it."""
        port = free_port()
        program, *args = shlex.split(self.command.format(port=port))
        variables = [f"BGTASKS_TEST_SHUTDOWN_TIMEOUT={self.shutdown_timeout}", f"PORT={port}"]
        if self.change:  # coverage handles SIGTERM, which would otherwise end a process on the spot
            variables += ["COVERAGE_PROCESS_START=", "COVERAGE_PROCESS_CONFIG="]
        plan = Plan(
            ["env", *variables, program if program == "sh" else str(BIN / program), *args],
            self.seconds,
            self.signum,
            self.target,
            self.url.format(port=port) or None,
            self.requests,
            self.kill_after,
        )
        try:
            return runner.Rehearsal(plan).run()
        except NotRehearsed as failure:
            return failure


SAFE = {
    "gunicorn-sync": Case(GUNICORN + "--workers 2 " + WSGI, workers=2),
    "gunicorn-gthread": Case(GUNICORN + "-k gthread --threads 4 " + WSGI),
    "gunicorn-preload": Case(GUNICORN + "--preload --workers 2 " + WSGI, workers=2),
    "gunicorn-asgi": Case(GUNICORN + "-k asgi " + ASGI),
    "gunicorn-uvicorn-worker": Case(GUNICORN + UVICORN_WORKER + ASGI),
    "gunicorn-gevent": Case(GUNICORN + "-k gevent " + WSGI),
    "uvicorn": Case(UVICORN + ASGI),
    "uvicorn-workers": Case(UVICORN_WORKERS + ASGI, workers=2),
    "python-m-uvicorn": Case("python -m " + UVICORN_WORKERS + ASGI, workers=2),
    "hypercorn": Case(HYPERCORN + ASGI),
    "daphne": Case(DAPHNE + ASGI),
    "granian-asgi": Case(GRANIAN + "--interface asgi --workers 2 " + ASGI, workers=2),
    "granian-wsgi": Case(GRANIAN + "--interface wsgi --workers 2 " + WSGI, workers=2),
    "uwsgi": Case(UWSGI_GRACEFUL + "--processes 2 --module " + WSGI, workers=2),
    "uwsgi-ini": Case(f"uwsgi --ini {FILES / 'uwsgi.ini'}", workers=2),
    "uwsgi-lazy-apps": Case(UWSGI_GRACEFUL + "--lazy-apps --module " + WSGI),
    "waitress": Case(WAITRESS + WSGI_SIGTERM),
    "waitress-ctrl-c": Case(WAITRESS + WSGI, signum=SIGINT),
    "runserver-ctrl-c": Case(RUNSERVER + "--noreload", signum=SIGINT),
    "script-group": Case(SCRIPT + str(BIN / GUNICORN) + WSGI, target=GROUP),
    "supervisord": Case(SUPERVISED),
    "visited": Case(GUNICORN + WSGI, url=URL, requests=1),
}
LOSING = {
    "uvicorn-unwrapped": Case(
        UVICORN + UNWRAPPED,
        f"write in tests/servers/asgi.py: {advice.WRAPPER}",
        "uvicorn has not announced its lifespan",
    ),
    "uvicorn-worker-unwrapped": Case(GUNICORN + UVICORN_WORKER + UNWRAPPED, advice.WRAPPER, "gunicorn Uvi"),
    "gunicorn-graceful-timeout": Case(
        GUNICORN + "--graceful-timeout 1 " + WSGI,
        "raise --graceful-timeout above 60 s",
        "SHUTDOWN_TIMEOUT is 60 s, and gunicorn's --graceful-timeout comes after 1 s",
        seconds=5,
    ),
    "gunicorn-timeout": Case(
        GUNICORN + "--max-requests 3 --timeout 2 " + UVICORN_WORKER + ASGI,
        '"SHUTDOWN_TIMEOUT": 1.6 for each pool in BGTASKS, also for "default"; or raise --timeout above 60 s',
        "SHUTDOWN_TIMEOUT is 60 s, and gunicorn's --timeout comes after 2 s",
        seconds=8,
        url=URL,
        requests=4,
        workers=2,
    ),
    # 3 s between the ends of the two workers, whatever else the machine does.
    "hypercorn-workers": Case(
        HYPERCORN + "-w 2 " + ASGI, advice.ONE_WORKER, "first worker", workers=2, seconds=6
    ),
    "waitress-sigterm": Case(WAITRESS + WSGI, advice.WAITRESS, "waitress does not handle SIGTERM"),
    "runserver-sigterm": Case(RUNSERVER + "--noreload", advice.RUNSERVER, "runserver ends at SIGTERM"),
    "runserver-reload": Case(RUNSERVER, advice.RUNSERVER, "at SIGINT", signum=SIGINT, target=GROUP),
    "uwsgi-die-on-term": Case(
        UWSGI + "--die-on-term --module " + WSGI, advice.UWSGI_HOOK, "--die-on-term", url=URL + "/slow/"
    ),
    "uwsgi-reload": Case(
        UWSGI + "--module " + WSGI, advice.UWSGI_HOOK, "handle SIGTERM", workers=2, seconds=1, kill_after=6
    ),
    "script": Case(SCRIPT + str(BIN / GUNICORN) + WSGI, advice.EXEC, "does not pass SIGTERM on"),
    "kill": Case(
        GUNICORN + WSGI,
        '"SHUTDOWN_TIMEOUT": 2.4 for each pool in BGTASKS, also for "default"; or raise stop_grace_period',
        "SHUTDOWN_TIMEOUT is 60 s, and the kill comes after 3 s",
        seconds=6,
        kill_after=3,
    ),
}
RACING = {
    "hypercorn-group": Case(HYPERCORN + ASGI, advice.KILL_MODE, target=GROUP),
    "uwsgi-group": Case(UWSGI_GRACEFUL + "--module " + WSGI, advice.KILL_MODE, target=GROUP),
}
IMPOSSIBLE = {
    "early-end": Case(GUNICORN + "tests.servers.nosuch", problem="ended by itself (status 3) before"),
    "background": Case(GUNICORN + "--daemon " + WSGI, runner.BACKGROUND, "ended by itself (status 0)"),
}
CASES = SAFE | LOSING | RACING | IMPOSSIBLE


@pytest.fixture(scope="module")
def rehearsals(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, django_db_setup: None
) -> Iterator[dict[str, Future[Result | NotRehearsed]]]:
    """The rehearsals that the chosen tests ask for, all under way."""
    callspecs = [
        getattr(item, "callspec", None) for item in request.session.items if item.path == request.path
    ]
    names = dict.fromkeys(spec.params["name"] for spec in callspecs if spec is not None)
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(AT_ONCE) as executor:
        for name, value in environment({"DJANGO_SETTINGS_MODULE": "tests.servers.settings"}).items():
            patch.setenv(name, value)
        # pyuwsgi reloads itself with the interpreter that the virtual environment was made of, which finds
        # nothing of it by itself. The installed package comes first.
        parts = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), sysconfig.get_path("purelib"), CHECKOUT]
        patch.setenv("PYTHONPATH", os.pathsep.join(str(Path(part).absolute()) for part in parts if part))
        patch.chdir(tmp_path_factory.mktemp("rehearsals"))
        patch.setattr(runner, "SETTLE", 3.0)
        patch.setattr(runner, "PROBE_LIMIT", 20.0)
        yield {name: executor.submit(CASES[name].rehearse) for name in names}


def over(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", list(cases))


@over(SAFE)
def test_server_that_loses_nothing_is_said_to(name: str, rehearsals: Any) -> None:
    """Every accepted probe of every process has finished, and there is nothing to change."""
    result = rehearsals[name].result()

    assert isinstance(result, Result), vars(result)
    accounts = [process.account for process in result.processes]
    assert len(accounts) == SAFE[name].workers
    assert all(account.accepted == account.finished >= 6 for account in accounts), result
    assert advice.status(result) == 0
    assert advice.advice(result) == []
    assert advice.verdict(result).startswith(f"No task was lost: all {result.accepted} accepted tasks")


@over(LOSING)
def test_server_that_loses_tasks_is_said_to_and_what_to_change(name: str, rehearsals: Any) -> None:
    """The line to change is the one that tests/test_servers.py knows to be right."""
    case = LOSING[name]
    result = rehearsals[name].result()

    assert isinstance(result, Result), vars(result)
    assert len(result.processes) == case.workers
    assert advice.status(result) == 1
    assert "accepted tasks were lost without a word" in advice.verdict(result)
    [found] = advice.advice(result)
    assert case.change in found.change
    assert case.problem in found.problem


@over(RACING)
def test_server_that_may_lose_tasks_is_said_to(name: str, rehearsals: Any) -> None:
    """What is lost depends on who hears of the signal first, but not what to change."""
    case = RACING[name]
    result = rehearsals[name].result()

    assert isinstance(result, Result), vars(result)
    said = [each.change for each in advice.advice(result)] or advice.notes(result)
    assert any(case.change in text for text in said)


@over(IMPOSSIBLE)
def test_server_that_runs_no_task_cannot_be_rehearsed(name: str, rehearsals: Any) -> None:
    """It is said why, and what to do where that is known."""
    case, failure = IMPOSSIBLE[name], rehearsals[name].result()

    assert isinstance(failure, NotRehearsed), failure
    assert case.problem in failure.why
    assert failure.change == case.change
