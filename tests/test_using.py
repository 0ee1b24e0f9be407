"""``using``: options are checked in the call, and never change."""

from typing import Any

import pytest
from pytest_django import Settings

import bgtasks


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"expires": 0}, ValueError, "expires must be a number of seconds, above 0, not 0"),
        ({"expires": "5"}, TypeError, "expires must be a number of seconds, not '5'"),
        ({"expires": float("nan")}, ValueError, "expires must be a number of seconds, above 0, not nan"),
        ({"key": 7}, TypeError, "key must be a str, not 7"),
        ({"retries": 1.5}, TypeError, "retries must be a whole number, not 1.5"),
        ({"retries": -1}, ValueError, "retries must be a whole number, at least 0, not -1"),
        ({"retry_delay": True}, TypeError, "retry_delay must be a number of seconds, not True"),
        ({"retry_delay": -1}, ValueError, "retry_delay must be a number of seconds, at least 0, not -1"),
        ({"retry_on": OSError()}, TypeError, "retry_on must be an exception class or a tuple of these"),
        ({"database": b"default"}, TypeError, "database must be a str"),
        ({"database": "nowhere"}, ValueError, "database is 'nowhere', which is no alias in DATABASES"),
    ],
)
@pytest.mark.parametrize("pool", [False, True])
def test_bad_option_raises_at_once(
    options: dict[str, Any], error: type[Exception], message: str, pool: bool
) -> None:
    """Its name, and what was expected, are in the message."""
    using = bgtasks.pools["default"].using if pool else bgtasks.using
    with pytest.raises(error) as caught:
        using(**options)

    assert str(caught.value).startswith(message)


def test_options_cannot_be_changed() -> None:
    """One that is kept in a module does for everybody what it did for the first."""
    urgent = bgtasks.using(expires=5, key="a", database="default")

    for name in ("expires", "database", "_options"):
        with pytest.raises(AttributeError, match="cannot be changed; call using"):
            setattr(urgent, name, None)

    assert repr(urgent) == "using(expires=5, key='a', database='default')"


def test_options_of_the_pool_are_the_defaults(settings: Settings) -> None:
    """Each of them, also where the pool itself retries nothing."""
    settings.BGTASKS = {"default": {"RETRY_DELAY": 30}}

    assert bgtasks.pools.default.default_options().retry_delay == 30
