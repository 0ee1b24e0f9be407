"""The one task under which plain functions travel to the engine. See bgtasks.handoff.

Workers find it by its path, ``bgtasks.tasks.run_function``. Celery's autodiscovery imports a module of this
name of every app, so it can be imported even if nothing is handed off, and where Django has no tasks.
"""

from __future__ import annotations

from typing import Any

import django
from django.conf import settings

from bgtasks import conf


def _alias() -> str | None:
    """Return an alias under which the task can be defined: each handoff names its own when it enqueues."""
    aliases = getattr(settings, "TASKS", {})
    return next((alias for alias in [*conf.handoff_aliases(), *aliases] if alias in aliases), None)


alias = _alias()
if django.VERSION >= (6, 0) and alias is not None:
    from django.tasks import task, task_backends

    from bgtasks.handoff.engine import queue_name
    from bgtasks.handoff.payload import run

    @task(backend=alias, queue_name=queue_name(task_backends[alias], conf.DEFAULT_POOL), takes_context=True)
    def run_function(context: Any, payload: str) -> Any:
        """Run the function that a signed payload names."""
        return run(context, payload)
