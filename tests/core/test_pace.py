"""The pace of plain functions: when slots are slowed down, by how much, and when not."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from time import monotonic, thread_time
from typing import Any

import pytest

from bgtasks.core.drainer import Drainer
from bgtasks.core.pace import GRAIN, STEP, Pace
from bgtasks.monitoring import pace
from bgtasks.monitoring.pace import (
    INTERVAL_MAX,
    LATE,
    LATE_OVER,
    LOOK_FOR,
    PERIOD,
    RETRY,
    SHARE,
    SMALL,
    TRIAL,
    WANTED,
    MeasuredPace,
    RunQueue,
    processor_time,
)
from tests.gate import BOUND, Gate, wait_until
from tests.pool import BackgroundThread, Core, wait_idle

pytestmark = pytest.mark.skipif(not pace.CAN_MEASURE, reason="needs the processor time of each thread")


class Process:
    """A process as the drainer sees it: shows it to a `Pace`, look by look."""

    def __init__(self, *, slots: float = 0.0, ended: int = 0) -> None:
        self.pace = MeasuredPace(Drainer())
        self.now = self.others = 0.0
        self.slots = slots
        self.ended = ended
        self.again = True  # it is to be looked at again
        self._rest = 0.0  # of a task that has not ended
        self.pace.look(0.0, late=0.0, over=LATE_OVER, slots=slots, others=0.0, ended=ended)

    def run(
        self, seconds: float, *, late: float, slots: float, others: float, each: float = 0.002
    ) -> Iterator[float]:
        """Let time pass, in which slots and others use parts of a processor, and yield the intervals."""
        for _ in range(round(seconds / PERIOD)):
            self.now += PERIOD
            self.slots += slots * PERIOD
            self.others += others * PERIOD
            done, self._rest = divmod(self._rest + slots * PERIOD, each)
            self.ended += int(done)
            self.again = self.pace.look(
                self.now,
                late=late,
                over=LATE_OVER,
                slots=self.slots,
                others=self.others,
                ended=self.ended,
            )
            yield self.pace.interval

    def starve(self, each: float = 0.002) -> float:
        """Let slots keep others from the GIL until they are slowed down, and return the seconds it took."""
        before = self.now
        assert any(self.run(1, late=LATE * 20, slots=0.99, others=0.005, each=each))
        return self.now - before


# Who is slowed down.


@pytest.mark.parametrize("each", [0.001, 0.002, 0.03])
def test_slots_that_keep_others_from_the_gil_are_given_a_share(each: float) -> None:
    """They start their tasks at such intervals that they use SHARE of a processor, whatever a task takes."""
    process = Process()

    process.starve(each)
    *_, interval = process.run(1, late=LATE * 2, slots=SHARE, others=0.5, each=each)

    assert interval == pytest.approx(each / SHARE, rel=0.15)


def test_slots_are_slowed_down_soon() -> None:
    """A tenth of a second of it is enough."""
    assert Process().starve() <= 0.1


def test_free_gil_slows_nobody_down() -> None:
    """What slots compute without the GIL, on eight processors, keeps nobody waiting."""
    assert not any(Process().run(5, late=LATE / 2, slots=8.0, others=0.5))


def test_slots_that_use_little_are_not_slowed_down() -> None:
    """If others wait for one another, it is not for slots to wait as well: they would get nothing."""
    assert not any(Process().run(5, late=LATE * 20, slots=SHARE * 0.9, others=0.7))


def test_small_tasks_are_not_slowed_down() -> None:
    """A queue of them is worked off before anybody notices, and to measure them would cost as much."""
    assert not any(Process().run(5, late=LATE * 20, slots=0.9, others=0.1, each=SMALL * 0.9))


def test_one_late_look_slows_nobody_down() -> None:
    """The collection of garbage may keep all threads for a moment."""
    process = Process()

    intervals = [
        *process.run(1, late=0.0, slots=0.9, others=0.5),
        *process.run(PERIOD, late=LATE * 4, slots=0.9, others=0.5),
        *process.run(1, late=0.0, slots=0.9, others=0.5),
    ]

    assert not any(intervals)


def test_interval_has_a_bound() -> None:
    """A task that computes for a minute does not hold up the next one for three."""
    process = Process()

    process.starve(60.0)
    *_, interval = process.run(10, late=LATE * 2, slots=0.99, others=0.05, each=60.0)

    assert interval == INTERVAL_MAX


# Until when.


def test_slots_go_on_if_nobody_takes_what_they_leave() -> None:
    """In a process that only works off its queue they are slowed down for a moment every second or so."""
    process = Process()
    process.starve()

    intervals = list(process.run(20, late=LATE * 20, slots=0.9, others=WANTED / 10))

    slow = sum(map(bool, intervals)) / len(intervals)
    assert slow == pytest.approx(TRIAL / (TRIAL + RETRY), rel=0.3)
    assert not process.pace.held


def test_slots_stay_slow_while_others_use_what_they_leave() -> None:
    """Nothing of that for a site with visitors."""
    process = Process()
    process.starve()

    assert all(process.run(20, late=LATE * 1.5, slots=SHARE, others=WANTED * 2))
    assert process.pace.held


def test_slots_get_faster_as_long_as_nobody_waits() -> None:
    """Little by little, and in the end as fast as they can."""
    process = Process()
    process.starve()

    intervals = list(process.run(15, late=0.0, slots=SHARE, others=0.1))

    assert intervals[10] > intervals[100] > intervals[500] > 0.002
    assert intervals[-1] == 0.0


def test_slots_that_got_too_fast_are_slowed_down_again() -> None:
    """But not below their share."""
    process = Process()
    process.starve()
    *_, fast = process.run(1, late=0.0, slots=SHARE, others=0.5)

    *_, slow = process.run(10, late=LATE * 2, slots=SHARE, others=0.5)

    assert fast < slow == pytest.approx(0.002 / SHARE, rel=0.15)


def test_slot_that_has_ended_is_no_negative_use() -> None:
    """Its processor time and its tasks vanish from the sums."""
    process = Process(slots=100.0, ended=50_000)
    process.starve()
    process.slots, process.ended = 0.0, 0

    intervals = list(process.run(1, late=LATE * 2, slots=SHARE, others=0.5))

    assert all(intervals)
    assert intervals == pytest.approx([0.002 / SHARE] * len(intervals), rel=0.3)


def test_free_pace_has_forgotten_everything() -> None:
    """After a moment of rest nobody is slowed down by what was before."""
    process = Process()
    process.starve()

    process.pace.free()

    assert process.pace.interval == 0.0
    assert not any(process.run(1, late=0.0, slots=0.9, others=0.5))


# The wait of a slot.


def waits(pace: Pace, times: int) -> float:
    """Return how long it took to wait several times, in seconds."""
    start = monotonic()
    for _ in range(times):
        pace.wait(["a task"])
    return monotonic() - start


def test_starts_keep_their_distance() -> None:
    """Four tasks take three intervals at least."""
    pace = Pace()
    pace.interval = 0.02

    assert waits(pace, 4) >= 0.06


def test_short_waits_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait that is shorter than a change of threads takes is not made, but not forgotten either."""
    sleeps: list[float] = []
    monkeypatch.setattr(
        "bgtasks.core.pace.sleep", lambda seconds: (sleeps.append(seconds), time.sleep(seconds))
    )
    pace = Pace()
    pace.interval = 0.0002

    assert waits(pace, 101) >= 100 * 0.0002 - GRAIN
    assert 1 <= len(sleeps) <= 100 * 0.0002 / GRAIN


def test_wait_ends_when_the_pace_is_free() -> None:
    """A shutdown waits for no interval."""
    pace = Pace()
    pace.interval = BOUND
    pace.wait(["a task"])
    timer = threading.Timer(0.01, pace.free)
    timer.start()

    assert waits(pace, 1) < BOUND / 2
    assert waits(pace, 1) < BOUND / 2  # what was planned is forgotten


def test_wait_ends_when_the_interval_gets_much_shorter() -> None:
    """Slots that wait for minutes, one behind the other, do not when tasks turn out to be small."""
    pace = Pace()
    pace.interval = BOUND
    pace.wait(["a task"])
    timer = threading.Timer(0.01, setattr, (pace, "interval", 0.01))
    timer.start()

    assert waits(pace, 1) < BOUND / 2
    assert waits(pace, 2) < BOUND / 2


def test_wait_ends_when_nothing_waits() -> None:
    """A slot goes idle then: a fork has to find it so."""
    pace = Pace()
    pace.interval = BOUND
    pace.wait(["a task"])
    waiting = ["a task"]
    timer = threading.Timer(0.01, waiting.clear)
    timer.start()

    start = monotonic()
    pace.wait(waiting)

    assert monotonic() - start < BOUND / 2


# How long somebody looks.


def test_slots_that_compute_nothing_are_not_looked_at_for_long() -> None:
    """A task that waits for an hour does not have the loop look for an hour."""
    process = Process()

    agains = [process.again for _ in process.run(LOOK_FOR * 2, late=0.0, slots=0.01, others=0.5)]

    assert agains.index(False) == pytest.approx(LOOK_FOR / PERIOD, abs=1)
    assert not agains[-1]


def test_slots_that_compute_are_looked_at_all_the_time() -> None:
    """Whether they are slowed down or not."""
    process = Process()

    assert all(process.again for _ in process.run(5, late=0.0, slots=0.2, others=0.5))


# The drainer's part.


def compute(seconds: float = 0.003) -> None:
    """Use the processor for so many seconds, in Python."""
    until = thread_time() + seconds
    while thread_time() < until:
        pass


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every slot slowed down that goes from task to task, and never let it off."""
    monkeypatch.setattr(pace, "LATE", -1.0)
    monkeypatch.setattr(pace, "SHARE", 1e-6)
    monkeypatch.setattr(pace, "SMALL", -1.0)
    monkeypatch.setattr(pace, "WANTED", -1.0)
    monkeypatch.setattr(pace, "INTERVAL_MAX", BOUND)


def spawn_until(core: Core, task: Callable[[], object], done: Callable[[], object]) -> None:
    """Keep tasks waiting until `done` is true."""

    def look() -> object:
        for _ in range(16 - core.stats().queued):
            core.spawn("task", task)
        return done()

    wait_until(look)


@pytest.mark.usefixtures("strict")
def test_slots_that_compute_are_slowed_down() -> None:
    """Slots that go from task to task are looked at, and wait as the pace asks them to."""
    with Core(conn_max=2) as core:
        spawn_until(core, compute, lambda: core.pace.interval)
        before = core.stats().succeeded
        assert core.stats().queued

        time.sleep(4 * STEP)

        assert core.stats().succeeded - before <= 4  # those that ran, and one more of each slot
        assert core.close(BOUND) == 0


@pytest.mark.usefixtures("strict")
def test_it_is_said_once_a_minute_that_slots_are_slowed_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody will ask why the queue is no shorter."""
    monkeypatch.setattr(pace, "TRIAL", 0.0)
    monkeypatch.setattr(pace, "INTERVAL_MAX", 0.01)
    with Core(conn_max=2) as core:
        spawn_until(core, compute, lambda: core.logs.of("a plain function is started every 10.0 ms"))
        looks = core.pace._before
        spawn_until(core, compute, lambda: core.pace._before != looks)

        assert len(core.logs.of("is started every")) == 1
        assert core.close(BOUND) == 0


@pytest.mark.usefixtures("strict")
def test_shutdown_frees_the_pace() -> None:
    """What waits is worked off as fast as it can be, and nothing of it is cancelled."""
    with Core(conn_max=1) as core:
        spawn_until(core, compute, lambda: core.pace.interval > BOUND / 2)
        for _ in range(20):
            core.spawn("waits", compute)

        assert core.close(BOUND) == 0

        assert core.stats().queued == core.stats().cancelled == 0


@pytest.mark.usefixtures("strict")
def test_nobody_looks_at_an_idle_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last look comes when every slot is at rest, and leaves no timer behind."""
    monkeypatch.setattr(pace, "INTERVAL_MAX", 0.001)
    with Core(conn_max=2) as core:
        spawn_until(core, compute, lambda: core.pace.interval)
        core.drain()

        wait_until(lambda: not core.pace._looking)

        assert core.pace.interval == 0.0


def test_processor_time_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the slots, that of the drainer and its companion, which is nobody's, and that of all others."""
    readings: list[dict[str, Any]] = []
    end, begun, over = threading.Event(), threading.Event(), threading.Event()
    companion = threading.Thread(target=lambda: (compute(0.2), end.wait(BOUND)))
    with Core(conn_max=2) as core:
        core.drainer.background = [BackgroundThread(companion)]

        def look(now: float, **reading: Any) -> bool:
            """Note the reading, and wake the test, which must not use a processor meanwhile."""
            readings.append(reading)
            begun.set()
            if reading["ended"] == 300 and processor_time(companion.native_id) >= 0.2:
                over.set()
            return True

        monkeypatch.setattr(core.pace, "look", look)
        for _ in range(300):
            core.spawn("computes", compute)
        core.spawn("waits", end.wait, BOUND)  # as long as a slot has a task, the loop looks
        assert begun.wait(BOUND)
        first = readings[0]
        core.drainer.loop.call_soon(compute, 0.2)
        companion.start()
        assert over.wait(BOUND)
        last = readings[-1]
        end.set()
        companion.join()

    assert 0.2 <= last["slots"] - first["slots"] < BOUND
    assert last["others"] - first["others"] < 0.1
    assert 50 < last["ended"] - first["ended"] <= 300


@pytest.mark.parametrize("gil", [True, False])
def test_what_others_wait_for_depends_on_the_gil(gil: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it the loop is late; without it the kernel says, of all threads but those of the pools."""
    readings: list[float] = []
    asked: list[set[int]] = []
    monkeypatch.setattr(pace, "has_gil", lambda: gil)
    with Core(conn_max=2) as core:

        def delay(except_for: set[int]) -> float:
            asked.append(except_for)
            return 60.0

        def look(now: float, *, late: float, **reading: Any) -> bool:
            readings.append(late)
            return True

        monkeypatch.setattr(core.pace._run_queue, "delay", delay)
        monkeypatch.setattr(core.pace, "look", look)
        spawn_until(core, compute, lambda: readings)
        own = {thread.native_id for thread in core.slots.threads()}
        core.drain()

    assert (readings[0] == 60.0) is not gil
    assert bool(asked) is not gil
    assert all(own < each and threading.get_native_id() not in each for each in asked)


def test_run_queue_says_how_long_threads_wait_for_a_processor() -> None:
    """Two that share one wait for each other; one that sleeps waits for nothing."""
    [processor, *_] = os.sched_getaffinity(0)
    spin = f"import os\nos.sched_setaffinity(0, {{{processor}}})\nprint(flush=True)\nwhile True: pass"
    begun, end = threading.Event(), threading.Event()

    def run() -> None:
        os.sched_setaffinity(0, {processor})  # of this thread alone
        begun.set()
        while not end.is_set():
            compute(0.001)

    thread, queue = threading.Thread(target=run), RunQueue()
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()
            thread.start()
            assert begun.wait(BOUND)
            rest = {each.native_id for each in threading.enumerate()} - {thread.native_id}
            assert queue.delay(rest) == 0.0  # there is nothing to compare it with yet
            time.sleep(0.2)
            assert queue.delay(rest) > LATE / 2
            assert queue.delay({*rest, thread.native_id}) == 0.0
        finally:
            end.set()
            thread.join()
            other.kill()


@pytest.mark.usefixtures("strict")
def test_look_that_is_interrupted_slows_nobody_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception from outside may hit the loop there, and nobody would look again."""
    with Core(conn_max=2) as core:
        spawn_until(core, compute, lambda: core.pace.interval > 1)

        def interrupted(*args: Any, **kwargs: Any) -> bool:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(core.pace, "look", interrupted)
        core.drain()

        assert core.logs.wait("the drainer's loop was interrupted; it goes on")
        assert core.stats().failed == 0


def test_single_tasks_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that finds an idle pool, and no other behind it, does not wake the loop."""
    asked: list[object] = []
    with Core(conn_max=1) as core:
        monkeypatch.setattr(core.pace, "applies", lambda: asked.append(1))
        for _ in range(10):
            core.spawn("single", compute)
            core.drain()
            wait_idle(core.slots)

        assert not asked
        assert not core.pace._looking
        assert core.pace._before is None


@pytest.mark.usefixtures("strict")
def test_pace_is_looked_at_again_after_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer has ended with the loop of before, and what it last said holds no longer."""
    monkeypatch.setattr(pace, "INTERVAL_MAX", 0.001)
    with Core(conn_max=2) as core:
        spawn_until(core, compute, lambda: core.pace.interval)
        core.drain()
        wait_idle(core.slots)
        core.forks.before_fork()
        core.forks.after_fork_in_parent()

        spawn_until(core, compute, lambda: core.pace.interval)

        assert core.close(BOUND) == 0


def test_processor_time_of_a_thread() -> None:
    """It is what the thread has used, and nothing before it begins and once it has ended."""
    begun, end = threading.Event(), threading.Event()

    def run() -> None:
        compute(0.02)
        begun.set()
        assert end.wait(BOUND)

    thread = threading.Thread(target=run)
    assert processor_time(thread.native_id) == 0.0
    thread.start()
    assert begun.wait(BOUND)

    assert 0.02 <= processor_time(thread.native_id) < BOUND
    assert processor_time(threading.get_native_id()) == pytest.approx(thread_time(), abs=0.1)

    end.set()
    thread.join()
    wait_until(lambda: processor_time(thread.native_id) == 0.0)  # the system takes a moment longer


def test_nobody_is_slowed_down_where_it_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On macOS and Windows slots go as fast as they can."""
    monkeypatch.setattr(pace, "CAN_MEASURE", False)
    with Core(conn_max=1) as core, Gate() as gate:
        core.spawn("first", gate)
        for _ in range(5):
            core.spawn("computes", compute)
        gate.open()
        core.drain()

        assert not core.pace._looking
        assert core.pace._before is None
