"""What a rehearsal says of its accounts: the verdict, and the line to change."""

from collections import Counter
from signal import SIGKILL, SIGTERM
from typing import Any

import pytest

from bgtasks.rehearsal import advice
from bgtasks.rehearsal.accounts import Account
from bgtasks.rehearsal.report import as_json, as_text, failure_as_json, failure_as_text
from bgtasks.rehearsal.results import GROUP, Ended, NotRehearsed, Plan, ProcessResult, Result
from bgtasks.servers import ServerFacts

GUNICORN = ServerFacts("gunicorn", worker="sync", graceful_timeout=30, timeout=30)
ITSELF, KILLED = Ended(1.0, killed=False), Ended(10.0, killed=True)


def process(
    server: ServerFacts = GUNICORN,
    *,
    ended: Ended = ITSELF,
    shutdown_timeout: float = 8,
    **events: int,
) -> ProcessResult:
    """Return a process with so many events of each kind."""
    return ProcessResult(7, server, shutdown_timeout, Account(Counter(events)), ended)


def result(*processes: ProcessResult, **changes: Any) -> Result:
    command = changes.pop("command", "serve").split()
    of_plan = {"target", "signum", "strict"} & changes.keys()
    plan = Plan(command, **{key: changes.pop(key) for key in of_plan})
    return Result(plan, list(processes), ended_after=3.21, **changes)


def test_all_finished_is_status_0() -> None:
    """Tasks that raise or time out have finished as well."""
    seen = result(process(accepted=4, succeeded=1, failed=1, timed_out=2))

    assert advice.status(seen) == 0
    assert advice.verdict(seen) == (
        "No task was lost: all 4 accepted tasks have finished, and the last process ended 3.2 s after SIGTERM"
    )


def test_reported_tasks_are_not_lost_without_a_word() -> None:
    """What SHUTDOWN_TIMEOUT has cut is in the log, and no reason for an alarm."""
    seen = result(process(accepted=6, succeeded=2, cancelled=3, handed_off=1))

    assert advice.status(seen) == 0
    assert advice.verdict(seen).startswith(
        "No task was lost without a word: 3 of 6 accepted tasks were cancelled and reported"
    )
    [note] = advice.notes(seen)
    assert note.startswith(
        "gunicorn sync had more work than SHUTDOWN_TIMEOUT (8 s) allows: its log says what"
    )


def test_strict_rehearsal_fails_if_tasks_are_cancelled() -> None:
    """A pipeline may want to know that SHUTDOWN_TIMEOUT is too short for the work."""
    assert advice.status(result(process(accepted=6, succeeded=2, cancelled=4), strict=True)) == 1
    assert advice.status(result(process(accepted=6, succeeded=6), strict=True)) == 0


def test_verdict_counts_what_is_lost() -> None:
    """The number of tasks, in how many processes, and how long the end took."""
    seen = result(process(accepted=6, succeeded=2), process(accepted=2, succeeded=2))

    assert advice.verdict(seen) == (
        "4 of 8 accepted tasks were lost without a word, in 1 of 2 processes, and the last process ended "
        "3.2 s after SIGTERM"
    )


UVICORN_WORKER = ServerFacts("gunicorn", worker="UvicornWorker", graceful_timeout=30, timeout=None)
UWSGI = ServerFacts("uwsgi", die_on_term=True)
CASES: dict[str, tuple[ProcessResult, dict[str, Any], str]] = {
    "script": (process(accepted=1), {"shell": "dash"}, advice.EXEC),
    "left behind": (process(accepted=1, closing=1, ended=KILLED), {"main_first": True}, advice.EXEC),
    "sigkill": (process(accepted=1), {"signum": SIGKILL, "shell": "dash"}, advice.JOURNAL),
    "runserver": (process(ServerFacts("runserver"), accepted=1), {}, advice.RUNSERVER),
    "uwsgi": (process(UWSGI, accepted=1), {}, advice.UWSGI_HOOK),
    "uwsgi, all": (process(UWSGI, accepted=1), {"target": GROUP}, advice.KILL_MODE),
    "hypercorn, all": (process(ServerFacts("hypercorn"), accepted=1), {"target": GROUP}, advice.KILL_MODE),
    "waitress": (process(ServerFacts("waitress"), accepted=1), {}, advice.WAITRESS),
    "uvicorn": (process(ServerFacts("uvicorn"), accepted=1), {}, advice.WRAPPER),
    "uvicorn worker": (process(UVICORN_WORKER, accepted=1), {}, advice.WRAPPER),
    "graceful": (
        process(accepted=1, closing=1, shutdown_timeout=60),
        {},
        "raise --graceful-timeout above 60 s",
    ),
    "timeout": (
        process(accepted=1, closing=1, ended=Ended(-1, killed=False)),
        {},
        "raise --timeout above 8 s",
    ),
    "no timeout": (
        process(UVICORN_WORKER, accepted=1, closing=1, ended=Ended(-1, killed=False)),
        {},
        advice.HOOK,
    ),
    "kill": (process(accepted=1, closing=1, ended=KILLED), {}, "(Kubernetes)"),
    "deaf": (process(accepted=1, ended=KILLED), {}, advice.IN_FLIGHT),
    "unknown": (process(ServerFacts("serve"), accepted=1), {}, advice.HOOK),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_has_a_line_to_change(name: str) -> None:
    """Which one depends on the server, and on how its process ended; several processes have it once."""
    lossy, changes, change = CASES[name]

    [found] = advice.advice(result(lossy, lossy, **changes))

    assert change in found.change


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("uvicorn mysite.asgi:application --port 8000", "mysite/asgi.py"),
        ("python -m uvicorn --workers 2 sites.my_site.asgi:app", "sites/my_site/asgi.py"),
        ("gunicorn -c python:mysite.conf -k uvicorn_worker.UvicornWorker mysite.asgi", "mysite/asgi.py"),
        ("uvicorn web:application", "asgi.py"),
        ("sh start.sh", "asgi.py"),
    ],
)
def test_line_to_change_is_in_the_file_that_the_command_names(command: str, file: str) -> None:
    """It is that of the application; if the command does not name it, it has the usual name."""
    [found] = advice.advice(result(process(ServerFacts("uvicorn"), accepted=1), command=command))

    assert found.change == f"write in {file}: {advice.WRAPPER}"


def test_setting_that_the_checks_would_refuse_is_not_proposed() -> None:
    """SHUTDOWN_TIMEOUT is 1 or more, so under a limit of a second only the limit can be raised."""
    server = ServerFacts("gunicorn", worker="sync", graceful_timeout=1, timeout=30)
    [found] = advice.advice(result(process(server, accepted=1, closing=1)))

    assert found.change == "raise --graceful-timeout above 8 s"


def test_setting_leaves_room_under_the_limit() -> None:
    """With the 10 s of a container, what is proposed is the default, 8 s."""
    [found] = advice.advice(result(process(accepted=1, closing=1, ended=KILLED, shutdown_timeout=20)))

    assert found.problem == "SHUTDOWN_TIMEOUT is 20 s, and the kill comes after 10 s"
    assert found.change.startswith(
        'write "SHUTDOWN_TIMEOUT": 8 for each pool in BGTASKS, also for "default"; or'
    )
    assert found.change.endswith(f" raise {advice.KILL_OPTIONS} above 20 s")


def test_limits_that_would_lose_tasks_are_noted() -> None:
    """A queue that was short enough this time does not hide a limit under SHUTDOWN_TIMEOUT."""
    server = ServerFacts("gunicorn", "sync", graceful_timeout=30, timeout=30, max_requests=1000)
    found = advice.notes(result(process(server, shutdown_timeout=30)))

    assert [note.removeprefix("SHUTDOWN_TIMEOUT is 30 s, and ").partition(": ")[0] for note in found] == [
        "the kill comes after 10 s",
        "gunicorn's --graceful-timeout comes after 30 s",
        "gunicorn's --timeout, when a worker is replaced at its --max-requests, comes after 30 s",
    ]
    assert advice.notes(result(process(server, accepted=1, shutdown_timeout=30))) == []  # there is advice
    assert "answering a request" in advice.notes(result(process(UWSGI)))[0]
    assert advice.KILL_MODE in advice.notes(result(process(ServerFacts("uwsgi")), target=GROUP))[0]


def test_what_was_not_rehearsed_is_noted() -> None:
    """Kinds of tasks that a process does not accept, a database that is not there, engines, a late kill."""
    account = Account(Counter({"dropped async no_loop": 1, "no database OperationalError": 3, "closing": 1}))
    seen = ProcessResult(7, GUNICORN, 8, account, KILLED, ("email",))

    assert advice.notes(result(seen)) == [
        "gunicorn sync accepts no async tasks (no_loop), so none was rehearsed",
        "gunicorn sync had no database (OperationalError), so no query was rehearsed",
        "gunicorn sync had to be killed, after its tasks had ended",
        f"pool 'email' hands off, but not the probes: {advice.NOT_HANDED_OFF}",
    ]


def test_report_has_a_row_for_each_process() -> None:
    """Numbers are under their headings, and what follows says what to do."""
    before = process(accepted=3, succeeded=3, ended=Ended(-1, killed=False))
    seen = result(before, process(accepted=300, succeeded=2, closing=1, ended=KILLED))
    text = as_text(seen)

    assert text.splitlines()[:-1] == [
        "process  server         accepted  finished  cancelled  handed off  lost  ended",
        "7        gunicorn sync         3         3          0           0     0  before the signal",
        "7        gunicorn sync       300         2          0           0   298  after 10.0 s, killed",
        "",
        f"{advice.verdict(seen)}.",
        "",
        "Lost: SHUTDOWN_TIMEOUT is 8 s, and the kill comes after 10 s.",
    ]
    assert text.splitlines()[-1].startswith('  To do: write "SHUTDOWN_TIMEOUT": 8 for each pool')


def test_json_has_all_of_it() -> None:
    """A script reads the same."""
    seen = as_json(result(process(accepted=3, succeeded=1)))

    assert seen["status"] == 1
    assert seen["signal"] == SIGTERM.name
    assert seen["processes"] == [
        {
            "pid": 7,
            "server": "gunicorn",
            "accepted": 3,
            "finished": 1,
            "cancelled": 0,
            "handed_off": 0,
            "lost": 2,
            "ended_after": 1.0,
            "killed": False,
        }
    ]
    assert seen["advice"] == [
        {"problem": "gunicorn sync ended without an exit hook of Python", "change": advice.HOOK}
    ]


def test_failure_shows_what_the_server_has_said() -> None:
    """Why it could not be rehearsed is mostly in there."""
    failure = NotRehearsed("nothing starts", "start it", ["Traceback", "ImportError: x"])

    assert failure_as_text(failure) == (
        "This could not be rehearsed: nothing starts.\n  To do: start it.\n"
        "The last lines of the server:\n  Traceback\n  ImportError: x"
    )
    assert failure_as_json(failure) == {
        "status": 2,
        "verdict": "This could not be rehearsed: nothing starts",
        "change": "start it",
        "output": ["Traceback", "ImportError: x"],
    }
