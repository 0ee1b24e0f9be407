"""The warning about the limits of gunicorn. The real one is started in tests/test_servers.py."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from bgtasks import servers
from tests.pool import Logs

SETTINGS = {"worker_class_str": "sync", "graceful_timeout": 30, "timeout": 20, "max_requests": 0}


def loaded_by(method: str, **settings: Any) -> Callable[[Callable[[], object]], Any]:
    """Return what calls a function as the application of a gunicorn with these settings does in a method."""
    names: dict[str, Any] = {"__name__": "gunicorn.app.base"}
    exec(f"class Application:\n    def {method}(self, load): return load()", names)
    application = names["Application"]()
    application.cfg = SimpleNamespace(**settings)
    call: Callable[[Callable[[], object]], Any] = getattr(application, method)
    return call


@pytest.mark.parametrize(
    ("timeout", "max_requests", "expected"),
    [
        (29, 0, []),
        (30, 0, ["--graceful-timeout comes after 30 s"]),
        (20, 9, ["--max-requests, comes after 20 s"]),
        (30, 9, ["--graceful-timeout comes after 30 s", "--max-requests, comes after 20 s"]),
    ],
)
def test_limit_that_is_not_longer_is_warned_of(
    timeout: float, max_requests: int, expected: list[str], logs: Logs
) -> None:
    """--timeout counts only where workers are replaced."""
    loaded_by("wsgi", **SETTINGS | {"max_requests": max_requests})(lambda: servers.warn_of_limits(timeout))

    assert len(logs.lines) == len(expected)
    assert all(part in line for part, line in zip(expected, logs.lines, strict=True))


def test_configuration_file_that_loads_the_project_is_no_reason_to_warn(logs: Logs) -> None:
    """Its own settings are not read yet."""
    loaded_by("load_config", **SETTINGS)(lambda: servers.warn_of_limits(60))

    assert logs.lines == []


def test_gunicorn_with_other_settings_does_not_keep_the_project_from_loading(logs: Logs) -> None:
    """A later version may call them otherwise."""
    loaded_by("wsgi", worker_class_str="sync")(lambda: servers.warn_of_limits(60))

    [line] = logs.lines
    assert line.startswith("the settings of gunicorn cannot be read")
