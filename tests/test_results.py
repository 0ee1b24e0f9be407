"""The results of django.tasks in this process: one lock, an end that is written once, ids."""

import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("django.tasks", reason="django.tasks is new in 6.0")

from django.tasks import TaskResultStatus
from django.tasks.exceptions import TaskResultDoesNotExist

import bgtasks
from bgtasks import results
from bgtasks.results import IDS, Record, Results, Sent, new_result
from tests.gate import BOUND
from tests.testapp import tasks

PACKAGE = str(Path(bgtasks.__file__).parent)


def new_record(of: Results, limit: int = 10) -> Record:
    """Return the record of a task on its way."""
    return of.add(new_result(tasks.noop, "default", [], {}), limit)


def status(of: Results, record: Record) -> TaskResultStatus | None:
    """Return what a reader sees of the record; None if it was forgotten."""
    try:
        result, _ = of.get(record.result.id)
    except TaskResultDoesNotExist:
        return None
    return result.status


def test_the_end_is_written_once() -> None:
    """Of two that end a task, the first one says how."""
    of = Results()
    record = new_record(of)

    assert record.end(TaskResultStatus.SUCCESSFUL, _return_value=42)
    assert not record.end(TaskResultStatus.FAILED, errors=[])

    result, _ = of.get(record.result.id)
    assert (result.status, result.return_value) == (TaskResultStatus.SUCCESSFUL, 42)


def test_a_task_that_begins_after_its_end_stays_as_it_ended() -> None:
    """A shutdown that gives a task up may come just before the function is called.

    1. a slot: takes the task
    2. the shutdown: gives it up, and writes its end
    3. the slot: begins it
    """
    of = Results()
    record = new_record(of)

    assert record.end(TaskResultStatus.FAILED)
    record.begin("bgtasks-default-1")

    assert status(of, record) == TaskResultStatus.FAILED
    assert record.result.worker_ids == []


def test_a_copy_stays_as_it_was() -> None:
    """Another attempt begins after a reader has got the result."""
    of = Results()
    record = new_record(of)
    record.begin("first")
    result, _ = of.get(record.result.id)
    record.begin("second")

    assert (result.worker_ids, result.attempts) == (["first"], 1)


def test_of_many_that_end_one_task_one_is_told_so() -> None:
    """Whoever has written the end sends the signal, so it is sent once."""
    of = Results()
    records = [new_record(of, 1000) for _ in range(200)]
    together = threading.Barrier(4)

    def end_all() -> int:
        together.wait(BOUND)
        return sum(record.end(TaskResultStatus.SUCCESSFUL) for record in records)

    with ThreadPoolExecutor(4) as executor:
        ended = [executor.submit(end_all) for _ in range(4)]

    assert sum(future.result() for future in ended) == 200


def test_the_limit_is_exact_with_many_threads() -> None:
    """Whatever the threads do at once, as many finished results are kept as were asked for, the last ones."""
    of = Results()
    records: list[Record] = []

    def end_many() -> None:
        for _ in range(200):
            record = new_record(of, 10)
            records.append(record)
            record.end(TaskResultStatus.SUCCESSFUL)

    with ThreadPoolExecutor(4) as executor:
        for future in [executor.submit(end_many) for _ in range(4)]:
            future.result()
    ids = [record.result.id for record in records]
    del records[:]
    gc.collect()

    assert len(ids) == len(set(ids)) == 800
    assert sum(known(of, each) for each in ids) == 10


def known(of: Results, result_id: str) -> bool:
    try:
        of.get(result_id)
    except TaskResultDoesNotExist:
        return False
    return True


def test_nobody_reads_what_is_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written and what is copied, is so while no other thread can get the lock."""
    of = Results()
    record = new_record(of)
    got: list[bool] = []
    real = {name: getattr(results, name) for name in ("write", "snapshot")}

    def watch(name: str) -> Any:
        def watched(*args: Any, **kwargs: Any) -> Any:
            got.append(executor.submit(results._lock.acquire, False).result())
            return real[name](*args, **kwargs)

        return watched

    with ThreadPoolExecutor(1) as executor:
        for name in real:
            monkeypatch.setattr(results, name, watch(name))
        record.begin("bgtasks-default-1")
        of.get(record.result.id)
        record.end(TaskResultStatus.SUCCESSFUL)
        of.get(record.result.id)

    assert got == [False] * 5


def test_a_result_that_was_handed_off_is_kept_with_its_engine() -> None:
    """It says where to ask, even while its task is still held by somebody."""
    of = Results()
    record = new_record(of)

    record.hand_off(Sent("engine", "7"))

    _, sent = of.get(record.result.id)
    assert sent == ("engine", "7")


def test_ids_do_not_run_out() -> None:
    """They are made many at a time, and then again."""
    ids = {new_result(tasks.noop, "default", [], {}).id for _ in range(IDS * 2 + 1)}

    assert len(ids) == IDS * 2 + 1


class Interruption(BaseException):
    """What the signal handler raises."""


class Interrupt:
    """A profile function that raises once, as the n-th call in or of the package's code returns."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: Any, event: str, arg: Any) -> None:  # pragma: no cover  # no tracer sees it
        if event.endswith("return") and frame.f_code.co_filename.startswith(PACKAGE):
            self.left -= 1
            if self.left == 0:
                sys.setprofile(None)
                raise Interruption


def interrupt(n: int, of: Results) -> bool:  # pragma: no cover  # the raise upsets the tracer
    """Raise at the n-th point in the life of a result; False if there is none."""
    outside = Interrupt(n)
    sys.setprofile(outside)
    try:
        record = new_record(of)
        record.begin("bgtasks-default-1")
        record.end(TaskResultStatus.SUCCESSFUL)
        of.get(record.result.id)
    except Interruption:
        pass
    finally:
        sys.setprofile(None)
    return outside.left <= 0


def test_a_signal_handler_that_raises_leaves_the_lock_free() -> None:
    """Wherever it raises, other threads go on writing their results."""
    of = Results()
    points = 0

    with ThreadPoolExecutor(1) as executor:
        while interrupt(points + 1, of):
            points += 1
            assert executor.submit(results._lock.acquire, False).result(), points
            executor.submit(results._lock.release).result()

    assert points > 20


def test_a_signal_handler_may_enqueue_in_the_middle_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is re-entrant, and the step goes on afterwards."""
    of = Results()
    inner: list[Record] = []
    real = results.write

    def handle_signal(result: Any, **attributes: Any) -> None:
        monkeypatch.setattr(results, "write", real)
        inner.append(new_record(of))
        inner[0].end(TaskResultStatus.FAILED)
        real(result, **attributes)

    record = new_record(of)
    monkeypatch.setattr(results, "write", handle_signal)
    record.end(TaskResultStatus.SUCCESSFUL)

    assert status(of, record) == TaskResultStatus.SUCCESSFUL
    assert status(of, inner[0]) == TaskResultStatus.FAILED
