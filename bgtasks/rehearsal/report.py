"""How a rehearsal is shown: as text, and as what becomes JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from bgtasks.rehearsal.advice import advice, notes, status, verdict
from bgtasks.rehearsal.results import NotRehearsed, ProcessResult, Result

HEADS = ["process", "server", "accepted", "finished", "cancelled", "handed off", "lost", "ended"]


class Colours(NamedTuple):
    """How good and bad news and headings are coloured."""

    good: Callable[[str], str] = str
    bad: Callable[[str], str] = str
    heading: Callable[[str], str] = str


NO_COLOURS = Colours()


def as_text(result: Result, colours: Colours = NO_COLOURS) -> str:
    """Return the table, the verdict, and what to change."""
    rows = [_row(process) for process in result.processes]
    widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
    heading, *lines = (_line(row, widths) for row in [HEADS, *rows])
    for number, process in enumerate(result.processes):
        if process.account.lost:
            lines[number] = colours.bad(lines[number])
    sentence = (colours.bad if status(result) else colours.good)(f"{verdict(result)}.")
    parts = ["\n".join([colours.heading(heading), *lines]), sentence]
    parts += [f"Lost: {each.problem}.\n  To do: {each.change}." for each in advice(result)]
    parts += [f"Note: {each}." for each in notes(result)]
    return "\n\n".join(parts)


def _row(process: ProcessResult) -> list[str]:
    account, ended = process.account, process.ended
    after = "before the signal" if ended.after < 0 else f"after {ended.after:.1f} s"
    return [
        str(process.pid),
        f"{process.server.name} {process.server.worker}".rstrip(),
        str(account.accepted),
        str(account.finished),
        str(account.cancelled),
        str(account.handed_off),
        str(account.lost),
        f"{after}, killed" if ended.killed else after,
    ]


def _line(row: list[str], widths: list[int]) -> str:
    first, second, *numbers, last = (
        text.rjust(width) if 1 < column < len(row) - 1 else text.ljust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, second, *numbers, last]).rstrip()


def as_json(result: Result) -> dict[str, Any]:
    """Return all that is known."""
    return {
        "status": status(result),
        "verdict": verdict(result),
        "command": result.plan.command,
        "signal": result.plan.signum.name,
        "target": result.plan.target,
        "ended_after": result.ended_after,
        "processes": [
            {
                "pid": process.pid,
                "server": process.server.name,
                "accepted": process.account.accepted,
                "finished": process.account.finished,
                "cancelled": process.account.cancelled,
                "handed_off": process.account.handed_off,
                "lost": process.account.lost,
                "ended_after": process.ended.after,
                "killed": process.ended.killed,
            }
            for process in result.processes
        ],
        "advice": [each._asdict() for each in advice(result)],
        "notes": notes(result),
    }


def failure_as_text(failure: NotRehearsed, colours: Colours = NO_COLOURS) -> str:
    """Return why it could not be rehearsed, what to do, and what the server has printed last."""
    parts = [colours.bad(f"This could not be rehearsed: {failure.why}.")]
    if failure.change:
        parts.append(f"  To do: {failure.change}.")
    if failure.output:
        parts.append("\n".join(["The last lines of the server:", *(f"  {line}" for line in failure.output)]))
    return "\n".join(parts)


def failure_as_json(failure: NotRehearsed) -> dict[str, Any]:
    """Return the same for a script."""
    return {
        "status": 2,
        "verdict": f"This could not be rehearsed: {failure.why}",
        "change": failure.change,
        "output": list(failure.output),
    }
