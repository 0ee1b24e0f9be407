"""Tasks made by ``@django.tasks.task`` (Django 6.0), as far as pools and engines have to know them."""

from __future__ import annotations

import sys
from datetime import datetime
from time import time
from typing import Any


def is_task(value: object) -> bool:
    """Tell whether `value` was made by ``@django.tasks.task``."""
    # Nobody has an object of a class that nobody has imported, and to import it is a third of our start-up.
    tasks: Any = sys.modules.get("django.tasks.base")
    # By its type: an object that is no task may raise when it is asked for its class.
    return tasks is not None and issubclass(type(value), tasks.Task)


def seconds_until(run_after: datetime | None) -> float:
    """Return in how many seconds a task may run; 0.0 or less if it may at once."""
    return 0.0 if run_after is None else run_after.timestamp() - time()


def call_with_context(task: Any, /, *args: Any, **kwargs: Any) -> Any:
    """Call the function of a ``@task(takes_context=True)`` with the context that a backend would give it."""
    from django.tasks import TaskContext

    from bgtasks.results import begin, new_result

    result = new_result(task, task.backend, list(args), kwargs)
    begin(result, "bgtasks")
    return task.func(TaskContext(task_result=result), *args, **kwargs)
