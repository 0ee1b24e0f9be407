"""What does each promise cost a task?

The stages of a no-op task, one after the other on one thread, so that no other thread is in the way: what the
spawner does, and what a slot does around the call. Held against all that ``ThreadPoolExecutor`` takes for a
task, which promises none of it. What is left of the ratio in ``throughput.py`` is in these stages.
"""

import gc
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from itertools import pairwise
from time import perf_counter_ns, sleep

from benchmarks.measure import QUICK, Result, interleaved, set_up

NUMBER = 100 if QUICK else 2_000

STAGES = {
    "spawn": "the call: a checked task, a copy of the context, one of CAPACITY places (G1, G2, G8)",
    "take": "taken from the queue, seen as running, its place given back (G2, G5)",
    "context": "the spawner's context, without what is its thread's; language and time zone (G7, G8)",
    "call": "called; known as the current task; listeners, log and caches looked at (G6, G7)",
    "connections": "the thread's database connections looked at (G3)",
    "count": "counted once, by outcome and name, with its times (G5)",
}


def task() -> None:
    """Do nothing."""


def stages() -> dict[str, float]:
    """Return the ns of each stage."""
    from bgtasks.pools import pools
    from bgtasks.queue import Outcome

    slots = pools.default._slots
    assert slots is not None
    slot, queue = slots.all[0], slots.queue
    slots.pause()
    while len(slots._held) < len(slots.all):
        sleep(0.001)
    clock = perf_counter_ns
    gc.collect()
    gc.disable()
    times = [clock()]
    for _ in range(NUMBER):
        bgtasks.spawn("no-op", task)
    times.append(clock())
    taken = [queue.take(slot.account) for _ in range(NUMBER)]
    times.append(clock())
    tasks = [each for each in taken if each is not None]
    assert len(tasks) == NUMBER
    times.append(clock())
    for _ in tasks:
        Context().run(task)
    times.append(clock())
    for each in tasks:
        Context().run(slots.hooks.enter, each.context, each.captured)
    times.append(clock())
    for each in tasks:
        Context().run(slot._call, each)
    times.append(clock())
    for _ in tasks:
        slot._clean()
    times.append(clock())
    for each in tasks:
        queue.end(each, Outcome.SUCCEEDED)
    times.append(clock())
    gc.enable()
    slots.resume()
    spawn, take, _, empty, enter, call, clean, count = (
        (later - earlier) / NUMBER for earlier, later in pairwise(times)
    )
    return {
        "spawn": spawn,
        "take": take,
        "context": enter - empty,
        "call": call - (enter - empty),
        "connections": clean,
        "count": count,
    }


def executor() -> dict[str, float]:
    """Return the ns that ThreadPoolExecutor takes for a task, to its end."""
    start = perf_counter_ns()
    with ThreadPoolExecutor(8) as threads:
        for _ in range(NUMBER):
            threads.submit(task)
    return {"all": (perf_counter_ns() - start) / NUMBER}


def main() -> None:
    """Measure and report."""
    got = interleaved({"bgtasks": stages, "executor": executor}, 1 if QUICK else 31)
    whole = got["executor"]["all"]
    own = got["bgtasks"]
    result = Result(
        "What does each promise cost a task?",
        ["stages of a no-op task", "ns", "x ThreadPoolExecutor's whole task"],
    )
    for stage, text in STAGES.items():
        result.rows.append((f"{stage}: {text}", own[stage], own[stage] / whole))
    every = sum(own.values())
    result.rows.append(("all of them", every, every / whole))
    result.rows.append(("ThreadPoolExecutor(8), with its changes of thread", whole, 1.0))
    result.target("all stages / the executor's whole task", every / whole, at_most=0.33)
    result.notes.append(
        f"If changes of thread and the collection of garbage cost nothing, that is {whole / every:.1f} x as "
        "many tasks as the executor gets through. What is in the way of more is what the promises cost in "
        "Python."
    )
    result.finish()


if __name__ == "__main__":
    set_up()
    import bgtasks

    main()
