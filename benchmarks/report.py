"""Write benchmarks/README.md and the plots from what the scripts have left in ``results/``."""

import json
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, Result, Target

HERE = Path(__file__).parent
SCRIPTS = (
    *("burst", "compute", "long", "overload"),
    *("call", "throughput", "latency", "memory", "startup", "journal", "page"),
)
PLOTS = {
    "burst": "Latency of requests through a burst",
    "call": "What a call costs its caller",
    "overload": "The age of the tasks that a pool runs under overload",
}
PLOTTED = {
    "bgtasks": ("bgtasks, 8 slots", "#0b6e4f"),
    "thread": ("a thread each", "#c8553d"),
    "executor": ("ThreadPoolExecutor(64)", "#d99a2b"),
    "starlette": ("Starlette's BackgroundTask", "#7a6c9d"),
}
INTRODUCTION = """# Benchmarks

What bgtasks costs, as ratios against what it replaces. Each script asks one question, measures bgtasks and
its peers in turn in one run, holds the ratios against their targets, and leaves what it found in `results/`.
All of them, this page and the plots, in about half an hour on a quiet machine:

```sh
.venv-tox/bin/tox -e benchmarks
```

One of them: `.venv-tox/bin/tox -e benchmarks -- call`. This page is written by `benchmarks/report.py`; the
figures are those of the last run. Absolute figures tell about that machine, the ratios about the code.
"""


def load(name: str) -> tuple[Result, dict[str, str]] | None:
    """Return what a script has found, and on what machine; None if it has not run."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return None
    content: dict[str, Any] = json.loads(file.read_text())
    machine = content.pop("machine")
    targets = [Target(**target) for target in content.pop("targets")]
    return Result(**content, targets=targets), machine


def plot_latency(series: dict[str, list[tuple[float, float]]], file: Path) -> None:
    """Draw the latency of each request through a burst, a colour for each way to start the tasks."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for means, (label, colour) in PLOTTED.items():
        points = [(at, latency) for at, latency in series[means] if -4 <= at <= 12]
        axes.plot(*zip(*points, strict=True), ".", markersize=3, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("seconds since the burst of 400 tasks")
    axes.set_ylabel("latency of a request, ms")
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.legend(loc="upper right", markerscale=3, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def plot_call(rows: list[list[Any]], file: Path) -> None:
    """Draw what each call costs its caller."""
    from matplotlib import pyplot as plt

    chosen = [row for row in rows if not row[0].startswith("waking")]
    figure, axes = plt.subplots(figsize=(8, 3.6))
    names = [row[0] for row in chosen][::-1]
    colours = ["#0b6e4f" if name.startswith("spawn") else "#9aa5a1" for name in names]
    bars = axes.barh(names, [row[1] for row in chosen][::-1], color=colours)
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel("median cost of a call, µs")
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def plot_overload(series: dict[str, list[tuple[float, float]]], file: Path) -> None:
    """Draw the age of the tasks that each pool has run, as they started."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.6))
    colours = ("#c8553d", "#d99a2b", "#9aa5a1", "#0b6e4f")
    for (policies, points), colour in zip(series.items(), colours, strict=True):
        label = policies.replace("`", "")
        style = ":" if policies == "both" else "-"  # it lies on the line of one of the others
        axes.plot(*zip(*points, strict=True), style, color=colour, label=label)
    axes.set_xlabel("seconds of twice the load that can be served")
    axes.set_ylabel("age of what starts, s")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", frameon=False, ncols=4)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, file)


def save(figure: Any, file: Path) -> None:
    """Write an SVG that is the same for the same figures."""
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "bgtasks"
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    machines: list[dict[str, str]] = []
    for name in SCRIPTS:
        found = load(name)
        if found is None:
            continue
        result, machine = found
        machines.append(machine)
        heading = result.question
        result.question = f"`benchmarks/{name}.py`"
        parts.append(f"## {heading}\n\n<!-- {name} -->\n\n{result.as_text()}")
        if name in PLOTS:
            parts.append(f"![{PLOTS[name]}]({name}.svg)\n")
        parts.append(f"<!-- end of {name} -->\n")
    described = {
        f"CPython {each['python']}, Django {each['django']}, asgiref {each['asgiref']}, "
        f"{each['cores']} cores, {each['system']}"
        for each in machines
    }
    parts.append("## Measured on\n\n" + "\n".join(f"- {each}" for each in sorted(described)) + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page and the plots."""
    (HERE / "README.md").write_text(page())
    burst, call, overload = load("burst"), load("call"), load("overload")
    if burst is not None:
        series: Any = burst[0].extra
        plot_latency(series, HERE / "burst.svg")
    if call is not None:
        plot_call([list(row) for row in call[0].rows], HERE / "call.svg")
    if overload is not None:
        ages: Any = overload[0].extra
        plot_overload(ages, HERE / "overload.svg")


if __name__ == "__main__":
    main()
