"""The pytest plugin: the tools of ``bgtasks.testing`` as fixtures.

A package of its own, since pytest loads it in every project that has django-bgtasks installed: it must not
import Django, or ``pytest --help`` would.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from bgtasks.testing import Captured, Drained

DRAINED = pytest.StashKey[bool]()  # of an item: bgtasks_drained is active


@pytest.fixture
def bgtasks_inline() -> Iterator[None]:
    """Run spawned tasks at once in the code that spawns them, inside the test's transaction."""
    from bgtasks.testing import inline

    with inline():
        yield


@pytest.fixture
def bgtasks_captured() -> Iterator[Captured]:
    """Record spawned tasks, and run none of them."""
    from bgtasks.testing import captured

    with captured() as tasks:
        yield tasks


@pytest.fixture
def bgtasks_drained(request: pytest.FixtureRequest) -> Iterator[Drained]:
    """Run spawned tasks in the real pools, and fail the test if one of them fails or does not end.

    Set ``bgtasks_drained.allow_failures = True`` in a test whose tasks may fail. Tasks run on threads and
    connections of their own: use ``@pytest.mark.django_db(transaction=True)``.
    """
    # They come before, so that the tables are flushed, and access to the database is blocked again, only
    # after the last task. The marker django_db does so by itself.
    for name in ("db", "transactional_db", "live_server"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    from bgtasks.testing import drained

    with drained() as tasks:
        request.node.stash[DRAINED] = True
        yield tasks
        del request.node.stash[DRAINED]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
    """Show hints below a test that has failed with ``bgtasks_drained``."""
    outcome = yield
    if call.when != "call" or call.excinfo is None or DRAINED not in item.stash:
        return
    from bgtasks.hints import for_failure

    for hint in for_failure(call.excinfo.value):
        outcome.get_result().sections.append(("hint of bgtasks", hint))
