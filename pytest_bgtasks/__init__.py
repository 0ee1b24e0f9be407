"""The pytest plugin: the tools of ``bgtasks.testing`` as fixtures.

A package of its own, since pytest loads it in every project that has django-bgtasks installed: it must not
import Django, or ``pytest --help`` would.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from bgtasks.testing import Captured


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
def bgtasks_drained(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run spawned tasks in the real pools, and fail the test if one of them has not ended when it is over.

    Tasks run on threads and connections of their own: use ``@pytest.mark.django_db(transaction=True)``.
    """
    # They come before, so that the tables are flushed, and access to the database is blocked again, only
    # after the last task. The marker django_db does so by itself.
    for name in ("db", "transactional_db", "live_server"):
        if name in request.fixturenames:
            request.getfixturevalue(name)
    from bgtasks.testing import drained

    with drained():
        yield
