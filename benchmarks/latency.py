"""How long from the call to the first instruction of the task, on an idle pool?

One task at a time, each spawned when the last one has ended. A synchronous task is held against
``ThreadPoolExecutor.submit``, an asynchronous one against ``call_soon_threadsafe`` on a loop that sleeps in
a thread of its own: the least that can be done to have something run there.
"""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from time import perf_counter_ns

from benchmarks.measure import QUICK, Result, interleaved, percentile, set_up

NUMBER = 20 if QUICK else 2_000

begun = SimpleQueue[int]()  # when a task began


def task() -> None:
    """Say when it begins."""
    begun.put(perf_counter_ns())


async def atask() -> None:
    """Say when it begins."""
    begun.put(perf_counter_ns())


def latencies(start: Callable[[], object], rest: Callable[[], object]) -> dict[str, float]:
    """Return the figures of tasks that `start` starts, with `rest` after each."""
    times = []
    for _ in range(NUMBER):
        called = perf_counter_ns()
        start()
        times.append(begun.get() - called)
        rest()
    return {"p50": percentile(times, 50), "p99": percentile(times, 99)}


def pool(function: Callable[..., object]) -> dict[str, float]:
    """Measure the pool."""
    return latencies(lambda: bgtasks.spawn("begin", function), bgtasks.drain)


def executor() -> dict[str, float]:
    """Measure ThreadPoolExecutor."""
    with ThreadPoolExecutor(8) as threads:
        return latencies(lambda: threads.submit(task), lambda: threads.submit(int).result())


def loop() -> dict[str, float]:
    """Measure ``call_soon_threadsafe``."""
    own = asyncio.new_event_loop()
    thread = threading.Thread(target=own.run_forever)
    thread.start()
    settled = threading.Event()

    def rest() -> None:
        settled.clear()
        own.call_soon_threadsafe(settled.set)
        settled.wait()

    try:
        return latencies(lambda: own.call_soon_threadsafe(task), rest)
    finally:
        own.call_soon_threadsafe(own.stop)
        thread.join()
        own.close()


def main() -> None:
    """Measure and report."""
    got = interleaved(
        {
            "bgtasks, sync": lambda: pool(task),
            "ThreadPoolExecutor(8)": executor,
            "bgtasks, async": lambda: pool(atask),
            "call_soon_threadsafe": loop,
        }
    )
    result = Result(
        "How long from the call to the first instruction of the task?",
        ["idle", "p50 µs", "p99 µs", "x ThreadPoolExecutor", "x call_soon_threadsafe"],
    )
    threads, bare = got["ThreadPoolExecutor(8)"], got["call_soon_threadsafe"]
    for name, each in got.items():
        result.rows.append(
            (
                name,
                each["p50"] / 1000,
                each["p99"] / 1000,
                each["p50"] / threads["p50"],
                each["p50"] / bare["p50"],
            )
        )
    result.target("sync / ThreadPoolExecutor", got["bgtasks, sync"]["p50"] / threads["p50"], at_most=1.2)
    result.target("async / call_soon_threadsafe", got["bgtasks, async"]["p50"] / bare["p50"], at_most=2.0)
    result.finish()


if __name__ == "__main__":
    set_up()
    import bgtasks

    main()
