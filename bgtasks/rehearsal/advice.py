"""The verdict of a rehearsal, and for each loss the line to change.

What is known here of each server is what ``tests/test_servers.py`` finds of the real one, and what
``docs/deploying.md`` says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from bgtasks.conf import SHUTDOWN_TIMEOUT_MIN
from bgtasks.rehearsal.accounts import DROPPED, NO_DATABASE
from bgtasks.rehearsal.results import GROUP, ProcessResult, Result

ENDED_BY_THEIR_OWN = frozenset({"hypercorn", "uwsgi"})  # whose workers a SIGTERM of their own ends at once
SHARE = 0.8  # of a limit that SHUTDOWN_TIMEOUT may take

APPLICATION = re.compile(r"((?:\w+\.)+[aw]sgi)(:\w+)?")  # as in a server's command: mysite.asgi:application

WRAPPER = "application = bgtasks.asgi.lifespan(get_asgi_application())"
KILL_MODE = "under systemd, write in the unit: KillMode=mixed; elsewhere, signal the main process only"
UWSGI_HOOK = (
    "start uwsgi with --hook-master-start 'unix_signal:15 gracefully_kill_them_all' and without --die-on-term"
)
ONE_WORKER = (
    "start hypercorn with one worker (-w 1), and more containers or services in place of more workers"
)
RUNSERVER = "deploy with another server, such as gunicorn: runserver is for development"
WAITRESS = "signal.signal(signal.SIGTERM, lambda *_: sys.exit())"
JOURNAL = "stop the server by SIGTERM; BGTASKS_JOURNAL reports what killed processes have lost"
EXEC = "write exec before the server's command in the start script; in a Dockerfile, give CMD as a list"
HOOK = "call bgtasks.shutdown() where the process ends"
KILL_OPTIONS = (
    "stop_grace_period (Compose), terminationGracePeriodSeconds (Kubernetes), TimeoutStopSec (systemd) or "
    "docker stop --timeout"
)
NOT_HANDED_OFF = "at the deadline they are cancelled, where the project's tasks would be handed off"
IN_FLIGHT = (
    "see that the signal reaches the server itself (exec), and that requests and whatever else it waits for "
    "end in time"
)


class Advice(NamedTuple):
    """What is wrong, and what to change."""

    problem: str
    change: str


def verdict(result: Result) -> str:
    """Return what came out, in one sentence."""
    ended = f"the last process ended {result.ended_after:.1f} s after {result.plan.signum.name}"
    if result.lost:
        where = sum(process.account.lost > 0 for process in result.processes)
        return (
            f"{result.lost} of {result.accepted} accepted tasks were lost without a word, in {where} of "
            f"{_processes(len(result.processes))}, and {ended}"
        )
    if result.cancelled:
        return (
            f"No task was lost without a word: {result.cancelled} of {result.accepted} accepted tasks were "
            f"cancelled and reported, the others have finished, and {ended}"
        )
    return f"No task was lost: all {result.accepted} accepted tasks have finished, and {ended}"


def status(result: Result) -> int:
    """Return the exit status of the command: 0 only if nothing was lost; if strict, nor cancelled."""
    return int(result.lost > 0 or (result.plan.strict and result.cancelled > 0))


def advice(result: Result) -> list[Advice]:
    """Return for each loss what to change, each thing once."""
    found = [_of_loss(process, result) for process in result.processes if process.account.lost]
    return list(dict.fromkeys(found))


def _of_loss(process: ProcessResult, result: Result) -> Advice:
    causes = (
        _of_signal(result)
        or _of_script(process, result)
        or _of_server(process, result)
        or _of_lifespan(process, result)
        or _of_gunicorn(process)
        or _of_kill(process, result)
    )
    return causes or Advice(f"{_name(process)} ended without an exit hook of Python", HOOK)


def _of_signal(result: Result) -> Advice | None:
    if result.plan.signum.name != "SIGKILL":  # which Windows does not have
        return None
    return Advice("SIGKILL ends a process at once, and no server or library can run anything then", JOURNAL)


def _of_script(process: ProcessResult, result: Result) -> Advice | None:
    if result.shell is None or process.account.closing:
        return None
    return Advice(
        f"a shell ({result.shell}) stands between the command and {_name(process)}, and does not pass "
        f"{result.plan.signum.name} on",
        EXEC,
    )


def _of_server(process: ProcessResult, result: Result) -> Advice | None:
    """Return what is particular to a server."""
    name, signum = process.server.name, result.plan.signum.name
    if name == "runserver":
        return Advice(f"runserver ends at {signum} without waiting for tasks", RUNSERVER)
    if name in ENDED_BY_THEIR_OWN and result.plan.target == GROUP:
        return Advice(f"a worker of {name} ends at once by a {signum} of its own", KILL_MODE)
    if name == "uwsgi" and not process.account.closing:
        option = "--die-on-term" if process.server.die_on_term else f"its own way to handle {signum}"
        return Advice(f"uwsgi with {option} ends workers, or goes on, without exit hooks", UWSGI_HOOK)
    if name == "hypercorn" and sum(each.server.name == name for each in result.processes) > 1:
        return Advice("the first worker of hypercorn that has ended ends the others", ONE_WORKER)
    if name == "waitress" and not process.account.closing:
        return Advice(
            f"waitress does not handle {signum}, so that its process ends without exit hooks",
            f"write in {_file(result, 'wsgi.py')}: {WAITRESS}",
        )
    return None


def _of_lifespan(process: ProcessResult, result: Result) -> Advice | None:
    """Return what to do on uvicorn, where the lifespan is the only way to hear of a shutdown."""
    uvicorn = process.server.name == "uvicorn" or "uvicorn" in process.server.worker.lower()
    if not uvicorn or process.account.closing or process.ended.killed:
        return None
    return Advice(
        f"{_name(process)} has not announced its lifespan to bgtasks, and runs no exit hook",
        f"write in {_file(result, 'asgi.py')}: {WRAPPER}",
    )


def _of_gunicorn(process: ProcessResult) -> Advice | None:
    """Return which limit of gunicorn has cut the drain."""
    server = process.server
    if server.name != "gunicorn" or not process.account.closing or process.ended.killed:
        return None
    if process.ended.after < 0:
        option, limit = "--timeout", server.timeout
    else:
        option, limit = "--graceful-timeout", server.graceful_timeout
    return None if limit is None else _too_long(process, f"gunicorn's {option}", limit, option)


def _of_kill(process: ProcessResult, result: Result) -> Advice | None:
    if not process.ended.killed:
        return None
    if result.main_first:
        return Advice(
            f"the command's own process ended before {_name(process)}: containers and systemd kill it then",
            EXEC,
        )
    if process.account.closing:
        return _too_long(process, "the kill", result.plan.kill_after, KILL_OPTIONS)
    return Advice(
        f"{_name(process)} had not begun to shut down when it was killed, {result.plan.kill_after:g} s after "
        f"{result.plan.signum.name}",
        IN_FLIGHT,
    )


def _too_long(process: ProcessResult, who: str, limit: float, option: str) -> Advice:
    timeout = process.shutdown_timeout
    change = f"raise {option} above {timeout:g} s"
    if SHARE * limit >= SHUTDOWN_TIMEOUT_MIN:
        setting = f'"SHUTDOWN_TIMEOUT": {SHARE * limit:g} for each pool in BGTASKS, also for "default"'
        change = f"write {setting}; or {change}"
    return Advice(f"SHUTDOWN_TIMEOUT is {timeout:g} s, and {who} comes after {limit:g} s", change)


def notes(result: Result) -> list[str]:
    """Return what else is worth to know, each thing once."""
    found = [note for process in result.processes for note in (*_observed(process), *_risks(process, result))]
    return list(dict.fromkeys(found))


def _observed(process: ProcessResult) -> Iterator[str]:
    account = process.account
    for dropped in account.details(DROPPED):
        kind, reason = dropped.split()
        yield f"{_name(process)} accepts no {kind} tasks ({reason}), so none was rehearsed"
    for error in account.details(NO_DATABASE):
        yield f"{_name(process)} had no database ({error}), so no query was rehearsed"
    if account.cancelled:
        yield (
            f"{_name(process)} had more work than SHUTDOWN_TIMEOUT ({process.shutdown_timeout:g} s) allows: "
            "its log says what was left, by name and number"
        )
    if account.closing and process.ended.killed and not account.lost:
        yield f"{_name(process)} had to be killed, after its tasks had ended"
    for pool in process.handoff:
        yield f"pool {pool!r} hands off, but not the probes: {NOT_HANDED_OFF}"


def _risks(process: ProcessResult, result: Result) -> Iterator[str]:
    """Return which limits are shorter than SHUTDOWN_TIMEOUT, though they have cut nothing this time."""
    server, timeout = process.server, process.shutdown_timeout
    if process.account.lost:
        return
    limits = {"the kill": result.plan.kill_after, **server.limits()}
    for who, limit in limits.items():
        if timeout >= limit:
            yield (
                f"SHUTDOWN_TIMEOUT is {timeout:g} s, and {who} comes after {limit:g} s: with more work "
                "than that queued, tasks would be lost"
            )
    if result.plan.target == GROUP and server.name in ENDED_BY_THEIR_OWN:
        yield f"a worker of {server.name} that is signalled before its master loses its tasks: {KILL_MODE}"
    if server.die_on_term:
        yield f"a worker that is answering a request at the signal would lose its tasks: {UWSGI_HOOK}"


def _file(result: Result, default: str) -> str:
    """Return the file of the application, if the command names it."""
    found = [match for match in map(APPLICATION.fullmatch, result.plan.command) if match]
    return found[-1][1].replace(".", "/") + ".py" if found else default


def _name(process: ProcessResult) -> str:
    server = process.server
    return f"{server.name} {server.worker}".rstrip()


def _processes(number: int) -> str:
    return "1 process" if number == 1 else f"{number} processes"
