"""What does the journal cost? A pool with BGTASKS_JOURNAL against the same pool without it.

"Busy": all slots hold a task, so the call only queues. Throughput: no-op tasks, spawned one after the other
by one thread, until the last one has ended. The folder of the journal is in memory (/dev/shm), as /run is, if
there is such a thing.
"""

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import QUICK, Result, interleaved, percentile, set_up, timed

NUMBER = 200 if QUICK else 20_000
TASKS = 500 if QUICK else 50_000
MEMORY = Path("/dev/shm")


def task(_number: int) -> None:
    """Do nothing."""


def measure() -> dict[str, float]:
    """Return the µs of a busy call, and tasks/s."""
    gate = threading.Event()
    for _ in range(8):
        bgtasks.spawn("held", gate.wait)
    while bgtasks.stats()["default"].queued:
        pass
    try:
        times = timed(lambda: bgtasks.spawn("no-op", task, 1), NUMBER)
    finally:
        gate.set()
        bgtasks.drain()
    start = time.perf_counter()
    for _ in range(TASKS):
        bgtasks.spawn("no-op", task, 1)
    assert bgtasks.drain()
    return {"busy": percentile(times, 50) / 1000, "rate": TASKS / (time.perf_counter() - start)}


def measure_with_journal() -> Mapping[str, float]:
    """Measure while the tasks are counted in a file."""
    with TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        with override_settings(BGTASKS_JOURNAL={"DIR": folder}):
            bgtasks.spawn("no-op", task, 1)
            while not any(b"no-op" in path.read_bytes() for path in Path(folder).glob("*.journal")):
                pass  # a thread makes the file
            return measure()


def main() -> None:
    """Measure, print, keep."""
    measures: dict[str, Callable[[], Mapping[str, float]]] = {
        "without a journal": measure,
        "with a journal": measure_with_journal,
    }
    found = interleaved(measures)
    result = Result("What does the journal cost?", ["", "busy call, µs", "tasks/s"])
    result.rows = [(name, each["busy"], each["rate"]) for name, each in found.items()]
    off, on = found["without a journal"], found["with a journal"]
    result.target("µs that the busy call costs more", on["busy"] - off["busy"], at_most=0.3)
    result.target("tasks/s with a journal / without", on["rate"] / off["rate"], at_least=0.9)
    result.finish()


if __name__ == "__main__":
    set_up()
    from django.test import override_settings

    import bgtasks

    main()
