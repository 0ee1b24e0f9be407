"""What does the call cost its caller? ``spawn`` against ``ThreadPoolExecutor.submit`` and ``create_task``.

Every call is timed by itself. "Busy": all slots hold a task, so the call only queues. "Idle, one by one":
nothing runs, and the next call comes when the last task has ended, so each call has to wake a thread. "Idle,
in bursts": of 20 calls at once, of which the first has to. What waking a sleeping thread costs by itself is
measured beside it, as the least that any call can cost that hands work to one.
"""

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from time import perf_counter_ns

from benchmarks.measure import QUICK, Result, interleaved, percentile, set_up, timed

NUMBER = 200 if QUICK else 20_000
ONE_BY_ONE = 40 if QUICK else 2_000
DEEP = 10_000 if QUICK else 1_000_000
BURST = 20


def figures(times: list[int]) -> dict[str, float]:
    """Return the median and the 99th percentile."""
    return {"p50": percentile(times, 50), "p99": percentile(times, 99)}


def task(_number: int) -> None:
    """Do nothing."""


async def atask(_number: int) -> None:
    """Do nothing."""


def busy_spawn(number: int = NUMBER) -> dict[str, float]:
    """Time ``spawn`` while every slot holds a task."""
    gate = threading.Event()
    for _ in range(8):
        bgtasks.spawn("held", gate.wait)
    while bgtasks.stats()["default"].queued:
        pass
    try:
        return figures(timed(lambda: bgtasks.spawn("no-op", task, 1), number))
    finally:
        gate.set()
        bgtasks.drain()


def busy_submit() -> dict[str, float]:
    """Time ``submit`` while every thread of the executor holds a task."""
    gate = threading.Event()
    with ThreadPoolExecutor(8) as executor:
        for _ in range(8):
            executor.submit(gate.wait)
        try:
            return figures(timed(lambda: executor.submit(task, 1), NUMBER))
        finally:
            gate.set()


def create_task() -> dict[str, float]:
    """Time ``create_task``, letting the loop run what was created after each burst."""

    async def main() -> list[int]:
        times: list[int] = []
        for _ in range(NUMBER // BURST):
            times += timed(lambda: asyncio.create_task(atask(1)), BURST)
            await asyncio.sleep(0)
        return times

    return figures(asyncio.run(main()))


def idle_spawn(burst: int) -> dict[str, float]:
    """Time ``spawn`` on an idle pool, so many calls at once."""
    times: list[int] = []
    for _ in range(ONE_BY_ONE // burst):
        times += timed(lambda: bgtasks.spawn("no-op", task, 1), burst)
        bgtasks.drain()
    return figures(times)


def idle_submit(burst: int) -> dict[str, float]:
    """Time ``submit`` on an idle executor, so many calls at once."""
    times: list[int] = []
    with ThreadPoolExecutor(8) as executor:
        futures: list[Future[None]] = []
        for _ in range(ONE_BY_ONE // burst):
            times += timed(lambda: futures.append(executor.submit(task, 1)), burst)
            while futures:
                futures.pop().result()
    return figures(times)


def wake() -> dict[str, float]:
    """Time the waking of a sleeping thread, and nothing else: the release of a lock that it waits for."""
    lock, done = threading.Lock(), SimpleQueue[None]()
    ended = False

    def sleeper() -> None:
        while True:
            lock.acquire()
            if ended:
                return
            done.put(None)

    lock.acquire()
    thread = threading.Thread(target=sleeper)
    thread.start()
    times: list[int] = []
    for _ in range(ONE_BY_ONE):
        times += timed(lock.release, 1)
        done.get()
    ended = True
    lock.release()
    thread.join()
    return figures(times)


def dropped_spawn() -> dict[str, float]:
    """Time ``spawn`` on a full queue."""
    gate = threading.Event()
    pool = bgtasks.pools["small"]
    while pool.spawn("held", gate.wait):
        pass
    try:
        return figures(timed(lambda: pool.spawn("no-op", task, 1), NUMBER))
    finally:
        gate.set()
        pool.drain()


def at_depth(depth: int) -> float:
    """Return the median of ``spawn`` in ns while so many tasks wait."""
    gate = threading.Event()
    for _ in range(8):
        bgtasks.spawn("held", gate.wait)
    for _ in range(depth):
        bgtasks.spawn("no-op", task, 1)
    try:
        return percentile(timed(lambda: bgtasks.spawn("no-op", task, 1), 5_000), 50)
    finally:
        gate.set()
        bgtasks.drain()


def depths() -> dict[str, float]:
    """Time ``spawn`` at two depths of the queue, one right after the other."""
    shallow, deep = at_depth(10), at_depth(DEEP)
    return {"p50": deep, "shallow": shallow, "ratio": deep / shallow}


def main() -> None:
    """Measure and report."""
    result = Result(
        "What does the call cost its caller?",
        ["", "p50 µs", "p99 µs", "x ThreadPoolExecutor.submit", "x create_task"],
    )
    start = perf_counter_ns()
    got = interleaved(
        {
            "spawn, pool busy": busy_spawn,
            "submit, executor busy": busy_submit,
            "create_task": create_task,
            "spawn, pool idle, one by one": lambda: idle_spawn(1),
            "submit, executor idle, one by one": lambda: idle_submit(1),
            "spawn, pool idle, in bursts": lambda: idle_spawn(BURST),
            "submit, executor idle, in bursts": lambda: idle_submit(BURST),
            "waking a thread, nothing else": wake,
            "spawn, queue full (dropped)": dropped_spawn,
        }
    )
    for name, each in got.items():
        peer = got["submit, executor busy"]
        for state in ("idle, one by one", "idle, in bursts"):
            if name.endswith(state):
                peer = got[f"submit, executor {state}"]
        if name.startswith("waking"):
            peer = got["submit, executor idle, one by one"]
        result.rows.append(
            (
                name,
                each["p50"] / 1000,
                each["p99"] / 1000,
                each["p50"] / peer["p50"],
                each["p50"] / got["create_task"]["p50"],
            )
        )
    busy, idle = got["spawn, pool busy"]["p50"], got["spawn, pool idle, one by one"]["p50"]
    result.target("busy: p50 / submit", busy / got["submit, executor busy"]["p50"], at_most=0.45)
    result.target("busy: p50 / create_task", busy / got["create_task"]["p50"], at_most=1.4)
    result.target(
        "idle, one by one: p50 / submit", idle / got["submit, executor idle, one by one"]["p50"], at_most=1.05
    )
    deep = interleaved({"depth": depths}, rounds=3)["depth"]
    result.target(f"{DEEP:,} waiting / 10 waiting", deep["ratio"], at_most=1.2)
    result.target(
        "dropped / accepted on a busy pool",
        got["spawn, queue full (dropped)"]["p50"] / got["spawn, pool busy"]["p50"],
        at_most=1.0,
    )
    least = got["waking a thread, nothing else"]["p50"] / got["submit, executor idle, one by one"]["p50"]
    result.notes.append(
        f"To wake a sleeping thread costs {least:.2f} x a whole `submit` on an idle executor, before either "
        "of the two has done anything else. No call that hands one task to a sleeping thread can cost less."
    )
    result.extra["seconds"] = (perf_counter_ns() - start) / 1e9
    result.finish()


if __name__ == "__main__":
    set_up()
    import bgtasks

    main()
