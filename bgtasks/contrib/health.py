"""A check for django-health-check (4.0 or newer).

::

    HealthCheckView.as_view(checks=["health_check.checks.Database", "bgtasks.contrib.health.BackgroundTasks"])
"""

from __future__ import annotations

import dataclasses

from health_check.base import HealthCheck
from health_check.exceptions import ServiceUnavailable

from bgtasks import health


@dataclasses.dataclass
class BackgroundTasks(HealthCheck):
    """Fails if ``bgtasks.health.problems`` finds something.

    It does not fail because of tasks that a killed process has lost (``bgtasks.health.losses``): a restart of
    the process that has reported them would not bring them back.

    Attributes:
        wait_max: Seconds that a task may wait.
    """

    wait_max: float | None = health.WAIT_MAX

    async def run(self) -> None:
        """Look at the pools of this process. Waits for nothing.

        Raises:
            ServiceUnavailable: What is wrong, in words.
        """
        if found := health.problems(self.wait_max):
            error: Exception = ServiceUnavailable("; ".join(found))  # type: ignore[no-untyped-call]  # it has none
            raise error
