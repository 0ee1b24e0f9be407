"""What the scripts share: the surroundings of a request, interleaved rounds, and a table of ratios."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter_ns
from zoneinfo import ZoneInfo

from demo_project.figures import percentile as nearest_rank

RESULTS = Path(__file__).parent / "results"
QUICK = bool(os.environ.get("BENCHMARKS_QUICK"))  # to see that a script runs; its figures are worth nothing
ROUNDS = 1 if QUICK else 7

request_id: ContextVar[str] = ContextVar("request_id")


def set_up() -> None:
    """Set Django up, and be like a request: a context variable, French, and Paris' time."""
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "benchmarks.settings")
    import django
    from django.utils import timezone, translation

    django.setup()
    request_id.set("4f9c")
    translation.activate("fr")
    timezone.activate(ZoneInfo("Europe/Paris"))


def set_up_apart() -> None:
    """Set Django up in a process that only runs tasks, one at a time, and so needs one connection."""
    set_up()
    from django.db import connections

    connections.settings["default"]["OPTIONS"]["pool"] = {"min_size": 1, "max_size": 1}


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that at least `percent` % of the values do not exceed."""
    return nearest_rank(sorted(values), percent)


def timed(call: Callable[[], object], number: int) -> list[int]:
    """Return how long each of so many calls took, in ns, less what reading the clock takes."""
    clock = perf_counter_ns
    empty = min(_pairs(clock, 1000))
    times = []
    for _ in range(number):
        start = clock()
        call()
        times.append(clock() - start - empty)
    return times


def _pairs(clock: Callable[[], int], number: int) -> list[int]:
    times = []
    for _ in range(number):
        start = clock()
        times.append(clock() - start)
    return times


def interleaved(
    measures: Mapping[str, Callable[[], Mapping[str, float]]], rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Measure all of `measures` in turn, and return the median of each figure over all rounds.

    In turn, so that whatever else the machine does meets all of them.
    """
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in measures}
    for number in range(rounds):
        for name, measure in measures.items():
            say(f"round {number + 1} of {rounds}: {name}")
            for figure, value in measure().items():
                figures[name].setdefault(figure, []).append(value)
    say("")
    return {
        name: {figure: statistics.median(values) for figure, values in each.items()}
        for name, each in figures.items()
    }


def say(text: str) -> None:
    """Show what is going on, to a person only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Target:
    """A promise: a ratio that is at most, or at least, a limit."""

    text: str
    ratio: float
    at_most: float | None = None
    at_least: float | None = None

    @property
    def met(self) -> bool:
        """Return whether the ratio is on the right side of its limit."""
        if self.at_most is not None and self.ratio > self.at_most:
            return False
        return self.at_least is None or self.ratio >= self.at_least

    @property
    def limit(self) -> str:
        """Return the limit as text."""
        return f"at most {self.at_most}" if self.at_most is not None else f"at least {self.at_least}"


@dataclass
class Result:
    """What one script has found out."""

    question: str
    columns: Sequence[str]  # of `rows`, the first is what was measured
    rows: list[Sequence[str | float]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    extra: dict[str, object] = field(default_factory=dict)  # for plots

    def target(
        self, text: str, ratio: float, *, at_most: float | None = None, at_least: float | None = None
    ) -> None:
        """Hold a ratio against its limit."""
        self.targets.append(Target(text, ratio, at_most, at_least))

    def finish(self) -> None:
        """Print the tables and keep them in `results/`, under the script's name."""
        name = Path(sys.argv[0]).stem
        print(self.as_text())
        if QUICK:
            return
        RESULTS.mkdir(exist_ok=True)
        content = asdict(self) | {"machine": machine()}
        # A line for each key: a series of thousands of points is one line, not four a point.
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items())
        (RESULTS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def as_text(self) -> str:
        """Return the tables in Markdown."""
        lines = [self.question, "", _row(self.columns), _row(["---"] + ["---:"] * (len(self.columns) - 1))]
        lines += [_row(row) for row in self.rows]
        if self.targets:
            lines += ["", _row(["target", "limit", "measured", ""]), _row(["---", "---", "---:", "---"])]
            lines += [
                _row([each.text, each.limit, f"{each.ratio:.2f}", "met" if each.met else "**not met**"])
                for each in self.targets
            ]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes), ""])


def _row(cells: Sequence[str | float]) -> str:
    return "| " + " | ".join(cell if isinstance(cell, str) else _number(cell) for cell in cells) + " |"


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    import asgiref
    import django

    return {
        "python": platform.python_version(),
        "django": django.get_version(),
        "asgiref": asgiref.__version__,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.machine()}",
    }
