"""The measurement behind the demo's `manage.py compare`: visitors by the clock, bursts of tasks in their way.

In each round every contender gets a fresh server: nobody (visitors alone), a thread each, ThreadPoolExecutor
with 64 threads and with 8, bgtasks. Once the server is warm, visitors are measured: for a given time without
a burst, or from the burst until its last task has ended. A request belongs to the stretch it was due in,
however late its answer. The contenders take turns, so that whatever else the machine does affects them all.
"""

import contextlib
import http.client
import http.cookiejar
import json
import statistics
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, TypeAlias

from benchmarks.visitors import REQUEST_TIMEOUT, Stretch, Visitors
from demo_project import processes
from demo_project.figures import Summary
from demo_project.models import Member

MEANS = (  # the order of the table
    Member.How.THREAD,
    Member.How.EXECUTOR,
    Member.How.EXECUTOR_8,
    Member.How.BGTASKS,
)
CONTENDERS = (
    None,
    Member.How.BGTASKS,
    Member.How.EXECUTOR_8,
    Member.How.THREAD,
    Member.How.EXECUTOR,
)  # None: nobody
PATIENCE = 60.0  # seconds beyond the expected end of a burst, after which its remaining tasks are lost
WARM_UP_TASKS = 16  # before a round is measured

Progress: TypeAlias = Callable[[str, float], None]  # what is going on, and how many seconds of it have passed


@dataclass(frozen=True)
class Plan:
    """What to measure; times are seconds."""

    scenario: processes.Scenario
    burst: int
    rounds: int
    idle: float
    warm_up: float

    @property
    def calmer(self) -> str:
        """Return the option to try where the machine is too slow for so many requests."""
        return f"--rate {self.scenario.rate / 2:g}"

    def expected(self, how: Member.How | None) -> float:
        """Return how long the measured stretch should be, for the progress bar."""
        if how is None:
            return self.idle
        slots = max(1, self.scenario.pool_size // 3)  # as in the settings
        few = {Member.How.BGTASKS: slots, Member.How.EXECUTOR_8: 8}
        at_once = min(self.burst, few.get(how, self.scenario.pool_size))
        return self.burst * self.scenario.task_seconds / at_once

    def seconds(self) -> float:
        """Return how long all of it should take, apart from starting the servers."""
        return self.rounds * sum(self.warm_up + self.expected(how) for how in CONTENDERS)


@dataclass
class Measured:
    """One line of the table. Percentiles are the median of the rounds, the rest is their total."""

    label: str
    rounds: list[Summary] = field(default_factory=list)
    tasks: int = 0
    lost: int = 0
    dropped: int = 0

    @property
    def p50(self) -> float:
        """Return the median request latency, in ms."""
        return statistics.median(each.p50 or 0.0 for each in self.rounds)

    @property
    def p99(self) -> float:
        """Return the latency that 1 % of the requests exceed, in ms."""
        return statistics.median(each.p99 or 0.0 for each in self.rounds)

    def range(self) -> tuple[float, float]:
        """Return the lowest and the highest p99 of the rounds, in ms."""
        each = [each.p99 or 0.0 for each in self.rounds]
        return min(each, default=0.0), max(each, default=0.0)

    @property
    def spread(self) -> float:
        """Return the highest p99 of the rounds / the lowest."""
        lowest, highest = self.range()
        return highest / max(lowest, 0.01)

    @property
    def max(self) -> float:
        """Return the slowest request of all rounds, in ms."""
        return max((each.max or 0.0 for each in self.rounds), default=0.0)

    @property
    def requests(self) -> int:
        """Return how many requests were made."""
        return sum(each.requests for each in self.rounds)

    @property
    def failed(self) -> int:
        """Return how many of them failed."""
        return sum(each.failed for each in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """Return the line for `--json`."""
        return {
            "label": self.label,
            "p50_ms": round(self.p50, 2),
            "p99_ms": round(self.p99, 2),
            "max_ms": round(self.max, 2),
            "requests": self.requests,
            "failed_requests": self.failed,
            "tasks": self.tasks,
            "lost_tasks": self.lost,
            "dropped_tasks": self.dropped,
            "rounds": [each.as_json() for each in self.rounds],
        }


class UnansweredError(Exception):
    """The site has not answered, or with an error: it starves."""


class Client:
    """The one who asks for bursts: a browser reduced to its cookies.

    Every method raises UnansweredError if the site does not answer in 30 s, or with an error.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._cookies = http.cookiejar.CookieJar()
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(self._cookies))
        self._open("")  # for the CSRF cookie

    def _open(self, path: str, data: dict[str, str] | None = None) -> bytes:
        body = None if data is None else urllib.parse.urlencode(data).encode()
        token = next((cookie.value or "" for cookie in self._cookies if cookie.name == "csrftoken"), "")
        request = urllib.request.Request(self._address + path, body, {"X-CSRFToken": token})
        try:
            with self._opener.open(request, timeout=30) as response:
                answer: bytes = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise UnansweredError(f"the site did not answer /{path}: {error}") from error
        return answer

    def start_burst(self, how: Member.How, count: int) -> uuid.UUID:
        """Start a burst and return its key."""
        return uuid.UUID(json.loads(self._open("bursts/", {"how": how.value, "count": str(count)}))["key"])

    def ended(self, key: uuid.UUID) -> float | None:
        """Return when the burst's last task ended, or None; asks nothing of the database."""
        bursts = json.loads(self._open(f"live/?after={10**9}"))["bursts"]
        ended: float | None = next((burst["ended"] for burst in bursts if burst["key"] == str(key)), None)
        return ended

    def burst(self, key: uuid.UUID) -> dict[str, Any]:
        """Return the burst's account and the number of mails that have a row."""
        account: dict[str, Any] = json.loads(self._open(f"bursts/{key}/"))
        return account


@contextlib.contextmanager
def throwaway_database(data_dir: Path, *, sqlite: bool) -> Iterator[processes.Database]:
    """Provide the demo's database, on files that are thrown away.

    Args:
        data_dir: where these files are meanwhile.
        sqlite: do without PostgreSQL.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    with (
        TemporaryDirectory(prefix="once-", dir=data_dir) as files,
        processes.database(Path(files), sqlite=sqlite) as database,
    ):
        yield database


class Comparison:
    """Measures the contenders, round by round.

    Args:
        plan: what to measure.
        stop: what may end it early.
        progress: is told what goes on, and how many seconds of it have passed.
    """

    def __init__(self, plan: Plan, stop: processes.Stop, progress: Progress) -> None:
        self.plan = plan
        self.idle = Measured("(no burst)")
        self.means = {how: Measured(str(how.label)) for how in MEANS}
        self._stop = stop
        self._progress = progress

    def run(self, database: processes.Database, mail_port: int, data_dir: Path) -> None:
        """Measure everything.

        Args:
            database: where the site keeps its rows.
            mail_port: where it sends its mails.
            data_dir: where its cache goes, and what the servers print.
        """
        environment = self.plan.scenario.variables(database, mail_port, data_dir)
        log = data_dir / "compare.log"
        processes.migrate(environment)
        for number in range(1, self.plan.rounds + 1):
            for how in CONTENDERS:
                line = self.idle if how is None else self.means[how]
                text = f"round {number} of {self.plan.rounds}: {line.label}"
                with (
                    processes.web_server(0, environment, log, self._stop) as address,
                    processes.probe(
                        f"{address}members/", self.plan.scenario.rate, environment, timeout=REQUEST_TIMEOUT
                    ) as process,
                ):
                    visitors, client = Visitors(process), Client(address)
                    self._warm_up(text, how or Member.How.BGTASKS, client)
                    if how is None:
                        stretch = self._pass(text, self.plan.idle, client)
                    else:
                        stretch = self._burst(text, how, client, line)
                    visitors.catch_up(stretch[1])
                    visitors.leave()
                    line.rounds.append(visitors.during(stretch))

    def _pass(self, text: str, seconds: float, client: Client) -> Stretch:
        """Let time pass, asking for the figures as often as during a burst, and return the stretch."""
        nobody, start = uuid.uuid4(), time.time()
        while (left := start + seconds - time.time()) > 0:
            self._tick(text, min(0.5, left))
            with contextlib.suppress(UnansweredError):
                client.ended(nobody)
        return start, time.time()

    def _warm_up(self, text: str, how: Member.How, client: Client) -> None:
        """Let visitors come, and have a few tasks done: the first in a process load what mails need."""
        self._pass(text, self.plan.warm_up, client)
        self._wait(text, client, client.start_burst(how, WARM_UP_TASKS), time.time() + PATIENCE)

    def _burst(self, text: str, how: Member.How, client: Client, line: Measured) -> Stretch:
        """Start a burst, wait until its last task has ended, and return the stretch."""
        asked, start = self.plan.burst, time.time()
        key = client.start_burst(how, asked)
        ended = self._wait(text, client, key, start + self.plan.expected(how) + PATIENCE)
        account = self._account(text, client, key)
        line.tasks += asked
        line.dropped += account["refused"]
        line.lost += asked - account["rows"]
        return start, ended or time.time()

    def _wait(self, text: str, client: Client, key: uuid.UUID, deadline: float) -> float | None:
        """Wait until a burst is finished, and return when that was; None if the `deadline` came first."""
        ended: float | None = None
        while ended is None and time.time() < deadline:
            self._tick(text, 0.5)
            with contextlib.suppress(UnansweredError):  # that is what is measured, by others
                ended = client.ended(key)
        return ended

    def _account(self, text: str, client: Client, key: uuid.UUID) -> dict[str, Any]:
        """Return a burst's account, once a site that starved has a connection for it again."""
        deadline = time.time() + PATIENCE
        while True:
            try:
                return client.burst(key)
            except UnansweredError:
                if time.time() > deadline:
                    raise
                self._tick(text, 0.5)

    def _tick(self, text: str, seconds: float) -> None:
        """Wait, and say so."""
        self._stop.wait(seconds)
        self._progress(text, seconds)


@dataclass(frozen=True)
class Verdict:
    """Whether the promise was kept: bgtasks harms no visitor more than ThreadPoolExecutor(8) does.

    The ratio to an idle site is shown, and not promised: with the GIL, eight threads that work cost requests
    something, whoever starts them.
    """

    ratios: dict[str, float]  # of each means: p99 during the bursts / p99 without
    against_peer: float  # p99 with bgtasks / p99 with ThreadPoolExecutor(8)
    noise: float  # the factor by which the p99 of two rounds differ though nothing else does
    broken: list[str]  # what was promised and is not so
    note: str = ""  # why these figures allow no verdict

    LEAST_NOISE: ClassVar[float] = 1.1
    STEADY: ClassVar[float] = 2.0  # the p99 of two rounds may differ by this factor
    AT_ONCE: ClassVar[float] = 1.0  # visits in the site without a burst: with more they wait for each other

    @property
    def kept(self) -> bool | None:
        """Return whether the promise was kept; None if the figures allow no verdict."""
        if self.broken:
            return False
        return None if self.note else True

    @classmethod
    def of(cls, comparison: Comparison) -> "Verdict":
        """Judge the figures."""
        ratios = {
            how.value: round(line.p99 / max(comparison.idle.p99, 0.01), 2)
            for how, line in comparison.means.items()
        }
        background, peer = comparison.means[Member.How.BGTASKS], comparison.means[Member.How.EXECUTOR_8]
        against_peer = round(background.p99 / max(peer.p99, 0.01), 2)
        noise = round(max(cls.LEAST_NOISE, comparison.idle.spread, peer.spread), 2)
        note = cls._note(comparison)
        broken: list[str] = []
        if background.lost > background.dropped:
            broken.append(f"bgtasks lost {background.lost - background.dropped} tasks that it had accepted")
        if background.failed and not note:
            broken.append(f"with bgtasks {background.failed} requests failed")
        if against_peer > noise and not note:
            broken.append(
                f"with bgtasks the request p99 is {against_peer} x that with {peer.label}, "
                f"and rounds of the same differ by {noise} x at most"
            )
        return cls(ratios, against_peer, noise, broken, note)

    @classmethod
    def _note(cls, comparison: Comparison) -> str:
        """Return why the figures allow no verdict, or ""."""
        idle, scenario = comparison.idle, comparison.plan.scenario
        at_once = scenario.rate * idle.p50 / 1000  # Little's law
        if at_once > cls.AT_ONCE or idle.failed:
            return (
                f"without a burst {at_once:.1f} of the {scenario.rate:g} visits a second were in the site "
                f"at once, and {idle.failed} failed: that is too many for this machine, "
                f"so try {comparison.plan.calmer}"
            )
        if len(idle.rounds) == 1:
            return "one round does not show how much rounds differ, so try --rounds 3"
        for line in (idle, comparison.means[Member.How.EXECUTOR_8]):
            if line.spread > cls.STEADY:
                calm, restless = line.range()
                return (
                    f"{line.label}: the p99 was {calm:.1f} ms in one round and {restless:.1f} ms in another, "
                    "so this machine is busy with something else; try again, or with more --rounds"
                )
        return ""
