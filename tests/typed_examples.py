"""What mypy and pyright, both strict, say about code that uses bgtasks. Nothing runs this file.

A line with an ignore is a mistake that both must report, under these very codes: an ignore that is not needed
is an error of its own, so a mistake that is no longer found fails the type checks.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true
# ruff: noqa: E501, RET505, PGH003

from typing import assert_type

import bgtasks
from bgtasks import testing
from bgtasks.conf import PoolOptions

# The settings.

GOOD: dict[str, PoolOptions] = {
    "default": {"CAPACITY": 1024, "CONN_MAX": 8, "TASK_TIMEOUT": None, "SHUTDOWN_TIMEOUT": 8},
    "email": {"CONN_MAX": 4, "HANDOFF_TO": "durable", "HANDOFF_WHEN": "always"},
    "tests": {"MODE": "inline"},
}
MISSPELT: dict[str, PoolOptions] = {
    "default": {"CON_MAX": 8}  # type: ignore[typeddict-unknown-key]  # pyright: ignore[reportAssignmentType]
}
MISTYPED: dict[str, PoolOptions] = {
    "default": {"CONN_MAX": "8"}  # type: ignore[typeddict-item]  # pyright: ignore[reportAssignmentType]
}
NO_SUCH_MODE: dict[str, PoolOptions] = {
    "default": {"MODE": "thread"}  # type: ignore[typeddict-item]  # pyright: ignore[reportAssignmentType]
}


# Tasks.


def send_welcome(user_pk: int, *, language: str = "en") -> None:
    """A plain function."""


async def ping_partner(url: str) -> int:
    """An asynchronous function; what a task returns is nobody's."""
    return len(url)


def in_sync_code() -> None:
    """Spawn from sync code."""
    assert_type(bgtasks.spawn("send-welcome", send_welcome, 7), bool)
    bgtasks.spawn("send-welcome", send_welcome, user_pk=7, language="fr")
    bgtasks.spawn("ping-partner", ping_partner, "https://example.com")
    bgtasks.spawn("ping-partner", ping_partner(url="https://example.com"))
    bgtasks.pools["email"].spawn("send-welcome", send_welcome, 7)
    bgtasks.spawn_on_commit("send-welcome", send_welcome, 7)
    urgent = bgtasks.using(expires=5, retries=2, retry_on=(OSError, TimeoutError), database="default")
    assert_type(urgent.spawn("send-welcome", send_welcome, 7), bool)
    bgtasks.pools["email"].using(key="7").spawn_on_commit("send-welcome", send_welcome, 7)
    assert_type(bgtasks.stats()["default"].queued, int)
    assert_type(bgtasks.drain(timeout=1), bool)

    # A wrong argument.
    bgtasks.spawn("send-welcome", send_welcome, "7")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    bgtasks.spawn("send-welcome", send_welcome)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    bgtasks.spawn("send-welcome", send_welcome, 7, lang="fr")  # type: ignore[arg-type]  # pyright: ignore[reportCallIssue]
    bgtasks.spawn_on_commit("send-welcome", send_welcome, "7")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    urgent.spawn("send-welcome", send_welcome, "7")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    # An option that is none, or has a wrong type.
    bgtasks.using(retry=2)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    bgtasks.using(key=7)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    # The result of calling a plain function.
    bgtasks.spawn("send-welcome", send_welcome(7))  # type: ignore[call-overload, func-returns-value]  # pyright: ignore[reportArgumentType, reportCallIssue]
    # A name that is none.
    bgtasks.spawn(send_welcome, 7)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


async def in_async_code() -> None:
    """Spawn from async code."""
    bgtasks.spawn("ping-partner", ping_partner, "https://example.com")
    await bgtasks.aspawn_on_commit("send-welcome", send_welcome, 7)
    assert_type(await bgtasks.adrain(), bool)

    # A missing await.
    bgtasks.aspawn_on_commit("send-welcome", send_welcome, 7)  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    bgtasks.adrain()  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    if bgtasks.adrain():  # type: ignore[truthy-bool]  # pyright: ignore[reportUnnecessaryComparison]
        pass


# Tests.


@testing.inline()
def test_of_a_project() -> None:
    """A decorated test stays what it was."""


def with_captured() -> None:
    """The context managers return what they say."""
    with testing.captured() as tasks:
        assert_type(tasks.names, list[str])
        assert_type(tasks.run_all(), int)
    with testing.inline() as nothing:
        assert_type(nothing, None)
