"""A whole pool beside a model of it: real threads, a real loop, and a stub for the engine it hands off to.

Each rule is one thing that can happen to a pool. After each of them, once the pool is at rest, the guarantees
G1 to G5 of the design are looked at: what spawn answered, how many wait, how many run, what was said of
drops, and the sum of it all.
"""

import asyncio
import logging
from collections import Counter
from concurrent.futures import Future
from dataclasses import dataclass, field
from time import monotonic, sleep
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import bgtasks.core.shutdown
from bgtasks.core.figures import Outcome
from bgtasks.repeats import repeats
from bgtasks.signals import task_dropped
from tests.gate import BOUND, wait_until
from tests.handoff.kit import HandoffCore
from tests.pool import balance, counted, receiving

CAPACITY = 8
HIGH, LOW = 6, 4  # queued tasks at which a pool of that capacity overflows, and that it keeps
CONN_MAX = 3
RUNNERS = CONN_MAX - 1  # the other slot is the mover


@dataclass(eq=False)
class Work:
    """A task that ends as, and when, the machine says."""

    name: str
    asynchronous: bool
    end: "Future[None]" = field(default_factory=Future)
    runs: int = 0
    overran: bool = False

    def function(self) -> None:
        self.runs += 1
        self.end.result(BOUND)

    async def coroutine(self) -> None:
        self.runs += 1
        await wait_for(self.end)


async def wait_for(future: "Future[None]") -> None:
    """Wait for `future`, and leave it alone if the waiting is cancelled."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(ended.set))
    await ended.wait()
    future.result(0)


class PoolMachine(RuleBasedStateMachine):
    """The model is two lists, a counter for each outcome, and what is to be so but is not yet."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(bgtasks.core.shutdown, "STOP_PATIENCE", 0.01)
        self.open()

    def open(self) -> None:
        repeats.flush()  # each name is new again
        self.receiving = receiving(task_dropped)
        self.dropped_signals = self.receiving.__enter__()
        self.core = HandoffCore(capacity=CAPACITY, conn_max=CONN_MAX)
        self.core.__enter__()
        self.core.wait_rest()
        self.waiting: list[Work] = []
        self.running: list[Work] = []
        self.all: list[Work] = []
        self.ended: Counter[str] = Counter()
        self.spawned = 0
        self.is_open = True
        self.is_paused = False
        self.is_mover_held = False

    def close(self) -> None:
        if self.is_mover_held:
            self.core.release_mover()
        for work in self.all:
            if not work.end.done():
                work.end.set_result(None)
        self.core.__exit__(None, None, None)
        self.receiving.__exit__(None, None, None)

    def teardown(self) -> None:
        self.close()
        self.patch.undo()

    def step(self) -> None:
        """Do in the model what the pool does by itself."""
        while self.waiting and len(self.running) < RUNNERS and not self.is_paused:
            self.running.append(self.waiting.pop(0))
        if len(self.waiting) >= HIGH and not self.is_mover_held:
            self.ended["handed_off"] += len(self.waiting) - LOW
            del self.waiting[LOW:]

    def put(self, work: Work) -> None:
        self.spawned += 1
        accepts = self.is_open and len(self.waiting) < CAPACITY
        if accepts:
            self.waiting.append(work)
            self.all.append(work)
        else:
            self.ended["dropped"] += 1

        assert self.core.spawn(work.name, work.coroutine if work.asynchronous else work.function) is accepts

    # What can happen.

    @rule(asynchronous=st.booleans())
    def spawn(self, asynchronous: bool) -> None:
        self.put(Work(f"task-{self.spawned}", asynchronous))

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed"]))
    def end(self, data: Any, outcome: str) -> None:
        work = data.draw(st.sampled_from(self.running))
        self.running.remove(work)
        self.ended["timed_out" if work.overran and work.asynchronous else outcome] += 1
        if outcome == "succeeded":
            work.end.set_result(None)
        else:
            work.end.set_exception(ValueError("failed"))

    @precondition(lambda self: any(work.asynchronous for work in self.running))
    @rule(data=st.data(), timed_out=st.booleans())
    def cancel(self, data: Any, timed_out: Any) -> None:
        """Its TASK_TIMEOUT is over, or somebody on the loop cancels it."""
        work = data.draw(st.sampled_from([work for work in self.running if work.asynchronous]))
        self.running.remove(work)
        self.ended["timed_out" if timed_out else "failed"] += 1
        [task] = [task for task in self.core.queue.running() if task.name == work.name]
        wait_until(lambda: task.runner is not None)
        [slot] = [slot for slot in self.core.slots.all if slot.task is task]
        if timed_out:
            self.core.drainer.loop.call_soon(slot.stop_task, task, Outcome.TIMED_OUT)
        else:
            self.core.drainer.loop.call_soon(task.runner.cancel)

    @precondition(lambda self: any(not work.asynchronous for work in self.running))
    @rule(data=st.data())
    def overrun(self, data: Any) -> None:
        """A plain function is past its TASK_TIMEOUT, which changes nothing but a figure."""
        work = data.draw(st.sampled_from([work for work in self.running if not work.asynchronous]))
        work.overran = True
        [task] = [task for task in self.core.queue.running() if task.name == work.name]
        task.overran = True

    @rule()
    def drain(self) -> None:
        assert self.core.pool.drain(0) is not bool(self.waiting or self.running)

    @precondition(lambda self: self.is_open)
    @rule()
    def pause(self) -> None:
        self.core.queue.pause()
        self.is_paused = True

    @precondition(lambda self: self.is_open)
    @rule()
    def resume(self) -> None:
        self.core.queue.resume()
        self.is_paused = False

    @precondition(lambda self: self.is_open)
    @rule(held=st.booleans())
    def hold_mover(self, held: Any) -> None:
        """The engine is slow, so that the queue fills up; or it goes on."""
        if held and not self.is_mover_held:
            self.core.start()  # after a fork the next spawn would, and with it start another mover
            self.core.hold_mover()
        elif self.is_mover_held and not held:
            self.core.release_mover()
        self.is_mover_held = held

    @precondition(lambda self: not self.is_mover_held)
    @rule(asynchronous=st.none() | st.booleans())
    def fork(self, asynchronous: bool | None) -> None:
        """As os.fork calls its hooks, perhaps with a spawn by another thread in the middle."""
        self.core.forks.before_fork()
        if asynchronous is not None:
            self.put(Work(f"task-{self.spawned}", asynchronous))
        self.core.forks.after_fork_in_parent()

    @precondition(lambda self: self.is_open)
    @rule()
    def shutdown(self) -> None:
        """Out of time at once: what waits is handed off or cancelled, what runs is cancelled."""
        before = self.core.stats()
        left = len(self.waiting) + len(self.running)
        self.is_open = self.is_paused = False

        cancelled = self.core.close(0)

        stats = self.core.stats()
        self.ended["cancelled"] += stats.cancelled - before.cancelled
        self.ended["handed_off"] += stats.handed_off - before.handed_off
        self.waiting, self.running = [], []
        assert cancelled == stats.cancelled - before.cancelled
        assert (cancelled or 0) + stats.handed_off - before.handed_off == left
        assert bool(self.core.logs.of("was shut down with")) is bool(cancelled)

    @precondition(lambda self: not self.is_open)
    @rule()
    def reopen(self) -> None:
        self.close()
        self.open()

    # What holds after each.

    @invariant()
    def guarantees_hold(self) -> None:
        self.step()
        stats = self.rest()

        assert stats.queued <= CAPACITY  # G2
        assert stats.running <= RUNNERS < CONN_MAX  # G3; the mover holds a connection as well
        assert len(self.dropped_signals) == self.ended["dropped"]  # G4
        assert counted(self.core.logs.of(" dropped")) == self.ended["dropped"]  # every name is new, and said
        assert stats.spawned == balance(stats) == self.spawned  # G5
        assert (stats.queued, stats.running) == (len(self.waiting), len(self.running))
        assert stats.stuck == sum(work.overran for work in self.running)
        for name in ("succeeded", "failed", "timed_out", "cancelled", "dropped", "handed_off"):
            assert getattr(stats, name) == self.ended[name]
        engine = Counter(self.core.engine.taken)
        assert all(work.runs + engine[work.name] <= 1 for work in self.all)
        assert {task.name for task in self.core.queue.running()} == {work.name for work in self.running}
        errors = self.core.logs.above(logging.ERROR)
        assert len(errors) == self.ended["failed"] + self.ended["timed_out"]

    def rest(self) -> Any:
        """Wait until the pool is where the model is, and return its figures."""
        deadline = monotonic() + BOUND
        while True:
            stats = self.core.stats()
            running = len(self.running), sum(work.runs for work in self.running)
            if (stats.queued, stats.running, len(self.running)) == (len(self.waiting), *running):
                break
            assert monotonic() < deadline, (stats, self.waiting, self.running)
            sleep(0)
        if self.is_open and not self.is_mover_held:
            self.core.wait_rest()
        return self.core.stats()


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30)
PoolMachine.TestCase.__doc__ = (
    "Whatever happens to a pool, and in whatever order, G1 to G5 hold after each step."
)
TestPoolAgainstModel = PoolMachine.TestCase
