"""Which server has started this process, and those of its settings that decide about tasks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from django.utils.autoreload import DJANGO_AUTORELOAD_ENV

from bgtasks.core.log import log

# Packages whose code calls that of the project while it loads it.
SERVERS = ("gunicorn", "uvicorn", "hypercorn", "daphne", "granian", "waitress")

TOO_SHORT = (
    "SHUTDOWN_TIMEOUT is %g s, and %s comes after %g s: what runs then is killed; "
    "set SHUTDOWN_TIMEOUT to less than that"
)


@dataclass(frozen=True)
class ServerFacts:
    """What a process knows of its server.

    Attributes:
        name: Of the server, or of the program if the server is unknown.
        worker: The worker class of gunicorn.
        graceful_timeout: Seconds that gunicorn gives a worker to end.
        timeout: Seconds after which gunicorn kills a worker that does not answer.
        max_requests: Requests after which gunicorn replaces a worker; 0 is never.
        enable_threads: False on uWSGI if the threads of the project never get their turn.
        die_on_term: Whether uWSGI has that option.
    """

    name: str
    worker: str = ""
    graceful_timeout: float | None = None
    timeout: float | None = None
    max_requests: int = 0
    enable_threads: bool = True
    die_on_term: bool = False

    def limits(self) -> dict[str, float]:
        """Return after how many seconds gunicorn ends a worker that still runs tasks, by its options."""
        limits = {"gunicorn's --graceful-timeout": self.graceful_timeout}
        if self.max_requests:
            limits["gunicorn's --timeout, when a worker is replaced at its --max-requests,"] = self.timeout
        return {option: limit for option, limit in limits.items() if limit is not None}


def server_facts() -> ServerFacts:
    """Return what is known of the server that is just loading this project."""
    uwsgi: Any = sys.modules.get("uwsgi")  # built in there
    if hasattr(uwsgi, "opt"):
        options = {_text(key) for key in uwsgi.opt}
        return ServerFacts(
            "uwsgi",
            enable_threads=bool(options & {"enable-threads", "threads"}),
            die_on_term="die-on-term" in options,
        )
    if hasattr(sys.modules.get("mod_wsgi"), "subscribe_shutdown"):
        return ServerFacts("mod_wsgi")
    if sys.argv[1:2] == ["runserver"]:
        return ServerFacts("runserver")
    outermost: FrameType | None = None
    for frame in _frames():
        if _package(frame) in SERVERS:
            outermost = frame
    if outermost is None:
        return ServerFacts(Path(sys.argv[0]).name)
    return _gunicorn() if _package(outermost) == "gunicorn" else ServerFacts(_package(outermost))


def warn_of_limits(shutdown_timeout: float) -> None:
    """Warn if the server that is just loading this project ends it before so many seconds are over."""
    try:
        limits = server_facts().limits()
    except Exception as error:  # another version of gunicorn
        log(logging.WARNING, "the settings of gunicorn cannot be read", error=error)
        return
    for option, limit in limits.items():
        if shutdown_timeout >= limit:
            log(logging.WARNING, TOO_SHORT, shutdown_timeout, option, limit)


def only_reloads() -> bool:
    """Tell whether this is the process of runserver that only starts the one that serves, again and again."""
    return (
        sys.argv[1:2] == ["runserver"]
        and "--noreload" not in sys.argv
        and os.environ.get(DJANGO_AUTORELOAD_ENV) != "true"
    )


def _gunicorn() -> ServerFacts:
    """Return gunicorn's settings. It loads the project in a method of an object that holds them."""
    for frame in _frames():
        config = getattr(frame.f_locals.get("self"), "cfg", None)
        if frame.f_code.co_name == "load_config":
            break  # it is just reading them: its configuration file loads the project
        if _package(frame) == "gunicorn" and config is not None:
            return ServerFacts(
                "gunicorn",
                worker=str(config.worker_class_str).rpartition(".")[2],
                graceful_timeout=config.graceful_timeout,
                timeout=config.timeout or None,  # 0 is never
                max_requests=config.max_requests,
            )
    return ServerFacts("gunicorn")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__")).partition(".")[0]


def _text(key: str | bytes) -> str:
    return key.decode() if isinstance(key, bytes) else key
