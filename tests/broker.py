"""An engine without a database: a broker in memory that can be down. Needs Django 6.0."""

from typing import Any

from django.tasks.backends.base import BaseTaskBackend
from django.tasks.signals import task_enqueued

from tests.testapp.engines import make_result

enqueued: list[Any] = []  # the results that the broker has given, which hold task and arguments


class Broker(BaseTaskBackend):
    """Takes sync tasks only, as some engines do. OPTIONS["fail"] raises instead of taking the n-th."""

    def enqueue(self, task: Any, args: Any, kwargs: Any) -> Any:
        self.validate_task(task)
        failure = self.options.get("fail")
        if failure is not None:
            failure(len(enqueued))
        result = make_result(task, self.alias, args, kwargs, str(len(enqueued)))
        enqueued.append(result)
        task_enqueued.send(type(self), task_result=result)
        return result


class Scheduler(Broker):
    """One that keeps tasks until their ``run_after``, and that knows priorities."""

    supports_defer = True
    supports_priority = True
