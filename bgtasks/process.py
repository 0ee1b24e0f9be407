"""The life of the process: its exit, its forks, and servers that announce a shutdown in their own ways."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from asgiref.sync import AsyncToSync, SyncToAsync

from bgtasks.clock import monotonic
from bgtasks.core.drainer import Drainer
from bgtasks.core.log import log
from bgtasks.greenlets import patched

EXIT_ATTEMPTS = 100  # at a report of what is left, while signal handlers raise
LOOK_INTERVAL = 1.0  # seconds between two looks for an event loop without a lifespan

_threadlocal = SyncToAsync.threadlocal  # where asgiref notes for which loop a thread works


WORK_HORSE = (
    "a job of RQ's forking worker spawns tasks, and its process ends without exit hooks as the job returns: "
    "what has not ended by then is lost; use rq.SimpleWorker, or enqueue a job in place of the task"
)
MULE = (
    "a mule or spooler of uWSGI spawns tasks, and uWSGI ends it without waiting for them: what has not ended "
    "by then is lost; call bgtasks.drain() at the end of each message"
)
COMMANDS = {"manage.py", "django-admin", "django-admin.py"}
NO_DRAIN = (
    "a command has ended before its tasks, which got no longer than SHUTDOWN_TIMEOUT: "
    "end it with bgtasks.drain(), which waits for all of them"
)


def is_command() -> bool:
    """Tell whether this process is a management command, ``runserver`` included."""
    script = Path(sys.argv[0])
    return script.name in COMMANDS or script.parts[-2:] == ("django", "__main__.py")  # python -m django


class Lifespan:
    """Whether this process will hear of its end.

    On uvicorn no exit hook runs: without ``bgtasks.asgi.lifespan`` what is queued is lost at each deploy. Nor
    does one run in the processes of some workers of other queues.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Know of nothing: this is a forked child, which may end in another way."""
        self.settled = False  # a lifespan was seen, or what is lost was reported
        self.look_at = 0.0  # monotonic seconds, from when on a spawn has to ``look``

    def look(self, drainer: Drainer) -> None:
        """Report once that this process spawns a task, and will not hear of its end.

        That is so in some job workers; and on an event loop, as long as no lifespan was seen. It would be a
        tenth of what a spawn costs, so it is done once a second at most.
        """
        if self.look_at == 0.0 and (message := _job_worker()) is not None:
            self.settled = True
            log(logging.WARNING, message)
        if self.settled:
            self.look_at = inf
            return
        self.look_at = monotonic() + LOOK_INTERVAL
        if "uvicorn.server" not in sys.modules:
            return  # other servers run the exit hooks, and so does a command under asyncio.run
        # Of this thread or, in a sync view under ASGI, of the thread that waits for it.
        loop = asyncio._get_running_loop() or vars(_threadlocal).get("main_event_loop")
        if loop is None or loop is drainer.loop.running:
            return
        # That of an async view under WSGI lives for one request, and its thread remembers it afterwards.
        if loop in AsyncToSync.loop_thread_executors or not loop.is_running():
            return
        self.settled = True
        log(
            logging.WARNING,
            "tasks are spawned on an event loop, and the server has not announced its lifespan: "
            "under uvicorn they would be lost at shutdown; write in asgi.py: "
            "application = bgtasks.asgi.lifespan(get_asgi_application())",
        )


def _job_worker() -> str | None:
    """Return what is to be said of a worker of another queue whose processes end without exit hooks."""
    uwsgi: Any = sys.modules.get("uwsgi")  # built in there
    if hasattr(uwsgi, "mule_id") and (uwsgi.mule_id() or uwsgi.i_am_the_spooler()):
        return MULE
    frame: FrameType | None = sys._getframe() if "rq" in sys.modules else None
    while frame is not None:
        # In a child that was forked or spawned for one job. It ends with os._exit.
        if frame.f_code.co_name == "main_work_horse" and frame.f_globals["__name__"].startswith("rq."):
            return WORK_HORSE
        frame = frame.f_back
    return None


lifespan = Lifespan()


def has_forked() -> bool:
    """Tell whether this process may have threads: False in uWSGI before it forks its workers.

    It loads the application, unless told not to (``lazy-apps``), and then forks in C, past Python's hooks.
    Threads started before would be missing in the workers. They could not even run here, since uWSGI keeps
    the GIL.
    """
    uwsgi: Any = sys.modules.get("uwsgi")  # built in there
    if not hasattr(uwsgi, "worker_id"):
        return True
    # A worker has a number. A mule or a spooler has none, but neither is it the master; 0 is no master.
    return bool(uwsgi.worker_id()) or uwsgi.masterpid() not in {0, os.getpid()}


def may_have_threads() -> bool:
    """Tell whether the drainer may start threads: not before uWSGI forks, and no greenlets of eventlet."""
    return has_forked() and patched() != "eventlet"


class Forking(Protocol):
    """What prepares for a fork, and goes on after it."""

    def before_fork(self) -> None:
        """Called in the parent, before."""

    def after_fork_in_parent(self) -> None:
        """Called in the parent, after."""


class ProcessHooks:
    """The hooks of this process, which are installed once."""

    def __init__(
        self,
        shutdown: Callable[..., bool],
        start: Callable[[], None],
        after_fork_in_child: Callable[[], None],
    ) -> None:
        self._shutdown = shutdown  # of all pools
        self._start = start  # starts the drainer
        self._after_fork_in_child = after_fork_in_child
        self._installed = False

    def install(self, *forking: Forking) -> None:
        """Have the pools shut down at exit, and `forking` called at each fork, the last one first."""
        if self._installed:
            return
        self._installed = True
        if hasattr(os, "register_at_fork"):
            for each in forking:
                os.register_at_fork(before=each.before_fork, after_in_parent=each.after_fork_in_parent)
            os.register_at_fork(after_in_child=self._on_fork_in_child)
        self._listen_to_celery()
        self._install_at_exit()
        if not has_forked():
            # With its threads from the start, a worker is not caught by a signal while it starts them. If
            # somebody replaces this hook, the worker's first spawn starts them.
            uwsgi: Any = sys.modules["uwsgi"]
            other_hook = getattr(uwsgi, "post_fork_hook", lambda: None)
            uwsgi.post_fork_hook = partial(self._on_uwsgi_fork, other_hook)
        # Inside Apache, where a module of that name is built in, neither of them runs reliably.
        mod_wsgi: Any = sys.modules.get("mod_wsgi")
        if hasattr(mod_wsgi, "subscribe_shutdown"):
            mod_wsgi.subscribe_shutdown(self._on_mod_wsgi_shutdown)

    def start(self) -> None:
        """Start the drainer. If that fails, requests can still be served."""
        try:
            self._start()
        except Exception as error:  # the machine has no thread or no file descriptor left
            log(logging.ERROR, "the drainer could not be started; the next spawn tries again", error=error)

    def _install_at_exit(self) -> None:
        """Have the pools shut down before anything else, as the interpreter begins to exit.

        At atexit time sync_to_async and to_thread fail already. Before that, the interpreter calls
        ``threading._shutdown``. Its own hooks run newest first, and that of concurrent.futures.process, which
        ends process pools, is newer than any of ours: it is registered when a task imports that module.
        """
        module: Any = threading
        shut_down_threading: Callable[[], object] = getattr(module, "_shutdown", lambda: None)

        def shut_down() -> None:
            self._on_exit()
            atexit.unregister(self._on_exit)
            shut_down_threading()

        module._shutdown = shut_down
        atexit.register(self._on_exit)  # if nobody calls that, or somebody replaces it, as gevent does

    def _on_exit(self) -> None:
        try:
            if not self._shutdown() and is_command():
                log(logging.WARNING, NO_DRAIN)
        except BaseException:
            # A second Ctrl-C, or a signal handler that raises SystemExit: nobody wants to wait any longer. A
            # third does not cost the account: what is left to do takes a moment, and goes on each time.
            for _ in range(EXIT_ATTEMPTS):
                with contextlib.suppress(BaseException):
                    self._shutdown(timeout=0)
                    break
            raise

    def _on_fork_in_child(self) -> None:
        self._after_fork_in_child()
        lifespan.forget()
        self._listen_to_celery()  # it may have been imported since

    def _listen_to_celery(self) -> None:
        """Shut down with a child of Celery's prefork pool, which ends without exit hooks."""
        signals: Any = sys.modules.get("celery.signals")
        if signals is not None:
            signals.worker_process_shutdown.connect(
                self._on_celery_shutdown, dispatch_uid="bgtasks", weak=False
            )

    def _on_celery_shutdown(self, **_named: object) -> None:
        self._shutdown()

    def _on_uwsgi_fork(self, other_hook: Callable[[], object]) -> None:
        other_hook()
        self.start()

    def _on_mod_wsgi_shutdown(self, _event: str, **_payload: object) -> None:
        self._shutdown()
