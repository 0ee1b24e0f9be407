"""Run a task at once, in the code that spawns it: the MODE "inline", and a tool of bgtasks.testing."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Coroutine
from concurrent.futures import Executor, Future
from contextvars import Context
from threading import Thread
from typing import Any

from asgiref.current_thread_executor import CurrentThreadExecutor
from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext, sync_to_async

from bgtasks.clock import monotonic
from bgtasks.context import fill, fork
from bgtasks.core.figures import Outcome
from bgtasks.core.queue import TaskQueue
from bgtasks.core.task import GENERATORS, Hooks, Task, as_coroutine, current


def run(queue: TaskQueue, hooks: Hooks, task: Task) -> None:
    """Run `task` to its end, where the caller's own ORM calls run: inside its transaction.

    What the task raises goes up into the code that has spawned it. It counts like any other task.
    """
    outcome = Outcome.FAILED
    try:
        while not _try(hooks, task):
            pass
        outcome = Outcome.SUCCEEDED
    finally:
        queue.count_inline(task, outcome)


def _try(hooks: Hooks, task: Task) -> bool:
    """Run `task`; False if it has failed and is to be tried again, which happens at once."""
    task.started_at, task.stop_reason = monotonic(), None
    try:
        _run(hooks, task)
    except BaseException as error:
        if not _tries_again(task, error):
            raise
        task.policy.tries += 1
        hooks.retried(task, task.policy.tries, error, 0.0, None)
        return False
    return True


def _tries_again(task: Task, error: BaseException | None) -> bool:
    return error is not None and task.policy.delay_after(Outcome.FAILED, error, task.started_at) is not None


def _run(hooks: Hooks, task: Task) -> None:
    loop = _running_loop()
    if loop is None and not task.asynchronous:
        context = task.context.copy()  # of each try
        context.run(fork)
        context.run(_call, hooks, task)
        return
    if loop is None:
        # The loop runs on another thread, and its ORM calls on this one, which serves them meanwhile.
        here = CurrentThreadExecutor(getattr(AsyncToSync.executors, "current", None))
        thread, ended = _start(hooks, task, here)
        here.run_until_future(ended)
    else:
        # Neither may a plain function run on the thread of a running loop, where Django's ORM refuses to
        # work, nor can that loop run the coroutine while it waits for us here. So another thread does, and
        # its ORM calls go where those of the caller would.
        thread, ended = _start(hooks, task, _executor_of_caller(loop))
    thread.join()
    ended.result()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _call(hooks: Hooks, task: Task) -> None:
    """Call a plain function on this thread, on which no loop runs."""
    current.set(weakref.ref(task))
    told = hooks.watched()
    if told:
        hooks.started(task)
    error: BaseException | None = None
    try:
        result = task.call()
        coroutine = as_coroutine(result)
        if coroutine is not None:
            _finish(hooks, task, coroutine)
        else:
            _refuse_generator(task, result)
    except BaseException as exception:
        error = exception
        raise
    finally:
        if told and _tries_again(task, error):
            hooks.tried(task, error)
        elif told:
            hooks.finished(task, Outcome.SUCCEEDED if error is None else Outcome.FAILED, error)
        del error  # its traceback refers to this frame, and this frame to it


def _finish(hooks: Hooks, task: Task, coroutine: Coroutine[Any, Any, object]) -> None:
    """Run the `coroutine` that the task's plain function has returned."""
    here = CurrentThreadExecutor(getattr(AsyncToSync.executors, "current", None))
    thread, ended = _start(hooks, task, here, coroutine)
    here.run_until_future(ended)
    thread.join()
    ended.result()


def _start(
    hooks: Hooks, task: Task, executor: Executor, coroutine: Coroutine[Any, Any, object] | None = None
) -> tuple[Thread, Future[None]]:
    """Run the task, or the `coroutine` it goes on as, on a loop and a thread of its own."""
    ended: Future[None] = Future()

    def call() -> None:
        fill(task.context, task.captured)  # propagators restore what the caller has
        current.set(weakref.ref(task))
        asyncio.run(_on_new_loop(hooks, task, executor, coroutine))

    def run() -> None:
        try:
            Context().run(call)
        except BaseException as error:
            ended.set_exception(error)
        else:
            ended.set_result(None)

    thread = Thread(target=run, name="bgtasks-inline", daemon=True)
    thread.start()
    return thread, ended


async def _on_new_loop(
    hooks: Hooks, task: Task, executor: Executor, coroutine: Coroutine[Any, Any, object] | None
) -> None:
    async with ThreadSensitiveContext(executor=executor):
        if coroutine is not None:
            await coroutine
        elif task.asynchronous:
            await _tell_and_await(hooks, task)
        else:
            await sync_to_async(_call)(hooks, task)


async def _tell_and_await(hooks: Hooks, task: Task) -> None:
    told = hooks.watched()
    if told:
        await sync_to_async(hooks.started)(task)
    error: BaseException | None = None
    try:
        await task.call()
    except BaseException as exception:
        error = exception
        raise
    finally:
        if told and _tries_again(task, error):
            await sync_to_async(hooks.tried)(task, error)
        elif told:
            outcome = Outcome.SUCCEEDED if error is None else Outcome.FAILED
            await sync_to_async(hooks.finished)(task, outcome, error)
        del error


def _refuse_generator(task: Task, result: object) -> None:
    if type(result) in GENERATORS:
        raise TypeError(f"task {task.name!r} returned a generator; its body would never run")


def _executor_of_caller(loop: asyncio.AbstractEventLoop) -> Executor:
    """Return where ``sync_to_async`` would run a thread-sensitive function now, in asgiref's own order."""
    executor: Executor | None = getattr(AsyncToSync.executors, "current", None)
    if executor is None:
        context = SyncToAsync.thread_sensitive_context.get(None)
        executor = SyncToAsync.context_to_thread_executor.get(context) if context is not None else None
    if executor is None:
        executor = AsyncToSync.loop_thread_executors.get(loop)
    return SyncToAsync.single_thread_executor if executor is None else executor
