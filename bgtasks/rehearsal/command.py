"""The arguments of ``manage.py bgtasks rehearse``, and its output."""

from __future__ import annotations

import argparse
import json
import signal
from typing import Any

from django.core.management.base import CommandError, OutputWrapper
from django.core.management.color import Style

from bgtasks.rehearsal.advice import status
from bgtasks.rehearsal.report import Colours, as_json, as_text, failure_as_json, failure_as_text
from bgtasks.rehearsal.results import GROUP, MAIN, NotRehearsed, Plan
from bgtasks.rehearsal.runner import Rehearsal

INTERRUPTED = 130  # the exit status after Ctrl-C, as a shell has it
CLEAR_LINE = "\r\x1b[K"

DESCRIPTION = (
    "Start the server, have each of its processes spawn tasks that only sleep, send the signal that a deploy "
    "sends, and say how many accepted tasks were lost, and what to change. The exit status is 0 if none was "
    "lost, 1 if some were, and 2 if it could not be rehearsed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a rehearsal, and the server's command."""
    parser.description = DESCRIPTION
    parser.add_argument(
        "--seconds",
        type=seconds,
        default=5.0,
        help="seconds of work that wait in each process (5 by default)",
    )
    parser.add_argument(
        "--signal",
        type=signal_named,
        default=signal.SIGTERM,
        metavar="NAME",
        help="the signal (TERM by default)",
    )
    parser.add_argument(
        "--target",
        choices=[MAIN, GROUP],
        default=MAIN,
        help="which processes get it: the main one (the default, as in containers), or the whole group",
    )
    parser.add_argument("--url", help="visit this URL until it answers, and again while the signal is sent")
    parser.add_argument(
        "--requests",
        type=int,
        default=0,
        metavar="N",
        help="visit the URL this many times while tasks wait, if that makes the server replace workers",
    )
    parser.add_argument(
        "--kill-after",
        type=seconds,
        default=10.0,
        metavar="SECONDS",
        help="seconds after the signal until every process is killed (10 by default, as containers do)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="exit with 1 also if tasks were cancelled and reported, because time ran out",
    )
    parser.add_argument("server", nargs="+", metavar="COMMAND", help="what starts the server, after --")


def rehearse(options: dict[str, Any], out: OutputWrapper, progress_out: OutputWrapper, style: Style) -> int:
    """Rehearse as `options` say, print the outcome, and return the exit status."""
    if options["requests"] and not options["url"]:
        raise CommandError("--requests needs --url")
    plan = Plan(
        options["server"],
        options["seconds"],
        options["signal"],
        options["target"],
        options["url"],
        options["requests"],
        options["kill_after"],
        strict=options["strict"],
        show_output=options["verbosity"] > 1,
    )
    progress = _Progress(progress_out)
    colours = Colours(style.SUCCESS, style.ERROR, style.MIGRATE_HEADING)
    try:
        result = Rehearsal(plan, progress.show).run()
    except NotRehearsed as failure:
        progress.show("")
        out.write(
            json.dumps(failure_as_json(failure), indent=2)
            if options["json"]
            else failure_as_text(failure, colours)
        )
        return 2
    except KeyboardInterrupt:
        progress.show("")
        return INTERRUPTED
    progress.show("")
    out.write(json.dumps(as_json(result), indent=2) if options["json"] else as_text(result, colours))
    return status(result)


class _Progress:
    """One line of a terminal that says what is waited for. Elsewhere nothing is written."""

    def __init__(self, out: OutputWrapper) -> None:
        self._out = out
        self._shown = ""

    def show(self, text: str) -> None:
        """Replace what is shown."""
        if text != self._shown and self._out.isatty():
            self._out.write(CLEAR_LINE + text, style_func=str, ending="")
            self._out.flush()
            self._shown = text


def seconds(text: str) -> float:
    """Return a positive number of seconds."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return number


def signal_named(text: str) -> signal.Signals:
    """Return the signal with this name or number, as ``kill`` takes them."""
    name = text.upper()
    try:
        return (
            signal.Signals(int(text))
            if text.isdecimal()
            else signal.Signals["SIG" + name.removeprefix("SIG")]
        )
    except (KeyError, ValueError):
        raise argparse.ArgumentTypeError(f"there is no signal {text!r}") from None
